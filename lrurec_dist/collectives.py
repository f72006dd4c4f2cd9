"""The few exchanges between training processes, and what they mean in a single process."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lrurec_dist.errors import LrurecError

T = TypeVar("T")

_AGREEMENT_TIMEOUT = timedelta(hours=2)  # ranks wait for the slowest one's files; one that died is noticed at once


def rank() -> int:
    """Index of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """`tensor`, overwritten by its sum over all ranks; exact for integers."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """`tensor`, overwritten by its elementwise maximum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def exchange_counts(counts: list[int], device: torch.device) -> list[int]:
    """What each rank has for this one, where `counts` says what this one has for each."""
    sent = torch.tensor(counts, dtype=torch.int64, device=device)
    return exchange_rows(sent, [1] * world_size(), [1] * world_size()).tolist()


def exchange_rows(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Rows from every rank, in the order of ranks.

    Args:
        rows: (sum(sent), ...): first those for rank 0, then those for rank 1, and so on.
        sent, received: rows for and from each rank; `received` is `exchange_counts(sent)`.

    Returns:
        (sum(received), ...).
    """
    if not dist.is_initialized():
        return rows
    found = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(found, rows.contiguous(), received, sent)
    return found


def all_gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """(sum(counts), ...): the rows of all ranks in their order; counts[r] is how many rank r has."""
    if not dist.is_initialized():
        return rows
    most = max(counts)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    found = rows.new_empty(len(counts) * most, *rows.shape[1:])
    dist.all_gather_single(found, padded)
    return torch.cat([part[:count] for part, count in zip(found.split(most), counts, strict=True)]) if most else found


def reduce_scatter_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """(counts[rank], ...): this rank's part of the sum over ranks of `rows` (sum(counts), ...)."""
    if not dist.is_initialized():
        return rows
    most = max(counts)
    padded = rows.new_zeros(len(counts), most, *rows.shape[1:])
    for part, mine in zip(padded, rows.split(counts), strict=True):
        part[: len(mine)] = mine
    found = rows.new_empty(most, *rows.shape[1:])
    dist.reduce_scatter_single(found, padded.flatten(0, 1))
    return found[: counts[rank()]]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds on at least one rank, known to all."""
    return bool(all_reduce_sum(torch.tensor(int(flag), device=device)).item())


def new_group() -> Any:
    """A gloo group of all ranks, apart from the training's own, so that a second thread can talk; all ranks must call."""
    return dist.new_group(backend="gloo", timeout=_AGREEMENT_TIMEOUT) if world_size() > 1 else None


def together(action: Callable[[], T], group: Any) -> list[T]:
    """What `action` returned on each rank, in the order of ranks; where it failed on one, all ranks raise.

    Args:
        action: does this rank's part.
        group: of `new_group`, which one thread of each rank uses at a time.

    Raises:
        LrurecError: that of the first rank that failed, the same on all ranks, so that none waits for another.
    """
    value, failure = None, None
    try:
        value = action()
    except LrurecError as error:
        failure = error
    except Exception as error:
        failure = LrurecError(f"rank {rank()} failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
    outcomes: list[Any] = [(value, failure)]
    if group is not None:
        outcomes = [None] * world_size()
        dist.all_gather_object(outcomes, (value, failure), group=group)
    for _, failed in outcomes:
        if failed is not None:
            raise failed
    return [found for found, _ in outcomes]


def on_first_rank(action: Callable[[], T], group: Any) -> T:
    """What `action` returned on rank 0, which alone does it, known to all ranks; its error is raised by all."""
    return together(lambda: action() if rank() == 0 else None, group)[0]  # type: ignore[return-value]
