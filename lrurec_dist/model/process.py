"""How a process that computes on the CPU uses its machine; settings of the process, made once at its start."""

import ctypes
import os
import sys

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of glibc's mallopt(3)
_SHAPES = 128  # a step of two blocks has some forty


def arrange_cpu() -> None:
    """Make all settings below."""
    keep_freed_memory()
    forget_old_shapes()
    multiply_by_onednn()


def multiply_by_onednn() -> bool:
    """Let oneDNN multiply float32 matrices instead of MKL; returns whether it could be arranged.

    MKL leaves half of the vector units of processors unused that are not Intel's: on one core of a
    Zen 5, 85 GFLOP/s where oneDNN does 210 (docs/performance.md). PyTorch gives oneDNN a float32
    product only together with leave to round its factors to bfloat16, of which oneDNN makes use on
    processors with AMX. There it is taken back: results are float32 everywhere.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    finer_than_bfloat16 = torch.full((256, 64), 1 + 2**-12)
    exact = bool((finer_than_bfloat16 @ torch.eye(64, 256) == torch.eye(64, 256).any(0) * (1 + 2**-12)).all())
    if not exact:
        matmul.fp32_precision = before
    return exact


def forget_old_shapes() -> None:
    """Let oneDNN, and PyTorch in front of it, keep what they prepared for the latest shapes of products alone.

    Each keeps 1024 by default, 0.6 MB for a small one in bfloat16, and packed batches are hardly ever of one shape twice: a
    training grew by 4 MB a step, to gigabytes (docs/performance.md). Both read this at their first product.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_SHAPES))


def keep_freed_memory() -> bool:
    """Let malloc keep what a step frees for the next one; returns whether it could be arranged.

    A step allocates the same large buffers again and again. By default glibc gives each back to
    the kernel, and the next step pays a page fault for every 4 KiB it touches: copying 32 MiB took
    47 ms instead of 2 (decision 17). The resident set then stays at its peak.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library, musl for one
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
