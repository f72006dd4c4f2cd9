"""What a training step costs, predicted: seconds, memory and traffic for items x width x ranks.

    python benchmarks/cost_model.py             predictions against what runs here (two minutes)
    python benchmarks/cost_model.py cluster     the table for clusters of GPUs, from a data sheet; nothing is run

A machine is five rates. Here they are measured, on two losses, two encoders and a copy; steps of other shapes are
then predicted and measured. For the cluster they are shares of a GPU's data sheet: nothing of that table was run.
`sharded_table.py` counts the bytes that `traffic` states, and `scaling.py` those of a whole training.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lrurec_dist.model.loss import MIN_TARGETS, TILE_ELEMENTS, softmax_loss
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.model.process import arrange_cpu
from lrurec_dist.reporting import format_table, say
from lrurec_dist.train.optimizer import adamw

MEAN_LENGTH = 50  # real positions of a window
FLOAT = 4  # bytes
RUNS = 5


@dataclass(frozen=True)
class Work:
    """One rank's part of a step: `targets` of `positions` real positions; `negatives` 0 is the full softmax."""

    items: int
    dim: int
    positions: int
    targets: int
    ranks: int = 1
    blocks: int = 2
    negatives: int = 0
    sharded: bool = False
    zero_stage: int = 0

    @property
    def hidden(self) -> int:
        """Width of the recurrent state."""
        return 2 * self.dim

    @property
    def rows(self) -> int:
        """Rows of the item table that this rank holds."""
        return -(-(self.items + 1) // self.ranks) if self.sharded else self.items + 1

    @property
    def encoder_parameters(self) -> int:
        """All but the item table: projections, recurrence, feed-forward, norms."""
        dim, hidden = self.dim, self.hidden
        recurrent = 2 * hidden * (dim + 1) + dim * (2 * hidden + 1) + 3 * hidden + 2 * dim
        return self.blocks * (recurrent + 4 * dim * (2 * dim + 1) + dim + 2 * dim) + 2 * dim


@dataclass(frozen=True)
class Machine:
    """Rates of one rank. `score_s`: for a score beside its products, `position_s`: for a position and unit of width."""

    flops: float  # products, per second
    score_s: float
    position_s: float
    bandwidth: float  # bytes of memory per second
    network: float  # bytes a rank sends per second
    fixed_s: float = 0.0  # a step's kernels and exchanges, whatever their size


def seconds(work: Work, machine: Machine) -> dict[str, float]:
    """Seconds of a step by part; exchanges are not hidden behind anything."""
    dim, hidden = work.dim, work.hidden
    weights = work.blocks * (2 * dim * hidden + 2 * hidden * dim + 8 * dim * dim)
    encoder = work.positions * (6 * weights / machine.flops + work.blocks * dim * machine.position_s)
    # every rank scores its rows for the targets of all; without shards, all rows for its own
    classes = work.negatives + 1 if work.negatives else work.rows
    targets = work.targets * (work.ranks if work.sharded and not work.negatives else 1)
    one_tile = MIN_TARGETS * classes <= 2 * TILE_ELEMENTS  # else scores are made twice
    products = 6 if one_tile else 8
    loss = targets * classes * (products * dim / machine.flops + machine.score_s * (1 if one_tile else 2))
    # AdamW passes a parameter's numbers 9 times with the zeroing of the gradient; making, scaling, adding up and clipping that,
    # as often again
    stepped = work.encoder_parameters + (touched_rows(work) if work.sharded and work.negatives else work.rows) * (dim + 1)
    return {
        "encoder": encoder,
        "loss": loss,
        "optimizer": 18 * FLOAT * stepped / machine.bandwidth,
        "exchange": traffic(work) / machine.network if work.ranks > 1 else 0.0,
        "fixed": machine.fixed_s,
    }


def touched_rows(work: Work) -> float:
    """Rows a sampled loss changes on this rank, if every position and target is another item."""
    return min(work.rows, work.positions + work.targets + work.negatives)


def memory(work: Work) -> float:
    """Bytes a rank holds in training: parameters, gradients, two moments; activations; the loss's tiles and vectors."""
    parameters = 4 * FLOAT * (work.encoder_parameters + work.rows * (work.dim + 1))
    # per block and position: what projections, scan, feed-forward and norms keep for the way back
    activations = FLOAT * work.positions * work.blocks * (4 * work.hidden + 8 * work.dim + 6 * work.dim)
    targets = work.targets * (work.ranks if work.sharded and not work.negatives else 1)
    return parameters + activations + 3 * FLOAT * TILE_ELEMENTS + 3 * FLOAT * targets * work.dim


def traffic(work: Work) -> float:
    """Bytes a rank sends in a step: ring reductions of dense gradients, and for a sharded table its lookups and loss."""
    others, away = work.ranks - 1, (work.ranks - 1) / work.ranks
    # from ZeRO 1 on, parameters that one rank has stepped go to all
    dense_passes = 2 if work.zero_stage == 0 else 3
    if not work.sharded:
        return dense_passes * FLOAT * away * (work.encoder_parameters + (work.items + 1) * (work.dim + 1))
    dense = dense_passes * FLOAT * away * work.encoder_parameters
    lookup = lookup_bytes(work.positions, work.dim, work.ranks)
    if work.negatives:
        return dense + lookup + lookup_bytes(work.negatives + work.targets, work.dim + 1, work.ranks)
    return dense + lookup + softmax_bytes(work.targets, work.dim, others) + 3 * FLOAT * work.targets * work.ranks * 2 * away


def lookup_bytes(ids: int, width: int, ranks: int) -> float:
    """Bytes a rank sends for a lookup of distinct ids: counts, ids to the owners, rows back and their gradients to them."""
    return 8 * (ranks - 1) + ids * (8 + 2 * width * FLOAT) * (ranks - 1) / ranks


def softmax_bytes(targets: int, dim: int, others: int) -> float:
    """Bytes a rank sends for the full softmax over shards: vectors, targets and factors to all, gradients of vectors back."""
    return 8 * others + targets * (2 * dim * FLOAT + 8 + FLOAT) * others


def measured(action: Callable[[], object]) -> float:
    """Least seconds of an action, after two to warm up: what it takes when nothing else runs."""
    action()
    action()
    taken = []
    for _ in range(RUNS):
        started = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started)
    return min(taken)


def step_of(work: Work) -> Callable[[], object]:
    """A training step of a shape, as a bare loop over the package's model, loss and optimizer."""
    torch.manual_seed(0)
    model = LRURec(num_items=work.items, dim=work.dim, hidden=work.hidden, blocks=work.blocks, dropout=0.2)
    optimizer = adamw([{"params": list(model.parameters()), "weight_decay": 0.01}], learning_rate=1e-3, epsilon=1e-9)
    rows = work.positions // MEAN_LENGTH
    ids = torch.randint(1, work.items + 1, (rows, MEAN_LENGTH))
    targets = torch.randint(1, work.items + 1, (work.targets,))
    keep = torch.ones_like(ids, dtype=torch.bool)

    def step() -> None:
        vectors = model(ids, keep)[: work.targets]
        total, count = softmax_loss(vectors, model.table.weight, model.table.bias, targets, include_padding_class=True)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def optimizer_bandwidth() -> float:
    """Bytes per second of an AdamW step over many parameters."""
    values = torch.nn.Parameter(torch.zeros(20_000_000))
    values.grad = torch.zeros_like(values)
    optimizer = adamw([{"params": [values], "weight_decay": 0.01}], learning_rate=1e-3, epsilon=1e-9)
    return 9 * FLOAT * values.numel() / measured(lambda: (optimizer.step(), optimizer.zero_grad(set_to_none=False)))


def calibrate() -> Machine:
    """This machine's rates: two losses that differ in width, two encoders that differ in positions, one optimizer."""
    items, targets = 150_000, 896

    def loss_of(dim: int) -> Callable[[], object]:
        weight = torch.randn(items, dim).mul_(0.02).requires_grad_()
        bias, vectors = torch.zeros(items, requires_grad=True), torch.randn(targets, dim, requires_grad=True)
        wanted = torch.randint(1, items, (targets,))
        return lambda: softmax_loss(vectors, weight, bias, wanted, include_padding_class=True)

    narrow, wide = (measured(loss_of(dim)) / (targets * items) for dim in (32, 128))
    flops = 8 * (128 - 32) / (wide - narrow)
    score_s = max(0.0, (narrow - 8 * 32 / flops) / 2)
    plain = Machine(flops, score_s, 0.0, optimizer_bandwidth(), network=1.0)
    few, many = Work(2_000, 64, 1_000, 500), Work(2_000, 64, 8_000, 500)
    taken = [measured(step_of(work)) - sum(seconds(work, plain).values()) for work in (few, many)]
    position_s = max(0.0, (taken[1] - taken[0]) / (many.positions - few.positions) / (many.blocks * many.dim))
    return replace(plain, position_s=position_s, fixed_s=max(0.0, taken[0] - few.positions * few.blocks * few.dim * position_s))


def against_here() -> None:
    """Calibrate, predict, measure, and print how far apart they are."""
    arrange_cpu()
    machine = calibrate()
    works = [
        Work(3_416, 64, 12_800, 12_800),
        Work(23_715, 64, 900, 900),
        Work(100_000, 64, 2_000, 1_000),
        Work(300_000, 64, 1_000, 900),
        Work(30_000, 128, 4_000, 2_000),
        Work(1_000_000, 32, 1_000, 500),
    ]
    rows, errors = [], []
    for work in works:
        gc.collect()
        parts = seconds(work, machine)
        predicted, found = sum(parts.values()), measured(step_of(work))
        errors.append(predicted / found - 1)
        shape = [f"{work.items:,}", str(work.dim), f"{work.positions:,}", f"{work.targets:,}"]
        shares = ", ".join(f"{name} {part / predicted:.0%}" for name, part in parts.items() if part)
        rows.append([*shape, f"{predicted * 1e3:.0f}", f"{found * 1e3:.0f}", f"{errors[-1]:+.0%}", shares])
    say(f"one process, {torch.get_num_threads()} threads, torch {torch.__version__}: {machine.flops / 1e9:.0f} GF/s,")
    say(f"{machine.score_s * 1e12:.0f} ps a score, {machine.bandwidth / 1e9:.1f} GB/s, {machine.fixed_s * 1e3:.1f} ms a step")
    say(format_table(["items", "width", "positions", "targets", "predicted, ms", "measured, ms", "error", "parts"], rows))
    figures = {"errors": [round(error, 3) for error in errors], "machine": machine.__dict__}
    say(json.dumps(figures))


# A GPU of 989 TF/s (bfloat16), 4.8 TB/s and 141 GB with a 50 GB/s network port, and the shares of them that are assumed:
# 0.4 of the products, 0.6 of the memory's and of the network's rate. A score passes memory twice in 4 and once in 2 bytes.
GPU = Machine(0.4 * 989e12, 10 / (0.6 * 4.8e12), 40 / (0.6 * 4.8e12), 0.6 * 4.8e12, 0.6 * 50e9, fixed_s=2e-3)
GPU_BYTES = 141e9
EVENTS = 10e9
POSITIONS = 32_768  # a rank and step


def for_clusters() -> None:
    """Print the table for 10 B events, 1 M to 100 M items, 8 to 512 GPUs."""
    rows, figures = [], []
    for items in (10**6, 10**7, 10**8):
        for ranks in (8, 64, 512):
            for negatives in (0, 8_192):
                options = [
                    Work(items, 128, POSITIONS, POSITIONS, ranks, negatives=negatives, sharded=sharded)
                    for sharded in (False, True)
                ]
                fitting = [work for work in options if memory(work) < 0.9 * GPU_BYTES]
                best = min(fitting or options[1:], key=lambda work: sum(seconds(work, GPU).values()))
                total, held = sum(seconds(best, GPU).values()), memory(best)
                hours = EVENTS / (best.targets * ranks) * total / 3600
                figure = {
                    "items": items,
                    "gpus": ranks,
                    "loss": f"{negatives:,} negatives" if negatives else "full",
                    "table": "sharded" if best.sharded else "replicated",
                    "step_ms": round(total * 1e3, 1),
                    "gb": round(held / 1e9, 1),
                    "sent_mb": round(traffic(best) / 1e6, 1),
                    "epoch_h": float(f"{hours:.2g}"),
                }
                figures.append(figure)
                note = "" if held < GPU_BYTES else " (does not fit)"
                cells = [f"{value:,}" if isinstance(value, int | float) else value for value in figure.values()]
                rows.append([*cells[:5], cells[5] + note, *cells[6:]])
    say(f"10 B events, width 128, {POSITIONS:,} positions and targets a GPU and step; a model of a data sheet, not a measurement")
    header = ["items", "GPUs", "loss", "table", "step, ms", "memory a GPU, GB", "sent a GPU and step, MB", "hours an epoch"]
    say(format_table(header, rows))
    say(json.dumps(figures))


def main() -> None:
    """Print one of the two tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("of", nargs="?", choices=["here", "cluster"], default="here")
    if parser.parse_args().of == "here":
        against_here()
    else:
        for_clusters()


if __name__ == "__main__":
    main()
