"""A table spread over ranks, beside the whole table it is a part of."""

from collections.abc import Sequence

import numpy as np
import torch

from lrurec_dist import collectives
from lrurec_dist.model.sharded_table import ShardedItemTable


def sharded(weight: torch.Tensor, bias: torch.Tensor) -> ShardedItemTable:
    """This rank's part of the table with these rows and biases, in their type."""
    table = ShardedItemTable(len(weight) - 1, weight.shape[1], seed=0).to(weight.dtype)
    with torch.no_grad():
        table.weight.copy_(weight[table.item_ids()])
        table.bias.copy_(bias[table.item_ids()])
    return table


def whole(parts: Sequence[np.ndarray]) -> np.ndarray:
    """What the ranks hold, one row an item, in the order of items."""
    rows = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    for rank, part in enumerate(parts):
        rows[rank :: len(parts)] = part
    return rows


def own(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """What this rank has of as many parts as the largest number of ranks; the first ranks have theirs with fewer ranks too."""
    return parts[collectives.rank()]


def dense(gradient: torch.Tensor | None) -> np.ndarray:
    """A gradient, sparse or not, as an array."""
    assert gradient is not None
    return gradient.to_dense().detach().numpy()
