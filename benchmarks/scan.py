"""The in-place scan with its own backward, against the paper's recursion under autograd.

    python benchmarks/scan.py [batch length hidden]     (default: 128 256 128)

Forward and backward on the same inputs, in turn, in one process; medians of seven after a warm-up.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lrurec_dist.model.scan import parallel_scan, sequential_scan
from lrurec_dist.reporting import format_table, say

RUNS = 7


def recursive_scan(decay: Tensor, inputs: Tensor) -> Tensor:
    """Algorithm 1 of the paper as written: split in two, carry the last state over, concatenate."""
    batch, length, hidden = inputs.shape
    states, half = inputs, 1
    powers = decay[None]
    while half < length:
        blocks = states.reshape(batch * length // (2 * half), 2 * half, hidden)
        first, second = blocks[:, :half], blocks[:, half:]
        states = torch.cat([first, second + first[:, -1:] * powers], dim=1)
        powers = torch.cat([powers, powers * powers[-1]])
        half *= 2
    return states.reshape(batch, length, hidden)


def measure(scan: Callable[[Tensor, Tensor], Tensor], decay: Tensor, inputs: Tensor, upstream: Tensor) -> float:
    """Milliseconds of one forward and backward pass."""
    started = time.perf_counter()
    torch.autograd.grad(scan(decay, inputs), (decay, inputs), upstream)
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    batch, length, hidden = map(int, sys.argv[1:4]) if len(sys.argv) > 1 else (128, 256, 128)
    if length & (length - 1):
        sys.exit(f"length={length}: the plain recursion needs a power of two")
    torch.manual_seed(0)
    decay = torch.polar(torch.rand(hidden) * 0.19 + 0.8, torch.rand(hidden) * 6).requires_grad_()
    inputs = torch.randn(batch, length, hidden, dtype=torch.complex64, requires_grad=True)
    upstream = torch.randn(batch, length, hidden, dtype=torch.complex64)
    scans = {"recursion, autograd": recursive_scan, "sequential, autograd": sequential_scan, "in place": parallel_scan}
    times: dict[str, list[float]] = {name: [] for name in scans}
    for run in range(RUNS + 1):
        for name, scan in scans.items():
            taken = measure(scan, decay, inputs, upstream)
            if run:
                times[name].append(taken)
    ratios = {
        name: [base / mine for base, mine in zip(times["recursion, autograd"], values, strict=True)]
        for name, values in times.items()
    }
    rows = [
        [name, f"{statistics.median(times[name]):.1f}", f"{statistics.median(ratio):.2f}", f"{min(ratio):.2f}–{max(ratio):.2f}"]
        for name, ratio in ratios.items()
    ]
    say(f"({batch}, {length}, {hidden}) complex64, {torch.get_num_threads()} threads, torch {torch.__version__}")
    say(format_table(["scan", "ms", "times faster", "spread"], rows))
    say(json.dumps({"shape": [batch, length, hidden], **{name: statistics.median(ratio) for name, ratio in ratios.items()}}))


if __name__ == "__main__":
    main()
