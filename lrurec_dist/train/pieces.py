"""Which rank writes which rows of a tensor, and any rows of a tensor from whatever pieces it was written in.

Rows are those of the first dimension and are named by ranges; a tensor without dimensions is one row.
A piece may be a stretch of rows (step 1) or every so-manieth one (a table dealt out to the ranks).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from lrurec_dist import storage
from lrurec_dist.errors import CheckpointError
from lrurec_dist.train.tensor_file import TensorFile, dtype_of

_SPLIT_BYTES = 64 << 10  # a tensor below is written by one rank


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor of the given whole shape: `values` is (len(rows), …)."""

    name: str
    shape: tuple[int, ...]
    rows: range
    values: Tensor


def pieces_of_rank(tensors: Iterable[tuple[str, Tensor]], rank: int, world_size: int) -> Iterator[Piece]:
    """What one rank writes of whole tensors that all ranks have, so that all write about as many bytes.

    Args:
        tensors: names with whole tensors, in the same order on every rank; one is looked at at a time.

    Yields:
        Views of the tensors. Over all ranks they hold every row once.
    """
    written = [0] * world_size
    for name, tensor in tensors:
        values = tensor if tensor.dim() else tensor.reshape(1)
        rows = len(values)
        if tensor.nbytes < _SPLIT_BYTES or rows < world_size:
            least = written.index(min(written))
            shares = [range(rows) if other == least else range(0) for other in range(world_size)]
        else:
            cuts = [rows * other // world_size for other in range(world_size + 1)]
            shares = [range(*cuts[other : other + 2]) for other in range(world_size)]
        for other, share in enumerate(shares):
            written[other] += tensor.nbytes // max(1, rows) * len(share)
        if mine := shares[rank]:
            yield Piece(name, tuple(tensor.shape), mine, values[mine.start : mine.stop])


class PieceReader:
    """Tensors below a directory, assembled from the pieces that a manifest names.

    Args:
        url: the directory.
        tensors: of each name `shape`, `dtype` and `pieces`, each `file`, `key` and `rows` as
            [start, stop, step].

    A context: it keeps files open from one tensor to the next.
    """

    def __init__(self, url: str, tensors: dict[str, Any]) -> None:
        self._url, self._tensors = url, tensors
        self._files: dict[str, TensorFile] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """A tensor, or the rows of it that a slice with a positive step selects.

        Raises:
            CheckpointError: there is no such tensor, or the pieces do not hold every row asked for.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{self._url}: has no tensor {name}; it has {', '.join(sorted(self._tensors)[:5])}, …")
        entry = self._tensors[name]
        shape = entry["shape"]
        wanted = range(*rows.indices(shape[0] if shape else 1))
        found = torch.zeros(len(wanted), dtype=torch.bool)
        out = torch.empty(len(wanted), *shape[1:], dtype=dtype_of(entry["dtype"]))
        for piece in entry["pieces"]:
            held = range(*piece["rows"])
            common = _common(wanted, held)
            if common:
                place = slice(wanted.index(common[0]), wanted.index(common[-1]) + 1, common.step // wanted.step)
                first, last = held.index(common[0]), held.index(common[-1])
                local = range(first, last + 1, common.step // held.step)
                self._file(piece["file"]).read_into(out[place], piece["key"], local)
                found[place] = True
        if not found.all():
            missing = wanted[int((~found).nonzero()[0])]
            raise CheckpointError(
                f"{self._url}: {int((~found).sum()):,} of {len(wanted):,} rows of {name} are in no piece, the first is {missing:,}"
            )
        return out if shape else out.reshape(())

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            self._files[name] = TensorFile(storage.join(self._url, name))
        return self._files[name]


def _common(one: range, other: range) -> range:
    """The numbers that lie in both ranges, which have positive steps."""
    from_here = one[max(0, -((one.start - other.start) // one.step)) :]
    first = next((number for number in from_here[: other.step] if number in other), None)
    return range(0) if first is None else range(first, min(one.stop, other.stop), math.lcm(one.step, other.step))
