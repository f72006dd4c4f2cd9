"""The few exchanges between training processes, and what they mean in a single process."""

import torch
import torch.distributed as dist
from torch import Tensor


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
