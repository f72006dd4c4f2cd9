"""The forms of the scan, against the paper's recursion under autograd.

    python benchmarks/scan.py             forms at a few shapes
    python benchmarks/scan.py radix       the portable form's radix (the table RADIX in model/scan.py)

Forward and backward on the same numbers, in turn, in one process; medians of seven after two to
warm up. On a GPU a copy of the same bytes is measured as well: the scan reads each input once and
writes each state once, and so cannot be faster.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from plain import recursive_scan
from torch import Tensor

from lrurec_dist.model import scan
from lrurec_dist.model.process import arrange_cpu
from lrurec_dist.model.scan import FORMS, best_form, parallel_scan
from lrurec_dist.reporting import format_table, say

RUNS = 7
SHAPES = [(128, 256, 128), (128, 64, 128), (16, 1024, 128), (1, 8192, 128)]  # sequences, length, hidden
RADICES = [2, 4, 8, 16, 64, 256, 8192]


def planes(tensor: Tensor) -> Tensor:
    """A complex (..., hidden) as (rows, 2, hidden)."""
    return torch.stack([tensor.real, tensor.imag], dim=-2).detach().flatten(0, -3)


def in_turn(sides: dict[str, Callable[[], object]], device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of RUNS calls of each side."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(RUNS + 2):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if run > 1:
                times[name].append((time.perf_counter() - started) * 1e3)
    return times


def sides_at(shape: tuple[int, int, int], device: torch.device) -> dict[str, Callable[[], object]]:
    """The recursion under autograd, and every form there is on this device, at one shape."""
    sequences, length, hidden = shape
    torch.manual_seed(0)
    decay = torch.polar(torch.rand(hidden) * 0.19 + 0.8, torch.rand(hidden) * 6).to(device).requires_grad_()
    inputs = torch.randn(sequences, length, hidden, dtype=torch.complex64, device=device).requires_grad_()
    upstream = torch.randn_like(inputs)
    edges = torch.arange(0, sequences * length + 1, length, device=device)
    spans = torch.stack([edges[:-1], edges[1:]], dim=1)
    leaves = planes(decay[None])[0].requires_grad_(), planes(inputs).requires_grad_()
    gradient = planes(upstream)
    sides: dict[str, Callable[[], object]] = {
        "recursion, autograd": lambda: torch.autograd.grad(recursive_scan(decay, inputs), (decay, inputs), upstream)
    }
    for form in FORMS:
        if form in ("portable", best_form(device)):
            sides[form] = lambda form=form: torch.autograd.grad(parallel_scan(*leaves, spans, form=form), leaves, gradient)
    if device.type == "cuda":
        sides["copy of the same bytes"] = lambda: (leaves[1].detach().clone(), gradient.clone())
    return sides


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=["forms", "radix"], default="forms")
    what = parser.parse_args().what
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arrange_cpu()
    rows, figures = [], {}
    for shape in SHAPES:
        sides = sides_at(shape, device)
        if what == "radix":
            portable = sides["portable"]

            def at(radix: int, portable: Callable[[], object] = portable) -> Callable[[], object]:
                def run() -> None:
                    scan.RADIX = ((0, radix),)
                    portable()

                return run

            sides = {f"radix {radix}": at(radix) for radix in RADICES}
        times = in_turn(sides, device)
        base = next(iter(times.values()))
        for name, values in times.items():
            each = [mine / other for mine, other in zip(base, values, strict=True)]
            ratio = statistics.median(each)
            figures[f"{'x'.join(map(str, shape))} {name}"] = round(ratio, 3)
            rows.append(
                [str(shape), name, f"{statistics.median(values):.2f}", f"{ratio:.2f}", f"{min(each):.2f}–{max(each):.2f}"]
            )
    say(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; ratios to the first row of each shape")
    say(format_table(["sequences, length, hidden", "scan", "ms", "times faster", "spread"], rows))
    say(json.dumps(figures))


if __name__ == "__main__":
    main()
