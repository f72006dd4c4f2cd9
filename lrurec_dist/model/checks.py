"""Conditions on tensors that cost no synchronisation on a GPU."""

import torch
from torch import Tensor

from lrurec_dist.errors import LrurecError


def require(condition: Tensor, message: str) -> None:
    """Demand that a boolean tensor holds everywhere.

    On the CPU a violation raises at once; on a GPU it is checked in stream order without waiting
    for it, and surfaces as a device-side assertion at the next synchronisation.

    Raises:
        LrurecError: `message`.
    """
    holds = condition.all()
    if condition.is_cuda:
        torch._assert_async(holds, message)
    elif not holds:
        raise LrurecError(message)
