"""The losses over a sharded item table: each rank scores the items it owns, for the targets of all ranks."""

import torch
from torch import Tensor, nn

from lrurec_dist import PAD_ID, collectives
from lrurec_dist.model.loss import TILE_ELEMENTS, Items, check_loss_inputs, scaled_gradients, stream, tile_shape
from lrurec_dist.model.sampling import sampled_softmax_loss
from lrurec_dist.model.sharded_table import ShardedItemTable


def sharded_softmax_loss(
    vectors: Tensor,
    table: ShardedItemTable,
    targets: Tensor,
    *,
    include_padding_class: bool,
    target_weights: Tensor | None = None,
    unit_rows: bool = False,
    product_dtype: torch.dtype | None = None,
    tile_elements: int = TILE_ELEMENTS,
) -> tuple[Tensor, int]:
    """Sum of cross entropies of this rank's targets against every item of all ranks, and how many there are.

    Args:
        as `softmax_loss`, with a table in place of its rows and biases.

    Returns:
        The sum, a scalar, and the number of targets of this rank; (0, 0) without targets.

    Every rank has to call it, with or without targets, and all of them with or all without gradients. The rows' gradient is that of
    the sum over all ranks' targets, times what arrives from above, which has to be the same number on every rank: one over the
    global number of targets, say. Exchanged by each rank: all vectors once, their gradients once, three numbers a target.
    Memory: as `softmax_loss` for the rows owned, and the vectors of all ranks with their gradients.

    Raises:
        LrurecError: shapes do not fit, or a target is not an item. The other ranks then fail with the process group.
    """
    check_loss_inputs(vectors, table.weight, table.bias, targets, target_weights, num_items=table.num_items)
    first_class = PAD_ID + 1 if table.rank == PAD_ID % table.world_size and not include_padding_class else 0
    total: Tensor = _ShardedSoftmax.apply(
        vectors, table.weight, table.bias, targets, target_weights, table, first_class, unit_rows, product_dtype, tile_elements
    )
    return total, targets.numel()


class _ShardedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vectors, weight, bias, targets, target_weights, table, first_class, unit_rows, product_dtype, tile_elements):  # type: ignore[no-untyped-def]
        factors = torch.ones_like(targets, dtype=vectors.dtype) if target_weights is None else target_weights
        counts = collectives.exchange_counts([targets.numel()] * table.world_size, targets.device)
        vectors, targets, all_factors = (collectives.all_gather_rows(x, counts) for x in (vectors, targets, factors))
        owned = targets % table.world_size == table.rank
        most_rows = table.num_items // table.world_size + 1  # the same tiles on every rank: they meet after each row of tiles
        each, gradients = stream(
            Items(weight, bias, unit_rows, product_dtype or weight.dtype),
            vectors,
            torch.where(owned, targets // table.world_size, first_class),
            all_factors,
            first_class=first_class,
            tile=tile_shape(targets.numel(), most_rows, tile_elements),
            with_gradient=any(ctx.needs_input_grad[:3]),
            owned=owned,
            combine=_combine,
        )
        if gradients:
            gradients = (collectives.reduce_scatter_rows(gradients[0], counts), *gradients[1:])
        ctx.gradients = gradients
        return (each.split(counts)[table.rank] * factors).sum()

    @staticmethod
    def backward(ctx, grad_total):  # type: ignore[no-untyped-def]
        return (*scaled_gradients(ctx, grad_total), None, None, None, None, None, None, None)


def _combine(highest: Tensor, exp_sum: Tensor, target_score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring the three figures of one rank's classes to those of all classes."""
    highest_of_all = collectives.all_reduce_max(highest.clone())
    sums = collectives.all_reduce_sum(torch.stack([exp_sum * torch.exp(highest - highest_of_all), target_score]))
    return highest_of_all, sums[0], sums[1]


def sharded_sampled_softmax_loss(
    vectors: Tensor,
    table: ShardedItemTable,
    targets: Tensor,
    negatives: Tensor,
    log_probability: Tensor,
    *,
    unit_rows: bool = False,
    target_weights: Tensor | None = None,
    product_dtype: torch.dtype | None = None,
    tile_elements: int = TILE_ELEMENTS,
) -> tuple[Tensor, int]:
    """Sum of cross entropies of this rank's targets against themselves and the negatives.

    Args:
        as `sampled_softmax_loss`, with a table in place of its rows and biases; unit_rows: score with rows scaled to
            length 1.

    Returns:
        The sum, a scalar, and the number of targets of this rank.

    Every rank has to call it and its backward pass, as with any lookup. The distinct rows of negatives and own targets are
    looked up and become a small table, over which the loss is the replicated one's.

    Raises:
        LrurecError: as `sampled_softmax_loss`. The other ranks then fail with the process group.
    """
    padding = targets.new_full((1,), PAD_ID)  # the least id: it keeps row 0, and items begin at 1 here too
    candidates, places = torch.unique(torch.cat([padding, negatives, targets]), return_inverse=True)
    rows, bias = table.rows_and_biases(candidates)
    return sampled_softmax_loss(
        vectors,
        nn.functional.normalize(rows, dim=1) if unit_rows else rows,
        bias,
        places[1 + negatives.numel() :],
        places[1 : 1 + negatives.numel()],
        log_probability[candidates],
        target_weights=target_weights,
        product_dtype=product_dtype,
        tile_elements=tile_elements,
    )
