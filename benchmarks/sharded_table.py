"""The sharded item table by number of ranks: memory, bytes exchanged, and time of a step.

    python benchmarks/sharded_table.py [items] [--ranks 1 2 4]      (default: 5000000 items, 1, 2 and 4 ranks)

A step is a lookup of the inputs, a loss for as many targets, and an optimizer step of the rows, 64 wide: the full softmax with
AdamW, or the sampled one (4,096 negatives) with lazy Adam. The global batch stays the same however many ranks share it.
Ranks are processes on this machine with gloo between them, so times say what the exchange costs here, not what a network costs.
Memory is the growth of the peak resident set over the construction and the steps. Bytes are what one rank sends to others,
counted where tensors enter torch.distributed (a reduction counts as a ring's), beside the formula.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lrurec_dist.model.sampling import NegativeSampler
from lrurec_dist.model.sharded_loss import sharded_sampled_softmax_loss, sharded_softmax_loss
from lrurec_dist.model.sharded_table import ShardedItemTable
from lrurec_dist.reporting import format_table, say
from lrurec_dist.train.row_optimizer import row_optimizer

DIM, TARGETS, NEGATIVES, STEPS = 64, 896, 4_096, 3
KINDS = {"full softmax, adamw": "adamw", "sampled, lazy_adam": "lazy_adam"}


class Counter:
    """Bytes this rank sends to others, from the tensors that enter torch.distributed."""

    def __init__(self, ranks: int, rank: int) -> None:
        self.sent = 0.0
        others = ranks - 1

        def all_to_all(_: Any, rows: torch.Tensor, __: Any, sent: list[int]) -> float:
            return rows.nbytes * (1 - sent[rank] / max(1, sum(sent)))

        self._wrap("all_to_all_single", all_to_all)
        self._wrap("all_gather_single", lambda _, rows: rows.nbytes * others)
        self._wrap("reduce_scatter_single", lambda _, rows: rows.nbytes * others / ranks)
        self._wrap("all_reduce", lambda tensor: 2 * tensor.nbytes * others / ranks)

    def _wrap(self, name: str, size: Callable[..., float]) -> None:
        plain = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.sent += size(*args)
            return plain(*args, **kwargs)

        setattr(dist, name, counted)


def formula(kind: str, ranks: int, inputs: int, candidates: int, targets: int) -> float:
    """Bytes a rank sends to others in a step.

    inputs, candidates: distinct ids it looks up; targets: of each rank. On average a rank owns 1 / ranks of every kind of row.
    """
    away = (ranks - 1) / ranks
    counts = 8 * (ranks - 1)
    # ids to the owners; rows back from them, and gradients to them again: as many as others ask this rank for
    lookup = counts + inputs * (8 + 2 * DIM * 4) * away
    if kind == "lazy_adam":
        return lookup + counts + candidates * (8 + 2 * (DIM + 1) * 4) * away
    # vectors, targets and factors to everybody; gradients of vectors back; three reductions a target
    gathered = targets * (DIM * 4 + 8 + 4) * (ranks - 1)
    return lookup + counts + gathered + targets * DIM * 4 * (ranks - 1) + 3 * 4 * TARGETS * 2 * away


def serve(rank: int, ranks: int, items: int, label: str, rendezvous: str, results: Any) -> None:
    """One rank: builds the table, runs the steps, and reports."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
    kind = KINDS[label]
    generator = torch.Generator().manual_seed(rank)
    share = TARGETS // ranks
    draw = NegativeSampler(torch.zeros(items + 1), "uniform") if kind == "lazy_adam" else None
    before = _status("VmRSS")
    table = ShardedItemTable(items, DIM, seed=0)
    optimizer = row_optimizer(kind, table, learning_rate=1e-3, weight_decay=0.01, epsilon=1e-8)  # type: ignore[arg-type]
    held = sum(x.nbytes for x in (*table.parameters(), *optimizer.state().values()))
    counter = Counter(ranks, rank)
    times, sent, expected = [], [], []
    for step in range(STEPS + 1):
        ids, targets = (torch.randint(1, items + 1, (share,), generator=generator) for _ in range(2))
        negatives = None if draw is None else draw.draw(NEGATIVES, step)
        dist.barrier()
        counter.sent, started = 0.0, time.perf_counter()
        vectors = table(ids)
        if draw is None or negatives is None:
            total, _ = sharded_softmax_loss(vectors, table, targets, include_padding_class=True)
            candidates = 0
        else:
            total, _ = sharded_sampled_softmax_loss(vectors, table, targets, negatives, draw.log_probability)
            candidates = len(torch.cat([negatives, targets]).unique()) + 1
        optimizer.zero_grad()
        (total / TARGETS).backward()
        optimizer.step()
        if step:
            times.append((time.perf_counter() - started) * 1e3)
            sent.append(counter.sent)
            expected.append(formula(kind, ranks, len(ids.unique()), candidates, share))
    peak = _status("VmHWM") - before
    results.put((rank, held, peak, statistics.mean(sent), statistics.mean(expected), statistics.median(times)))
    dist.barrier()
    dist.destroy_process_group()


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(ranks: int, items: int, label: str) -> list[tuple[float, ...]]:
    """What each rank reports, in the order of ranks."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{Path(folder) / 'rendezvous'}"
        processes = [
            context.Process(target=serve, args=(rank, ranks, items, label, rendezvous, results)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            found = sorted(results.get(timeout=3600) for _ in processes)
        finally:
            for process in processes:
                process.join(timeout=30)
                process.kill()
    return found


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("items", nargs="?", type=int, default=5_000_000)
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2, 4])
    arguments = parser.parse_args()
    rows, figures = [], {}
    for label in KINDS:
        for ranks in arguments.ranks:
            _, held, peak, sent, expected, taken = zip(*measure(ranks, arguments.items, label), strict=True)
            mean_sent, mean_expected = statistics.mean(sent), statistics.mean(expected)
            figures[f"{label}, {ranks} ranks"] = {
                "held_mib": round(max(held) / 2**20, 1),
                "peak_mib": round(max(peak) / 2**20, 1),
                "sent_kib": round(mean_sent / 1024, 1),
                "formula_kib": round(mean_expected / 1024, 1),
                "ms": round(max(taken), 1),
            }
            rows.append([label, str(ranks), *(f"{value:,}" for value in figures[f"{label}, {ranks} ranks"].values())])
    say(f"{arguments.items:,} items, width {DIM}, {TARGETS} targets a step on all ranks together, one thread a rank")
    say(format_table(["step", "ranks", "held, MiB", "peak, MiB", "sent, KiB", "formula, KiB", "ms"], rows))
    say(json.dumps(figures))


if __name__ == "__main__":
    main()
