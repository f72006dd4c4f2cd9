"""Full softmax over the catalogue, streamed: the (targets x items) matrix is never built."""

import torch
from torch import Tensor

from lrurec_dist import PAD_ID
from lrurec_dist.errors import LrurecError

TILE_ELEMENTS = 1 << 22  # scores held at a time: 16 MB of float32 stay in a last-level cache
MIN_ROWS = 64  # below so many targets per tile the products starve; then items are tiled as well


def softmax_loss(
    vectors: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    *,
    include_padding_class: bool,
    tile_elements: int = TILE_ELEMENTS,
) -> tuple[Tensor, int]:
    """Sum of cross entropies of the targets against every item, and how many there are.

    Args:
        vectors: (targets, dim) user vectors.
        weight: (num_items + 1, dim) item rows.
        bias: (num_items + 1,) item biases.
        targets: (targets,) int64 in 1..num_items.
        include_padding_class: count row `PAD_ID` as one more class, as the original does.
        tile_elements: scores held at a time.

    Returns:
        The sum, a scalar, and the number of targets; (0, 0) without targets. The caller divides
        by the number over all ranks, so that losses do not depend on how data is spread.

    Gradients are computed on the way forward, while a tile of scores is at hand, so that each score
    is computed once where the catalogue fits a tile, twice where it does not. Memory: one tile and
    the gradients.
    """
    if targets.numel() and (int(targets.min()) <= PAD_ID or int(targets.max()) >= weight.shape[0]):
        raise LrurecError(
            f"targets run from {int(targets.min())} to {int(targets.max())}; the catalogue from 1 to {weight.shape[0] - 1}"
        )
    first_class = PAD_ID if include_padding_class else PAD_ID + 1
    total: Tensor = _StreamedSoftmax.apply(vectors, weight, bias, targets, first_class, tile_elements)
    return total, targets.numel()


class _StreamedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vectors, weight, bias, targets, first_class, tile_elements):  # type: ignore[no-untyped-def]
        with_gradient = any(ctx.needs_input_grad[:3])
        grad_vectors, grad_weight, grad_bias = (torch.zeros_like(x) if with_gradient else x for x in (vectors, weight, bias))
        num_rows, num_classes = targets.numel(), weight.shape[0]
        rows = min(max(MIN_ROWS, tile_elements // num_classes), max(1, num_rows))
        columns = max(1, tile_elements // rows)
        tiles = [(begin, min(begin + columns, num_classes)) for begin in range(first_class, num_classes, columns)]
        total = vectors.new_zeros(())

        for begin in range(0, num_rows, rows):
            user, target = vectors[begin : begin + rows], targets[begin : begin + rows]
            target_score = (user * weight[target]).sum(1) + bias[target]
            highest = torch.full_like(target_score, -torch.inf)
            exp_sum = torch.zeros_like(target_score)
            for low, high in tiles:
                scores = torch.addmm(bias[low:high], user, weight[low:high].T)
                new_highest = torch.maximum(highest, scores.amax(1))
                exp_sum *= torch.exp(highest - new_highest)
                scores.sub_(new_highest[:, None]).exp_()
                exp_sum += scores.sum(1)
                highest = new_highest
            total += (torch.log(exp_sum) + highest - target_score).sum()
            if not with_gradient:
                continue
            for low, high in tiles:
                if len(tiles) > 1:
                    scores = torch.addmm(bias[low:high], user, weight[low:high].T).sub_(highest[:, None]).exp_()
                probability = scores.div_(exp_sum[:, None])
                here = ((target >= low) & (target < high)).nonzero().squeeze(1)
                probability[here, target[here] - low] -= 1
                grad_vectors[begin : begin + rows].addmm_(probability, weight[low:high])
                grad_weight[low:high].addmm_(probability.T, user)
                grad_bias[low:high] += probability.sum(0)
        ctx.gradients = (grad_vectors, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx, grad_total):  # type: ignore[no-untyped-def]
        gradients = tuple(
            gradient * grad_total if needed else None
            for gradient, needed in zip(ctx.gradients, ctx.needs_input_grad[:3], strict=True)
        )
        return (*gradients, None, None, None)
