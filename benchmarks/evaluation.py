"""Exact ranking by size of the catalogue: target ranks and lists against sorting, FAISS and the product alone.

    python benchmarks/evaluation.py [--processor-time] [items ...]      (default: 57289 1000000)

256 users of width 64 with 50 items of history each, two threads. *product* multiplies users with tiles of the table and
does nothing with the scores, in the fastest of four widths of tile. *argsort* sorts the full matrix of scores, as the public
code of the paper does (of 16 users at a time above 100,000 items). FAISS is its flat index by inner product, which knows
neither biases nor histories, with 2048 users at a time: of 1024 each takes three times as long (`pip install -e '.[bench]'`).
Sides take turns, and a ratio is that of one turn. Memory is the growth of the peak resident set over one call, each in a
process of its own; FAISS' own copy of the table is not in it. On a machine that others use, `--processor-time` takes one
thread and counts its time alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import torch
from torch import Tensor

from lrurec_dist.evaluate.ranking import target_ranks, top_k
from lrurec_dist.model.process import arrange_cpu
from lrurec_dist.reporting import format_table, say

USERS, DIM, HISTORY, THREADS, TURNS = 256, 64, 50, 2, 9
FAISS_USERS = 2048
SLOW_TURNS = 3  # of argsort and FAISS, which need none to warm up
SORTED_TOGETHER_UP_TO = 100_000
WIDTHS = (4096, 16384, 65536, 1 << 20)  # of the product's tiles
SIDES = ("product", "argsort", "ranks", "ranks, bfloat16", "top 10", "top 100", "FAISS 10", "FAISS 100")
BASELINES = {
    "ranks": ("product", "argsort"),
    "ranks, bfloat16": ("product",),
    "top 10": ("product", "FAISS 10"),
    "top 100": ("product", "FAISS 100"),
}


def inputs_of(items: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Vectors, rows, biases, targets, and the excluded pairs: distinct, in the order of users and items."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(USERS, DIM, generator=generator)
    weight, bias = torch.randn(items + 1, DIM, generator=generator), torch.randn(items + 1, generator=generator)
    targets = torch.randint(1, items + 1, (USERS,), generator=generator)
    histories = torch.randint(1, items + 1, (USERS, HISTORY), generator=generator)
    histories = torch.where(histories == targets[:, None], histories % items + 1, histories)
    pairs = (torch.arange(USERS)[:, None] * (items + 1) + histories).unique()
    return vectors, weight, bias, targets, pairs // (items + 1), pairs % (items + 1)


def call(side: str, items: int) -> tuple[Callable[[], object], int]:
    """A function that does the work of a side, and for how many users."""
    vectors, weight, bias, targets, rows, ids = inputs_of(items)
    if side.startswith("FAISS"):
        index, k = faiss.IndexFlatIP(DIM), int(side.split()[1])
        index.add(weight[1:].numpy())
        queries = vectors.repeat(FAISS_USERS // USERS, 1).numpy()
        return lambda: index.search(queries, k), FAISS_USERS
    if side.startswith("top"):
        k = int(side.split()[1])
        return lambda: top_k(vectors, weight, bias, k, rows, ids), USERS
    if side.startswith("ranks"):
        table = weight.bfloat16() if "bfloat16" in side else weight
        return lambda: target_ranks(vectors, table, bias, targets, rows, ids), USERS
    if side == "argsort":
        few = USERS if items <= SORTED_TOGETHER_UP_TO else 16
        return lambda: torch.addmm(bias, vectors[:few], weight.T).neg_().argsort(dim=1), few
    assert side == "product"
    return min((_product(vectors, weight, min(width, items + 1)) for width in WIDTHS), key=_seconds), USERS


def _product(vectors: Tensor, weight: Tensor, width: int) -> Callable[[], None]:
    tile = torch.empty(USERS * width)

    def run() -> None:
        for rows in weight.split(width):
            torch.mm(vectors, rows.T, out=tile[: USERS * len(rows)].view(USERS, len(rows)))

    return run


def _seconds(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def extra_peak(side: str, items: int) -> float:
    """MiB over one call, in a process of its own."""
    done = subprocess.run(  # noqa: S603
        [sys.executable, __file__, "--peak", side, str(items)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def print_extra_peak(side: str, items: int) -> None:
    """The other end of `extra_peak`."""
    arrange(THREADS)
    call(side, 1000)[0]()  # libraries, threads and kernels are there now
    run, _ = call(side, items)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is there now
    before = _status("VmHWM")
    run()
    say(str((_status("VmHWM") - before) / 1024))


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def arrange(threads: int) -> None:
    """The settings of a process that ranks."""
    arrange_cpu()
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("items", nargs="*", type=int)
    parser.add_argument("--processor-time", action="store_true", help="of one thread")
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "ITEMS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print_extra_peak(arguments.peak[0], int(arguments.peak[1]))
        return
    arrange(1 if arguments.processor_time else THREADS)
    clock = time.process_time if arguments.processor_time else time.perf_counter
    rows, figures = [], {}
    for items in arguments.items or [57_289, 1_000_000]:
        calls = {side: call(side, items) for side in SIDES}
        taken: dict[str, list[float]] = {side: [] for side in SIDES}  # seconds a user
        for turn in range(TURNS + 1):
            for side, (run, users) in calls.items():
                if side.startswith(("argsort", "FAISS")) and not 0 < turn <= SLOW_TURNS:
                    continue
                started = clock()
                run()
                if turn:
                    taken[side].append((clock() - started) / users)
        del calls
        for side in SIDES:
            figure = {"users_per_s": round(1 / statistics.median(taken[side])), "extra_mib": round(extra_peak(side, items), 1)}
            ratios = {}
            for baseline in BASELINES.get(side, ()):
                found = [theirs / ours for ours, theirs in zip(taken[side], taken[baseline], strict=False)]
                ratios[baseline] = [round(value, 2) for value in (statistics.median(found), min(found), max(found))]
            figures[f"{items} {side}"] = {**figure, "times_as_fast_as": ratios}
            spread = "; ".join(f"{middle:.2f} ({low:.2f}–{high:.2f}) of {name}" for name, (middle, low, high) in ratios.items())
            rows.append([f"{items:,}", side, f"{figure['users_per_s']:,}", f"{figure['extra_mib']:.1f}", spread or "–"])
    say(f"{USERS} users, width {DIM}, {HISTORY} items of history, {torch.get_num_threads()} threads, torch {torch.__version__}")
    say(format_table(["items", "side", "users/s", "extra peak, MiB", "speed, median of turns (spread)"], rows))
    say(json.dumps(figures))


if __name__ == "__main__":
    main()
