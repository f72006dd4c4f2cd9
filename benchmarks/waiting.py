"""What threads do while they wait for each other: a training step by how long they look before they sleep.

    python benchmarks/waiting.py

Steps of Video Games' shape in bfloat16 on all cores, once alone and once beside a process that takes one core. Each side has
a process of its own and they take turns, step by step; medians of nine after two to warm up. 300,000 is
what GNU's OpenMP takes by default, the package sets 10,000 (lrurec_dist/__init__.py).
"""

import json
import os
import statistics
import subprocess
import sys
from datetime import date

import torch
from step import Side

from lrurec_dist.reporting import format_table, say

LOOKS = (300_000, 20_000, 10_000, 5_000, 0)
RUNS, WARM_UP = 9, 2


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    sides = {}
    for looks in LOOKS:
        os.environ["GOMP_SPINCOUNT"] = str(looks)
        sides[looks] = Side("video", "bfloat16", keep_memory=True)
    times = {beside: {looks: [] for looks in LOOKS} for beside in ("alone", "beside a busy process")}
    for beside, of_sides in times.items():
        neighbour = None if beside == "alone" else subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            for run in range(RUNS + WARM_UP):
                for looks, side in sides.items():
                    taken = side.step()
                    if run >= WARM_UP:
                        of_sides[looks].append(taken)
        finally:
            if neighbour:
                neighbour.kill()
                neighbour.wait()
    for side in sides.values():
        side.close()
    rows = [
        [f"{looks:,}", *(cell for of_sides in times.values() for cell in _cells(of_sides[looks], of_sides[LOOKS[0]]))]
        for looks in LOOKS
    ]
    say(f"{date.today()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    say(format_table(["looks", "alone, ms", "spread", "of the default", "beside one, ms", "spread", "of the default"], rows))
    say(
        json.dumps(
            {beside: {looks: statistics.median(ms) for looks, ms in of_sides.items()} for beside, of_sides in times.items()}
        )
    )


def _cells(ms: list[float], default: list[float]) -> list[str]:
    middle = statistics.median(ms)
    return [f"{middle:.1f}", f"{min(ms):.1f}–{max(ms):.1f}", f"{middle / statistics.median(default):.2f}"]


if __name__ == "__main__":
    main()
