"""A whole training step, and the scan, against a plain implementation of the paper.

    python benchmarks/step.py [work ...]      (default: everything; three minutes on two cores)

Batch, machine and run are the same. Each side has a process of its own and they take turns, step by
step; medians of five after two to warm up; forward, backward, clipping and AdamW included. The
plain side runs as its user would run it. How much of the ratio is the allocator setting that our
workers make (model/process.py) is seen beside it: "same settings" gives the setting to the plain
side as well. Lengths and ids are synthetic draws of the stated shapes. Before anything is timed,
both sides are given the same weights and have to give the same loss. Memory is the growth of the
peak resident set over a first step.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from plain import PlainLRURec, recursive_scan
from torch import Tensor

from lrurec_dist.model.loss import softmax_loss
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.model.original import from_original
from lrurec_dist.model.process import arrange_cpu
from lrurec_dist.model.scan import best_form, parallel_scan
from lrurec_dist.reporting import format_table, say
from lrurec_dist.train.optimizer import adamw

RUNS = 5
SCAN = (128, 256, 128)


@dataclass(frozen=True)
class Shape:
    """A batch as one data set gives it."""

    batch: int
    max_length: int
    mean_length: float
    num_items: int
    dropout: float = 0.2


SHAPES = {
    "ml_1m": Shape(128, 200, 121, 3_416),
    "video": Shape(128, 50, 7, 23_715, dropout=0.6),
    "beauty": Shape(128, 50, 5.6, 57_289, dropout=0.6),
}
COMPUTE = ("float32", "bfloat16")


def draw_batch(shape: Shape) -> tuple[Tensor, Tensor]:
    """Left-padded item_ids and targets (batch, max_length); lengths cut at max_length keep the stated mean."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(shape.batch, generator=generator).mul(0.9).exp()
    low, high = 0.0, 100.0 * shape.max_length
    for _ in range(60):  # the scale at which the clipped lengths have the mean asked for
        scale = (low + high) / 2
        lengths = (spread * scale).round().clamp(1, shape.max_length)
        low, high = (scale, high) if float(lengths.mean()) < shape.mean_length else (low, scale)
    items = torch.randint(1, shape.num_items + 1, (shape.batch, shape.max_length + 1), generator=generator)
    keep = torch.arange(shape.max_length) >= shape.max_length - lengths[:, None]
    return items[:, :-1] * keep, items[:, 1:] * keep


def plain_step(shape: Shape, item_ids: Tensor, targets: Tensor) -> tuple[PlainLRURec, Callable[[], float]]:
    """The baseline and a function that trains it by one step and returns the loss."""
    torch.manual_seed(0)
    model = PlainLRURec(shape.num_items, dropout=shape.dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-9, weight_decay=0.01)

    return model, lambda: update(model, optimizer, model.loss(item_ids, targets))


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """Backward pass, clipping and optimizer, the same for both sides; returns the loss."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def our_step(shape: Shape, item_ids: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[LRURec, Callable[[], float]]:
    """The same for this package: a bare loop over its model, loss and optimizer."""
    torch.manual_seed(0)
    compute = None if dtype == torch.float32 else dtype
    model = LRURec(num_items=shape.num_items, dim=64, hidden=128, blocks=2, dropout=shape.dropout, compute_dtype=compute)
    optimizer = adamw([{"params": list(model.parameters()), "weight_decay": 0.01}], learning_rate=1e-3, epsilon=1e-9)
    keep = targets > 0

    def step() -> float:
        table = model.table
        total, count = softmax_loss(
            model(item_ids, keep), table.weight, table.bias, targets[keep], include_padding_class=True, product_dtype=compute
        )
        return update(model, optimizer, total / count)

    return model, step


def agree(shape: Shape, item_ids: Tensor, targets: Tensor, dtype: torch.dtype) -> None:
    """Stop unless both sides give the same loss for the same weights."""
    plain, _ = plain_step(shape, item_ids[:16], targets[:16])
    ours, step = our_step(shape, item_ids[:16], targets[:16], dtype)
    ours.load_state_dict(from_original(plain.state_dict()))
    expected, found = plain.eval().loss(item_ids[:16], targets[:16]).item(), (ours.eval(), step())[1]
    if abs(found - expected) > (1e-5 if dtype == torch.float32 else 2e-3) * expected:
        sys.exit(f"the two sides do not compute the same loss: {found} and {expected}")


class Side:
    """One side in its own process; `step()` runs one step there and returns its milliseconds."""

    def __init__(self, work: str, side: str, keep_memory: bool) -> None:
        command = [sys.executable, __file__, "--serve", work, side, str(int(keep_memory))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603

    def step(self) -> float:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def peak_growth(self) -> float:
        """MiB by which a first step raises the peak resident set."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("memory\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def serve(work: str, side: str, keep_memory: bool) -> None:
    """The other end of `Side`: one line of answer for each line asked."""
    if keep_memory:
        arrange_cpu()
    if work == "scan":
        step: Callable[[], object] = scan_sides()[side != "plain"]
    else:
        shape = SHAPES[work]
        batch = draw_batch(shape)
        step = plain_step(shape, *batch)[1] if side == "plain" else our_step(shape, *batch, getattr(torch, side))[1]
    before = _status("VmRSS")
    for question in sys.stdin:
        started = time.perf_counter()
        step()
        taken = (time.perf_counter() - started) * 1e3
        say(str(taken if question.strip() == "step" else (_status("VmHWM") - before) / 1024))


def in_turn(work: str, sides: list[tuple[str, bool]]) -> list[list[float]]:
    """Milliseconds of RUNS steps of each (side, keep memory), taken in turn after two to warm up."""
    processes = [Side(work, side, keep) for side, keep in sides]
    rounds = [[process.step() for process in processes] for _ in range(RUNS + 2)]
    for process in processes:
        process.close()
    return [list(times) for times in zip(*rounds[2:], strict=True)]


def scan_sides() -> list[Callable[[], object]]:
    """Forward and backward of the recursion under autograd and of the package's scan, on the same numbers."""
    batch, length, hidden = SCAN
    torch.manual_seed(0)
    decay = torch.polar(torch.rand(hidden) * 0.19 + 0.8, torch.rand(hidden) * 6).requires_grad_()
    inputs = torch.randn(batch, length, hidden, dtype=torch.complex64, requires_grad=True)
    upstream = torch.randn_like(inputs)

    def planes(tensor: Tensor) -> Tensor:
        return torch.stack([tensor.real, tensor.imag], dim=-2).detach().flatten(0, -3)

    our_decay, our_inputs = planes(decay[None]).squeeze(0).requires_grad_(), planes(inputs).requires_grad_()
    our_upstream, edges = planes(upstream), torch.arange(0, batch * length + 1, length)
    spans = torch.stack([edges[:-1], edges[1:]], dim=1)
    torch.testing.assert_close(
        parallel_scan(our_decay, our_inputs, spans), planes(recursive_scan(decay, inputs)), rtol=1e-3, atol=1e-3
    )
    return [
        lambda: torch.autograd.grad(recursive_scan(decay, inputs), (decay, inputs), upstream),
        lambda: torch.autograd.grad(parallel_scan(our_decay, our_inputs, spans), (our_decay, our_inputs), our_upstream),
    ]


def _status(name: str) -> int:
    """KiB of one line of /proc/self/status; unlike getrusage's peak, not inherited from the parent."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    keys = ["scan", *(f"{name}_{kind}" for name in SHAPES for kind in COMPUTE), "beauty_memory"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", nargs="*", help=f"of: {' '.join(keys)}")
    parser.add_argument("--serve", nargs=3, metavar=("WORK", "SIDE", "KEEP"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve[0], arguments.serve[1], arguments.serve[2] == "1")
        return
    asked = arguments.work or keys
    if odd := sorted(set(asked) - set(keys)):
        parser.error(f"unknown work {' '.join(odd)}; there is {' '.join(keys)}")
    rows, figures = [], {}

    def note(key: str, what: str, plain: list[float], same: list[float], ours: list[float], unit: str) -> None:
        each = [base / mine for base, mine in zip(plain, ours, strict=True)]
        fair = statistics.median(base / mine for base, mine in zip(same, ours, strict=True))
        figures[key], figures[f"{key}_same_settings"] = round(statistics.median(each), 3), round(fair, 3)
        medians = [f"{statistics.median(side):.1f}" for side in (plain, same, ours)]
        rows.append([key, what, *medians, unit, f"{figures[key]:.1f}", f"{min(each):.1f}–{max(each):.1f}", f"{fair:.1f}"])

    plain_sides = [("plain", False), ("plain", True)]
    if "scan" in asked:
        note("scan", f"{SCAN} complex, {best_form(torch.device('cpu'))}", *in_turn("scan", [*plain_sides, ("ours", True)]), "ms")
    for name, shape in SHAPES.items():
        kinds = [kind for kind in COMPUTE if f"{name}_{kind}" in asked]
        if not kinds:
            continue
        batch = draw_batch(shape)
        for kind in kinds:
            agree(shape, *batch, getattr(torch, kind))
        real = int((batch[1] > 0).sum())
        plain, same, *ours = in_turn(name, [*plain_sides, *((kind, True) for kind in kinds)])
        for kind, times in zip(kinds, ours, strict=True):
            what = f"{shape.batch} x {shape.max_length}, {real:,} targets, {shape.num_items:,} items"
            note(f"{name}_{kind}", what, plain, same, times, "ms")
    if "beauty_memory" in asked:
        sides = [Side("beauty", *side) for side in [*plain_sides, ("float32", True)]]
        note("beauty_memory", "peak of a step", *([side.peak_growth()] for side in sides), "MiB")
        for side in sides:
            side.close()
    say(f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    say(format_table(["work", "shape", "plain", "same settings", "ours", "", "ratio", "spread", "same settings"], rows))
    say(json.dumps(figures))


if __name__ == "__main__":
    main()
