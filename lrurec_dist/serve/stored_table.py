"""Item rows as a bundle stores them: float32, bfloat16, or int8 with a scale a row; float32 again once loaded."""

import copy
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from lrurec_dist.model.lrurec import LRURec

ROWS, SCALES = "table.weight", "table.weight_scale"  # names of tensors
_LARGEST = 127
_ROWS_AT_A_TIME = 1 << 16  # scores of the golden users are compared for so many items at once
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
TABLE_DTYPES = tuple(_DTYPES)


class Rounding(NamedTuple):
    """How far storing the item table moves scores of the golden histories over the whole catalogue, from those in float32."""

    largest: float
    mean: float
    largest_score: float  # to compare them with
    same_best: float  # share of histories whose best item stays


def stored_tensors(weight: Tensor, table_dtype: str) -> dict[str, Tensor]:
    """Tensors that hold the item rows `weight` (rows, dim) float32.

    An int8 row is its largest absolute value over 127, the scale, times whole numbers: each element is off by half a
    scale at most. A bfloat16 element is off by 1/256 of itself at most.
    """
    if table_dtype != "int8":
        return {ROWS: weight.to(_DTYPES[table_dtype]).contiguous()}
    scale = weight.abs().amax(1) / _LARGEST
    whole = (weight / torch.where(scale > 0, scale, 1)[:, None]).round_().clamp_(-_LARGEST, _LARGEST)
    return {ROWS: whole.to(torch.int8), SCALES: scale}


def expected_tensors(model: LRURec, table_dtype: str) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Type and shape of every tensor that a bundle of such a model has; its item rows may be without values (on `meta`)."""
    found = {name: (torch.float32, list(value.shape)) for name, value in model.state_dict().items()}
    found[ROWS] = _DTYPES[table_dtype], found[ROWS][1]
    return {**found, SCALES: (torch.float32, found[ROWS][1][:1])} if table_dtype == "int8" else found


def least_bytes(num_items: int, dim: int, hidden: int, blocks: int, table_dtype: str) -> int:
    """What the matrices alone of such a bundle take: known before a model is made."""
    return (num_items + 1) * dim * _DTYPES[table_dtype].itemsize + 4 * blocks * (4 * dim * hidden + 8 * dim * dim)


def loaded_rows(tensors: dict[str, Tensor]) -> Tensor:
    """(rows, dim) float32 of what `stored_tensors` made."""
    rows = tensors[ROWS].float()
    return rows * tensors[SCALES][:, None] if SCALES in tensors else rows


def as_stored(model: LRURec, table_dtype: str) -> LRURec:
    """A model whose item rows are those that a bundle of `model` gives back, to the bit: its answers are the golden ones."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        rounded.table.weight.copy_(loaded_rows(stored_tensors(model.table.weight.detach(), table_dtype)))
    return rounded


@torch.inference_mode()
def rounding(model: LRURec, table_dtype: str, item_ids: Tensor) -> Rounding:
    """Compare the scores after histories item_ids (histories, length), padded on the left, of all items."""
    rounded = as_stored(model, table_dtype)
    vectors, moved = model.encode(item_ids), rounded.encode(item_ids)
    largest = total = top = 0.0
    best = torch.full((2, len(item_ids)), -torch.inf)
    which = torch.zeros(2, len(item_ids), dtype=torch.int64)
    rows, rounded_rows = model.item_rows(), rounded.item_rows()
    for begin in range(1, len(rows), _ROWS_AT_A_TIME):  # padding is no item
        part = slice(begin, begin + _ROWS_AT_A_TIME)
        pair = torch.stack([vectors @ rows[part].T, moved @ rounded_rows[part].T]) + model.table.bias[part]
        off = (pair[0] - pair[1]).abs()
        largest, total = max(largest, float(off.max())), total + float(off.sum(dtype=torch.float64))
        top = max(top, float(pair[0].abs().max()))
        score, place = pair.max(2)
        which = torch.where(score > best, place + begin, which)
        best = torch.maximum(score, best)
    return Rounding(
        largest=largest,
        mean=total / (len(item_ids) * (len(rows) - 1)),
        largest_score=top,
        same_best=float((which[0] == which[1]).float().mean()),
    )


def candidate_bias(bias: Tensor, status: pa.Array | pa.ChunkedArray | None) -> Tensor:
    """(num_items + 1,) item biases, -inf where the catalogue says `deleted`: such an item's id is known and it is never recommended.

    Args:
        bias: (num_items + 1,) as trained.
        status: (num_items,) strings, of item_id 1, 2, …; None where a catalogue has none.
    """
    if status is None:
        return bias
    deleted = torch.tensor(pc.indices_nonzero(pc.equal(status, "deleted")).to_pylist(), dtype=torch.int64) + 1
    return bias.index_fill(0, deleted, -torch.inf)
