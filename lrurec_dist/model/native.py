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
from typing import NamedTuple

import torch
from torch import Tensor

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.c", "ranking.c", "shortlist.c", "step.c"))
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared", "-std=c11")
_PER_THREAD = 1 << 15  # elements that pay for one more thread
_USERS_OF_A_TASK = 128  # TILE in ranking.c
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
    identity = "\n".join([*(source.read_text() for source in _SOURCES), compiler, *_FLAGS, platform.machine(), *flags])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrurec_dist"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    library = folder / f"kernels-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        handle, unfinished = tempfile.mkstemp(dir=folder, suffix=".so")
        os.close(handle)
        try:
            command = [compiler, *_FLAGS, "-o", unfinished, *map(str, _SOURCES)]
            subprocess.run(command, check=True, capture_output=True, timeout=120)  # noqa: S603
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


def step_users(parameters: Tensor, states: Tensor, vectors: Tensor, epsilon: float) -> None:
    """One event of each user, in place: states (users, blocks, 2, hidden), and vectors (users, dim), which hold the items' rows.

    All are contiguous and float32; parameters are those that `stepping.Stepper` packs.
    """
    users, blocks, _, hidden = states.shape
    threads = ctypes.c_int(max(1, min(users // 16, torch.get_num_threads())))  # few are done before a thread is awake
    _call("step_users", None, users, blocks, vectors.shape[1], hidden, threads,
          ctypes.c_float(epsilon), parameters, states, vectors)  # fmt: skip


def shortlist(
    vector: Tensor,
    weight: Tensor,
    rounded: Tensor,
    facts: tuple[Tensor, Tensor, Tensor],
    excluded: list[int],
    ids: Tensor,
    scores: Tensor,
) -> int:
    """Put the best rows for vector (dim,) into ids and scores (k,), which are contiguous, and return how many there are.

    The table is as `shortlist.Shortlist` holds it; -1, and nothing is found, where the vector is not finite.
    """
    count, eights = len(facts[0]), rounded.shape[1]
    query = torch.empty(2 * eights, dtype=torch.int32)
    return _call("shortlist", None, count, len(vector), eights, vector, weight, rounded, *facts, len(excluded),
                 torch.tensor(excluded, dtype=torch.int32), len(ids), query, ids, scores)  # fmt: skip


def _mask(seed: int, probability: float) -> tuple[ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_float]:
    dropped = min(round(probability * 2**32), 2**32 - 1)
    return ctypes.c_uint32(seed), ctypes.c_uint32(seed >> 32), ctypes.c_uint32(dropped), ctypes.c_float(1 / (1 - probability))


class Ranking(NamedTuple):
    """Rows of an item table in the order of their ids, from row `begin` on, and the users they are ranked for.

    Contiguous: vectors (users, dim) and bias (rows,) float32, weight (rows, dim) float32 or bfloat16. A score is summed
    in the order of dimensions, and does not depend on what other rows and users there are, nor on the number of threads.
    """

    vectors: Tensor
    weight: Tensor
    bias: Tensor
    begin: int

    def score_pairs(self, users: Tensor, rows: Tensor) -> Tensor:
        """(pairs,) float32: scores of rows[p] for users[p], both int64."""
        scores = self.bias.new_empty(len(users))
        dim, narrow = self.weight.shape[1], self.weight.dtype == torch.bfloat16
        _call("score_pairs", None, len(users), dim, _threads(len(users) * dim), narrow, users, rows, *self[:3], scores)
        return scores

    def count_ahead(self, targets: Tensor, tied_until: Tensor) -> Tensor:
        """(users,) int64: rows that score above targets[user], or equal and lie before row tied_until[user]."""
        parts = -(-4 * self._threads() // self._tiles())  # several tasks a thread: none waits long for the last
        ahead = tied_until.new_empty(parts, len(self.vectors))
        self._rank("count_ahead", parts, targets, tied_until, ahead)
        return ahead.sum(0)

    def best_rows(self, k: int, offsets: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
        """The k best rows of each user by (-score, row): (users, k) int64, -1 where there are fewer, and their scores.

        No rows are user u's excluded[offsets[u] : offsets[u + 1]]; offsets (users + 1,) int64, excluded int32.
        """
        parts = -(-self._threads() // self._tiles())
        room = k + max(k, 24)  # a list is cut to k when it is full
        lists = offsets.new_empty(parts, len(self.vectors), room)
        self._rank("best_rows", parts, k, room, offsets, excluded, lists)
        keys = (
            lists[0, :, :k] if parts == 1 else lists[:, :, :k].transpose(0, 1).flatten(1).sort(1, descending=True).values[:, :k]
        )
        bits = keys >> 32
        scores = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).int().view(torch.float32)
        present = keys != torch.iinfo(torch.int64).min
        return torch.where(present, ~keys & 0xFFFFFFFF, -1), torch.where(present, scores, -torch.inf)

    def _tiles(self) -> int:
        return max(1, -(-len(self.vectors) // _USERS_OF_A_TASK))

    def _threads(self) -> int:
        return _threads(len(self.vectors) * len(self.weight)).value

    def _rank(self, name: str, parts: int, *arguments: object) -> None:
        users, (rows, dim) = len(self.vectors), self.weight.shape
        threads, narrow = self._threads(), self.weight.dtype == torch.bfloat16
        chunk = max(96, 2**15 // dim)  # rows of 128 KB
        packed = self.bias.new_empty(-(-users // 32) * 32 * dim)
        wide = self.bias.new_empty(threads * chunk * dim) if narrow else None
        _call(name, None, users, self.begin, rows, dim, chunk, parts, ctypes.c_int(threads), narrow, *self[:3],
              packed, wide, *arguments)  # fmt: skip


def _threads(elements: int) -> ctypes.c_int:
    return ctypes.c_int(max(1, min(torch.get_num_threads(), elements // _PER_THREAD)))


def _call(name: str, dtype: torch.dtype | None, *arguments: object) -> int:
    """Call a kernel, and return what it does, if anything; tensors go as pointers, absent ones as null, counts as 64-bit integers and flags as int."""
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
    return int(kernel(*passed))
