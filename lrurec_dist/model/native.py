"""C kernels for the CPU, compiled on first use; absent without a compiler, and nothing needs them.

The library lies in the user's cache directory under a name made of its source, its flags and the
processor, is written under another name and renamed, and so is safe among many processes. Its
threads are those of PyTorch's own OpenMP where that is GCC's, as in the released wheels.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared", "-std=c11")
_PER_THREAD = 1 << 15  # elements that pay for one more thread
_log = logging.getLogger(__name__)


@cache
def load() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there is no working C compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("the C kernels do not compile here, PyTorch's operations serve instead: %s", error)
        return None


def _compiled(compiler: str) -> Path:
    processor = Path("/proc/cpuinfo").read_text().partition("\n\n")[0] if Path("/proc/cpuinfo").exists() else platform.processor()
    flags = [line for line in processor.splitlines() if line.startswith(("flags", "Features", "model name"))]
    identity = "\n".join([_SOURCE.read_text(), compiler, *_FLAGS, platform.machine(), *flags])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrurec_dist"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    library = folder / f"kernels-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        handle, unfinished = tempfile.mkstemp(dir=folder, suffix=".so")
        os.close(handle)
        try:
            subprocess.run([compiler, *_FLAGS, "-o", unfinished, str(_SOURCE)], check=True, capture_output=True, timeout=120)  # noqa: S603
            os.replace(unfinished, library)
        finally:
            Path(unfinished).unlink(missing_ok=True)
    return library


def scan(decay: Tensor, inputs: Tensor, spans: Tensor, initial: Tensor | None) -> Tensor:
    """States (rows, 2, hidden) of `scan.parallel_scan`; all arguments float32 or float64."""
    states = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    _scan("scan", spans, decay, initial, states, inputs, states)
    return states


def scan_backward(
    decay: Tensor, grad_states: Tensor, states: Tensor, spans: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(rows, 2, hidden) gradient of the inputs and (2, hidden) gradient of the decay."""
    adjoint = torch.empty_like(states)
    grad_decay = decay.new_zeros(len(spans), *decay.shape)  # one sum a sequence: the same for any number of threads
    _scan("scan_backward", spans, decay, initial, adjoint, grad_states, states, adjoint, grad_decay)
    return adjoint, grad_decay.sum(0)


def _scan(name: str, spans: Tensor, decay: Tensor, initial: Tensor | None, output: Tensor, *arrays: Tensor) -> None:
    rows, hidden = int((spans[:, 1] - spans[:, 0]).sum()), decay.shape[1]
    if rows < len(output):
        output.zero_()  # rows outside of every sequence
    zero = decay.new_zeros(decay.shape)
    _call(name, decay.dtype, len(spans), hidden, _threads(rows * hidden), spans, decay, initial, zero, *arrays)


def softmax_tile(scores: Tensor, bias: Tensor, highest: Tensor, exp_sum: Tensor | None, rounded: Tensor | None) -> None:
    """exp(scores + bias - highest) in place, or into `rounded` in bfloat16; scores (items, targets).

    With exp_sum, highest and exp_sum (targets,) are first and in place updated by this tile.
    """
    items, targets = scores.shape
    find_highest = exp_sum is not None
    _call("softmax_tile", None, items, targets, _threads(scores.numel()), find_highest, scores, bias, highest,
          highest if exp_sum is None else exp_sum, rounded)  # fmt: skip


def dropout(x: Tensor, seed: int, probability: float, *, gelu: bool) -> Tensor:
    """x, or gelu(x), with a fraction of its elements zero and the others scaled up; float32 or bfloat16."""
    y = torch.empty_like(x)
    _call("dropout", x.dtype, x.numel(), _threads(x.numel()), gelu, *_mask(seed, probability), x, y)
    return y


def dropout_backward(x: Tensor, grad: Tensor, seed: int, probability: float, *, gelu: bool) -> Tensor:
    """Gradient of `dropout`; x is looked at with gelu only."""
    y = torch.empty_like(grad)
    _call("dropout_backward", grad.dtype, grad.numel(), _threads(grad.numel()), gelu, *_mask(seed, probability), x, grad, y)
    return y


def _mask(seed: int, probability: float) -> tuple[ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_float]:
    dropped = min(round(probability * 2**32), 2**32 - 1)
    return ctypes.c_uint32(seed), ctypes.c_uint32(seed >> 32), ctypes.c_uint32(dropped), ctypes.c_float(1 / (1 - probability))


def _threads(elements: int) -> ctypes.c_int:
    return ctypes.c_int(max(1, min(torch.get_num_threads(), elements // _PER_THREAD)))


def _call(name: str, dtype: torch.dtype | None, *arguments: object) -> None:
    """Call a kernel; tensors go as pointers, absent ones as null, counts as 64-bit integers and flags as int."""
    kernels = load()
    assert kernels is not None
    kernel = getattr(kernels, name if dtype is None else f"{name}_{str(dtype).removeprefix('torch.')}")
    passed: list[object] = []
    held = []  # contiguous copies have to outlive the call
    for argument in arguments:
        if isinstance(argument, Tensor):
            held.append(argument.contiguous())
            passed.append(ctypes.c_void_p(held[-1].data_ptr()))
        elif argument is None:
            passed.append(ctypes.c_void_p(None))
        elif isinstance(argument, bool):
            passed.append(ctypes.c_int(argument))
        else:
            passed.append(ctypes.c_int64(argument) if isinstance(argument, int) else argument)
    kernel(*passed)
