"""Sampled softmax: negatives drawn from a declared distribution, shared by all targets of a step."""

from typing import Literal

import torch
import torch.utils.checkpoint
from torch import Tensor

from lrurec_dist import PAD_ID
from lrurec_dist.errors import LrurecError
from lrurec_dist.model.loss import TILE_ELEMENTS, check_loss_inputs, product

Distribution = Literal["counts", "log_uniform", "uniform"]


class NegativeSampler:
    """Draws item ids with replacement and knows how often each is expected.

    Args:
        counts: (num_items + 1,) occurrences of each item_id; entry `PAD_ID` is ignored. An item
            without any is drawn as one with a single occurrence, or it would never be a negative.
        distribution: `counts` in proportion to occurrences, `log_uniform` as 1 / rank by
            occurrences (Zipf's law: log(1 + 1 / rank)), `uniform` all alike.

    It holds 12 bytes an item, and takes several times that while it is made: on every rank, with a sharded item table too.
    """

    def __init__(self, counts: Tensor, distribution: Distribution) -> None:
        occurrences = counts[PAD_ID + 1 :].double()
        if distribution == "counts":
            weights = occurrences.clamp_min(1)
        elif distribution == "log_uniform":
            by_rank = torch.argsort(occurrences, descending=True, stable=True)
            weights = torch.empty_like(occurrences)
            weights[by_rank] = torch.log1p(1 / torch.arange(1, len(weights) + 1, dtype=torch.float64, device=counts.device))
        else:
            weights = torch.ones_like(occurrences)
        probability = weights / weights.sum()
        self._cumulative = probability.cumsum(0)
        self.log_probability = torch.cat([probability.new_full((1,), -torch.inf), probability.log()]).float()

    def draw(self, negatives: int, seed: int) -> Tensor:
        """(negatives,) item ids, a function of the seed alone: ranks with one seed share one sample."""
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(negatives, generator=generator, dtype=torch.float64).to(self._cumulative.device)
        # rounding may leave the last cumulative value below 1
        return torch.searchsorted(self._cumulative, uniform, right=True).clamp_max_(len(self._cumulative) - 1) + PAD_ID + 1


def sampled_softmax_loss(
    vectors: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    negatives: Tensor,
    log_probability: Tensor,
    *,
    target_weights: Tensor | None = None,
    product_dtype: torch.dtype | None = None,
    tile_elements: int = TILE_ELEMENTS,
) -> tuple[Tensor, int]:
    """Sum of cross entropies of the targets against themselves and the negatives.

    Args:
        vectors: (targets, dim) user vectors.
        weight: (num_items + 1, dim) item rows.
        bias: (num_items + 1,) item biases.
        targets: (targets,) int64 in 1..num_items.
        negatives: (negatives,) item ids drawn with replacement, shared by all targets.
        log_probability: (num_items + 1,) log of each item's chance in one draw.
        target_weights: (targets,) factors of the targets' cross entropies; 1 when None.
        product_dtype: as in `softmax_loss`.
        tile_elements: scores held at a time, about.

    Returns:
        The sum, a scalar, and the number of targets.

    A negative's score loses the log of how often its item is expected in the sample (logQ
    correction, Bengio and Senecal 2008), and a negative that is a target's own item is no candidate
    for that target. The target itself is always there, so it is not corrected: the sum of
    exponentials is then an unbiased estimate of the full one, and the loss tends to the full
    softmax as negatives grow (Khrylchenko et al. 2025). Memory: a tile of scores.

    Raises:
        LrurecError: shapes do not fit, a target is not an item, or there are no negatives.
    """
    check_loss_inputs(vectors, weight, bias, targets, target_weights, num_items=weight.shape[0] - 1)
    if negatives.numel() == 0:
        raise LrurecError("negatives: a sampled softmax needs at least one")
    # log of the expected number of occurrences in the sample
    log_expected = log_probability + torch.log(torch.tensor(float(negatives.numel())))
    dtype = product_dtype or vectors.dtype
    rows, row_bias = weight[negatives], bias[negatives] - log_expected[negatives].to(bias.dtype)
    target_scores = (vectors * weight[targets]).sum(1) + bias[targets]
    total = vectors.new_zeros(())
    step = max(1, tile_elements // negatives.numel())
    for begin in range(0, max(1, targets.numel()), step):  # once without targets too: gradients are zero, not absent
        here = slice(begin, begin + step)
        # recomputed on the way back, so that one tile lives at a time
        each = torch.utils.checkpoint.checkpoint(
            _cross_entropies,
            vectors[here],
            rows,
            row_bias,
            target_scores[here],
            targets[here],
            negatives,
            dtype,
            use_reentrant=False,
        )
        total = total + (each if target_weights is None else each * target_weights[here]).sum()
    return total, targets.numel()


def _cross_entropies(
    vectors: Tensor,
    rows: Tensor,
    row_bias: Tensor,
    target_scores: Tensor,
    targets: Tensor,
    negatives: Tensor,
    product_dtype: torch.dtype,
) -> Tensor:
    """(targets,) log of the sum over target and negatives of exp(score), minus the target's score."""
    scores: Tensor = _Scores.apply(vectors, rows, product_dtype)
    scores = (scores + row_bias).masked_fill(targets[:, None] == negatives, -torch.inf)
    return torch.logaddexp(torch.logsumexp(scores, 1), target_scores) - target_scores


class _Scores(torch.autograd.Function):
    """vectors @ rows.T by `product`, forward and backward."""

    @staticmethod
    def forward(ctx, vectors, rows, dtype):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(vectors, rows)
        ctx.dtype = dtype
        return product(vectors, rows.T, dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        vectors, rows = ctx.saved_tensors
        return product(grad, rows, ctx.dtype), product(grad.T, vectors, ctx.dtype), None
