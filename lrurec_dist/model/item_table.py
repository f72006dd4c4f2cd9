"""The item table: one row and one bias per item, input embedding and output projection at once."""

import math

import torch
from torch import Tensor, nn

BIAS = -1  # the column of biases in what is drawn for an item
_QUANTILES = 1 << 16  # distinct values drawn
_ROWS_AT_A_TIME = 1 << 12  # drawn at once: 64-bit numbers of 2 MB where rows are 64 wide


class ItemTable(nn.Module):
    """Rows of the item catalogue, replicated on every rank.

    Args:
        num_items: items of the catalogue.
        dim: width of a row.
        seed: of the initial values, those of a `ShardedItemTable` with this seed; None leaves them to whoever made the table.

    Row `item_id` embeds that item and scores it; row `PAD_ID` embeds padding and is, as an option
    of the loss, one more class that is never the answer.
    """

    def __init__(self, num_items: int, dim: int, *, seed: int | None = None) -> None:
        super().__init__()
        self.num_items = num_items
        if seed is None:
            weight, bias = torch.empty(num_items + 1, dim), torch.empty(num_items + 1)
        else:
            weight, bias = initial_rows(torch.arange(num_items + 1), dim, seed)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, item_ids: Tensor) -> Tensor:
        """Rows (..., dim) of item_ids (...) int64."""
        return nn.functional.embedding(item_ids, self.weight)


def initial_rows(item_ids: Tensor, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows (ids, dim) and biases (ids,) before the first step; those of an item do not depend on which others there are."""
    return initial_values(item_ids, torch.arange(dim), seed), initial_values(item_ids, torch.tensor([BIAS]), seed).squeeze(1)


def initial_values(item_ids: Tensor, columns: Tensor, seed: int) -> Tensor:
    """(ids, columns) float32: truncated normal, deviation 0.02 within +-0.04; each a function of (seed, item_id, column)."""
    return _looked_up(0.02 * _normal_quantiles(_levels() * math.erf(math.sqrt(2))), item_ids, columns, seed)


def normal_values(item_ids: Tensor, columns: Tensor, seed: int) -> Tensor:
    """(ids, columns) float32: standard normal; each a function of (seed, item_id, column)."""
    return _looked_up(_normal_quantiles(_levels()), item_ids, columns, seed)


def _levels() -> Tensor:
    """(_QUANTILES,) float64: evenly spaced between -1 and 1."""
    return (torch.arange(_QUANTILES, dtype=torch.float64) * 2 + 1) / _QUANTILES - 1


def _normal_quantiles(levels: Tensor) -> Tensor:
    return math.sqrt(2) * torch.erfinv(levels)


def _looked_up(quantiles: Tensor, item_ids: Tensor, columns: Tensor, seed: int) -> Tensor:
    """(ids, columns) float32: of each item and column one of the quantiles, by whole numbers, so that no bit depends on how
    rows are grouped."""
    values, quantiles, key = torch.empty(len(item_ids), len(columns)), quantiles.float(), _mix(torch.tensor(seed))
    for part, ids in zip(values.split(_ROWS_AT_A_TIME), item_ids.split(_ROWS_AT_A_TIME), strict=True):
        part.copy_(quantiles[_mix(_mix(ids + key)[:, None] + columns) & (_QUANTILES - 1)])
    return values


def _mix(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers whose every output bit depends on every input bit: the finaliser of SplitMix64."""
    x = x + -0x61C8864680B583EB  # the constants are those of the reference, as signed numbers
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & (1 << 33) - 1)
