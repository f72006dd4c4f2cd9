"""Softmax over the catalogue, streamed: the (targets x items) matrix is never built."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lrurec_dist import PAD_ID
from lrurec_dist.errors import LrurecError
from lrurec_dist.model import native
from lrurec_dist.model.checks import require

TILE_ELEMENTS = 3 << 20  # scores held at a time: 12 MB of float32 stay in a last-level cache
MIN_TARGETS = 64  # below so many targets per tile the products starve
LINE = 16  # float32 in a cache line: a product whose rows are no multiple of it runs at half the speed
WIDE_TARGETS = 512  # targets per tile where the catalogue does not fit one beside MIN_TARGETS


def softmax_loss(
    vectors: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    *,
    include_padding_class: bool,
    target_weights: Tensor | None = None,
    unit_rows: bool = False,
    product_dtype: torch.dtype | None = None,
    tile_elements: int = TILE_ELEMENTS,
) -> tuple[Tensor, int]:
    """Sum of cross entropies of the targets against every item, and how many there are.

    Args:
        vectors: (targets, dim) user vectors.
        weight: (num_items + 1, dim) item rows.
        bias: (num_items + 1,) item biases.
        targets: (targets,) int64 in 1..num_items.
        include_padding_class: count row `PAD_ID` as one more class, as the original does.
        target_weights: (targets,) factors of the targets' cross entropies; 1 when None.
        unit_rows: score with rows scaled to length 1, without a scaled copy of the table.
        product_dtype: what the factors of a product may be rounded to, the vectors' own type when None; sums are
            float32. On CPUs without bfloat16 matrix units (AMX), scores are faster, and stay, in float32.
        tile_elements: scores held at a time, about.

    Returns:
        The sum, a scalar, and the number of targets; (0, 0) without targets. The caller divides
        by the number over all ranks, so that losses do not depend on how data is spread.

    Gradients are computed on the way forward, while a tile of scores is at hand, so that each score
    is computed once where the catalogue fits a tile, twice where it does not. Memory: one tile and
    the gradients.

    Raises:
        LrurecError: shapes do not fit, or a target is not an item.
    """
    check_loss_inputs(vectors, weight, bias, targets, target_weights, num_items=weight.shape[0] - 1)
    first_class = PAD_ID if include_padding_class else PAD_ID + 1
    total: Tensor = _StreamedSoftmax.apply(
        vectors, weight, bias, targets, target_weights, first_class, unit_rows, product_dtype, tile_elements
    )
    return total, targets.numel()


def check_loss_inputs(
    vectors: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, target_weights: Tensor | None, *, num_items: int
) -> None:
    """Refuse shapes that do not fit each other and targets that are no items.

    Raises:
        LrurecError: either.
    """
    if vectors.shape != (targets.numel(), weight.shape[1]) or bias.shape != weight.shape[:1]:
        raise LrurecError(
            f"vectors {tuple(vectors.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)} and targets "
            f"{tuple(targets.shape)} have to be (targets, dim), (classes, dim), (classes,) and (targets,)"
        )
    if target_weights is not None and target_weights.shape != targets.shape:
        raise LrurecError(f"target_weights {tuple(target_weights.shape)} has to be (targets,) = {tuple(targets.shape)}")
    require(
        (targets > PAD_ID) & (targets <= num_items),
        f"targets: one lies outside the catalogue, which runs from 1 to {num_items}",
    )


class _StreamedSoftmax(torch.autograd.Function):
    """`stream` over all rows at once, its gradients kept for the way back."""

    @staticmethod
    def forward(ctx, vectors, weight, bias, targets, target_weights, first_class, unit_rows, product_dtype, tile_elements):  # type: ignore[no-untyped-def]
        factors = torch.ones_like(targets, dtype=vectors.dtype) if target_weights is None else target_weights
        each, ctx.gradients = stream(
            Items(weight, bias, unit_rows, product_dtype or weight.dtype),
            vectors,
            targets,
            factors,
            first_class=first_class,
            tile=tile_shape(targets.numel(), weight.shape[0] - first_class, tile_elements),
            with_gradient=any(ctx.needs_input_grad[:3]),
        )
        return (each * factors).sum()

    @staticmethod
    def backward(ctx, grad_total):  # type: ignore[no-untyped-def]
        return (*scaled_gradients(ctx, grad_total), None, None, None, None, None, None)


def scaled_gradients(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
    """ctx.gradients of the first inputs times grad_total; in place, for a function is differentiated once."""
    gradients = tuple(
        gradient.mul_(grad_total) if needed else None
        for gradient, needed in zip(ctx.gradients, ctx.needs_input_grad[: len(ctx.gradients)], strict=True)
    )
    del ctx.gradients
    return gradients


def stream(
    items: "Items",
    vectors: Tensor,
    target_rows: Tensor,
    factors: Tensor,
    *,
    first_class: int,
    tile: tuple[int, int],
    with_gradient: bool,
    owned: Tensor | None = None,
    combine: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Cross entropies of the targets, tile by tile, and their gradients.

    Args:
        items: the classes; all of them, or one rank's part.
        vectors: (targets, dim).
        target_rows: (targets,) the rows of `items` that are the answers.
        factors: (targets,) of the cross entropies in the sum that is differentiated.
        first_class: rows of `items` before this one are no classes.
        tile: targets and items per tile.
        with_gradient: whether there is something to differentiate.
        owned: (targets,) bool, whether the answer is among `items`; all are when None.
        combine: takes (targets,) the highest score, the sum of exp(score - highest) and the target's score (0 where
            not owned) over `items`, and returns the same over all classes. Called equally often, on equally many
            targets, for equal `tile` and number of targets.

    Returns:
        (targets,) cross entropies without factors, and the gradients of sum(factors * cross entropies) with
        respect to vectors, rows and biases, as far as `items` contribute; () without gradient.

    Tiles are (items, targets): item rows come first in every product, the faster way round on CPUs.
    """
    num_targets, (block, columns) = target_rows.numel(), tile
    # Targets of factor zero fill the last cache line; they add nothing to any sum.
    padding = (0, -num_targets % LINE)
    vectors, factors = nn.functional.pad(vectors, (0, 0, *padding)), nn.functional.pad(factors, padding)
    target_rows = nn.functional.pad(target_rows, padding, value=first_class)
    owned = None if owned is None else nn.functional.pad(owned, padding)
    tiles = [(low, min(low + columns, len(items.weight))) for low in range(first_class, len(items.weight), columns)]
    each = torch.empty_like(factors)
    grads = tuple(torch.zeros_like(x) for x in (vectors, items.weight, items.bias)) if with_gradient else ()

    for begin in range(0, num_targets, block):
        here = slice(begin, begin + block)
        user, target, factor = vectors[here], target_rows[here], factors[here]
        target_score = (user * items.rows_of(target)).sum(1) + items.bias[target]
        target_factor = factor
        if owned is not None:
            target_score, target_factor = target_score.where(owned[here], 0), factor * owned[here]
        highest, exp_sum = torch.full_like(target_score, -torch.inf), torch.zeros_like(target_score)
        for low, high in tiles:
            exponentials = items.exponentials(low, high, user, highest, exp_sum)
        highest_here = highest
        if combine is not None:
            highest, exp_sum, target_score = combine(highest, exp_sum, target_score)
        each[here] = torch.log(exp_sum) + highest - target_score
        if not with_gradient:
            continue
        grad_vectors, grad_weight, grad_bias = grads
        # exp(score - highest) / exp_sum is the probability; the division goes into the users,
        # few numbers, and not over the tile
        scale = factor / exp_sum * torch.exp(highest_here - highest)
        for low, high in tiles:
            if len(tiles) > 1:
                exponentials = items.exponentials(low, high, user, highest_here, None)
            items.multiply(exponentials, low, high, user * scale[:, None], grad_vectors[here], grad_weight[low:high])
            grad_bias[low:high] += torch.mv(exponentials, scale.to(exponentials.dtype))
        grad_vectors[here] *= scale[:, None]
        grad_vectors[here] -= items.rows_of(target) * target_factor[:, None]
        grad_weight.index_add_(0, target, user * -target_factor[:, None])
        grad_bias.index_add_(0, target, -target_factor)
    if with_gradient:
        items.finish(grads[1])
        grads = (grads[0][:num_targets], *grads[1:])
    return each[:num_targets], grads


def tile_shape(num_targets: int, num_classes: int, tile_elements: int) -> tuple[int, int]:
    """Targets and items per tile: all items where `MIN_TARGETS` fit beside them, else few items beside many targets."""
    if MIN_TARGETS * num_classes <= 2 * tile_elements:
        rows, columns = max(MIN_TARGETS, tile_elements // max(1, num_classes)), max(1, num_classes)
    else:
        rows = max(1, min(num_targets, WIDE_TARGETS))
        columns = max(1, tile_elements // rows)
    blocks = max(1, -(-num_targets // rows))
    return -(-max(1, num_targets) // (blocks * LINE)) * LINE, columns


class Items:
    """Item rows as the products take them: as they are or of unit length, in the type of the products."""

    def __init__(self, weight: Tensor, bias: Tensor, unit_rows: bool, dtype: torch.dtype) -> None:
        self.weight, self.bias, self.dtype = weight, bias, dtype
        self.inverse_norm = weight.norm(dim=1).clamp_min(1e-12).reciprocal() if unit_rows else None
        self.native = weight.is_cpu and weight.dtype == torch.float32 and native.load() is not None

    def rows_of(self, item_ids: Tensor) -> Tensor:
        """(targets, dim) rows of item_ids (targets,)."""
        rows = self.weight[item_ids]
        return rows if self.inverse_norm is None else rows * self.inverse_norm[item_ids, None]

    def exponentials(self, low: int, high: int, user: Tensor, highest: Tensor, exp_sum: Tensor | None) -> Tensor:
        """(items, targets) exp(score - highest) of items low..high, in the type of the products.

        With exp_sum, both (targets,) are first and in place brought to include this tile.
        """
        scores = product(self._rows(low, high), user.T, self.dtype)
        if self.native:
            rounded = None if self.dtype == torch.float32 else torch.empty_like(scores, dtype=self.dtype)
            native.softmax_tile(scores, self.bias[low:high], highest, exp_sum, rounded)
            return scores if rounded is None else rounded
        scores += self.bias[low:high, None]
        if exp_sum is None:
            return scores.sub_(highest).exp_().to(self.dtype)
        before = highest.clone()
        torch.maximum(highest, scores.amax(0), out=highest)
        exp_sum *= torch.exp(before - highest)
        exp_sum += scores.sub_(highest).exp_().sum(0)
        return scores.to(self.dtype)

    def multiply(self, tile: Tensor, low: int, high: int, scaled_user: Tensor, grad_user: Tensor, grad_rows: Tensor) -> None:
        """Add both products of the backward pass: tile^T rows and tile users."""
        if self.dtype == grad_rows.dtype:
            grad_user.addmm_(tile.T, self._rows(low, high))
            grad_rows.addmm_(tile, scaled_user)
        else:
            grad_user += torch.mm(tile.T, self._rows(low, high).to(self.dtype))
            grad_rows += torch.mm(tile, scaled_user.to(self.dtype))

    def _rows(self, low: int, high: int) -> Tensor:
        rows = self.weight[low:high]
        return rows if self.inverse_norm is None else rows * self.inverse_norm[low:high, None]

    def finish(self, grad_weight: Tensor) -> None:
        """Carry the gradient of unit rows over to the rows themselves, in place."""
        if self.inverse_norm is None:
            return
        rows = max(1, TILE_ELEMENTS // self.weight.shape[1])
        for low in range(0, len(self.weight), rows):
            here = slice(low, low + rows)
            unit = self._rows(low, low + rows)
            gradient = grad_weight[here]
            gradient -= (gradient * unit).sum(1, keepdim=True) * unit
            gradient *= self.inverse_norm[here, None]


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right with sums and result in the factors' type; these may be rounded to `dtype` where that is faster."""
    if dtype == left.dtype:
        return torch.mm(left, right)
    if left.is_cuda:
        return torch.mm(left.to(dtype), right.to(dtype), out_dtype=left.dtype)
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        return torch.mm(left, right)
    finally:
        matmul.fp32_precision = before
