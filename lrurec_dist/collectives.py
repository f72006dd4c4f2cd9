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


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds on at least one rank, known to all."""
    return bool(all_reduce_sum(torch.tensor(int(flag), device=device)).item())
