"""The streamed softmax by size of the catalogue: time, rate of its products, and peak memory.

    python benchmarks/loss.py [items ...]      (default: 3416 57289 100000 1000000)

896 targets of width 64, forward and backward. Memory is the growth of the peak resident set over
the loss beyond what table and gradient take, each size in a process of its own; the full matrix is
the baseline up to 100,000 items.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lrurec_dist.model.loss import softmax_loss
from lrurec_dist.model.process import arrange_cpu
from lrurec_dist.reporting import format_table, say

TARGETS, DIM, RUNS = 896, 64, 5
FULL_MATRIX_UP_TO = 100_000


def tensors_of(items: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vectors, rows, biases and targets."""
    torch.manual_seed(0)
    vectors = torch.randn(TARGETS, DIM).requires_grad_()
    weight = torch.empty(items + 1, DIM).normal_(std=0.1).requires_grad_()
    return vectors, weight, torch.zeros(items + 1).requires_grad_(), torch.randint(1, items + 1, (TARGETS,))


def call(kind: str, items: int) -> Callable[[], None]:
    """A function that runs one forward and backward of "full matrix", "float32" or "bfloat16"."""
    vectors, weight, bias, targets = tensors_of(items)
    dtype = torch.bfloat16 if kind == "bfloat16" else None

    def run() -> None:
        if kind == "full matrix":
            loss = nn.functional.cross_entropy(torch.addmm(bias, vectors, weight.T), targets, reduction="sum")
        else:
            loss, _ = softmax_loss(vectors, weight, bias, targets, include_padding_class=True, product_dtype=dtype)
        loss.backward()
        vectors.grad = weight.grad = bias.grad = None

    return run


def extra_peak(kind: str, items: int) -> float:
    """MiB above the table and its gradient, in a process of its own."""
    done = subprocess.run(  # noqa: S603
        [sys.executable, __file__, "--peak", kind, str(items)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def print_extra_peak(kind: str, items: int) -> None:
    """The other end of `extra_peak`."""
    call(kind, 1000)()  # libraries, threads and kernels are there now
    run = call(kind, items)
    before = _status("VmRSS")
    run()
    say(str((_status("VmHWM") - before) / 1024 - (items + 1) * DIM * 4 / 2**20))


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("items", nargs="*", type=int)
    parser.add_argument("--peak", nargs=2, metavar=("KIND", "ITEMS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print_extra_peak(arguments.peak[0], int(arguments.peak[1]))
        return
    arrange_cpu()
    rows, figures = [], {}
    for items in arguments.items or [3_416, 57_289, 100_000, 1_000_000]:
        kinds = [*(["full matrix"] if items <= FULL_MATRIX_UP_TO else []), "float32", "bfloat16"]
        runs = {kind: call(kind, items) for kind in kinds}
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for turn in range(RUNS + 1):
            for kind in kinds:
                started = time.perf_counter()
                runs[kind]()
                if turn:
                    times[kind].append(time.perf_counter() - started)
        for kind in kinds:
            taken = statistics.median(times[kind])
            rate = 6 * TARGETS * items * DIM / taken / 1e9
            peak = extra_peak(kind, items)
            figures[f"{items} {kind}"] = {"ms": round(taken * 1e3, 2), "gflops": round(rate, 1), "extra_mib": round(peak, 1)}
            spread = f"{min(times[kind]) * 1e3:.1f}–{max(times[kind]) * 1e3:.1f}"
            rows.append([f"{items:,}", kind, f"{taken * 1e3:.1f}", spread, f"{rate:.0f}", f"{peak:.1f}"])
    say(f"{TARGETS} targets, width {DIM}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    say("rate: the three products a softmax needs, whatever was computed besides, in thousand million operations a second")
    say(format_table(["items", "softmax", "ms", "spread", "rate", "extra peak, MiB"], rows))
    say(json.dumps(figures))


if __name__ == "__main__":
    main()
