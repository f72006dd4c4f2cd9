"""One more event and the ten best items, from a state, against encoding the history again, with LRURec and with a Transformer.

    python benchmarks/serving.py [ITEMS …] [--seconds 4] [--threads 1] [--processor-time]

One user at a time, one request after the other, dim 64, two blocks. Sides take turns of a twentieth of a second, so that
what else the machine does meets all of them; a side's figures are of all its requests. On a machine that others use,
`--processor-time` takes one thread and counts its time alone. *step* carries a state; *encode again*
runs LRURec, and *Transformer* a SASRec-shaped one (two causal blocks, two heads, feed-forward as wide inside as LRURec's,
the vector of the last position), over the whole history. All are ranked by the same exact top-k, the one that a `Recommender` takes
for a single user; *model* is without it. *torch.topk* is the Transformer with the list that it would have without this package: all
scores by one product, and `torch.topk`.
"""

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lrurec_dist.evaluate.ranking import top_k
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.model.process import arrange_cpu
from lrurec_dist.model.shortlist import Shortlist
from lrurec_dist.model.stepping import Stepper
from lrurec_dist.reporting import format_table, say

DIM, HIDDEN, BLOCKS, HEADS, K = 64, 128, 2, 2, 10
LENGTHS = (50, 500, 5000)
SIDES = ("step", "encode again", "Transformer", "Transformer, torch.topk")
TURNS, TURN_S = 5, 0.05  # at least so many turns, of so many seconds or one request


class Transformer(nn.Module):
    """SASRec's shape: item rows plus positions, causal blocks, the vector of the last position."""

    def __init__(self, table: Tensor, length: int) -> None:
        super().__init__()
        self.table, self.positions = table, nn.Parameter(torch.randn(length, DIM) * 0.02)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, dropout=0.0, activation="gelu", batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)
        self.mask = nn.Transformer.generate_square_subsequent_mask(length)

    def encode(self, item_ids: Tensor) -> Tensor:
        """(users, dim) for full histories (users, length)."""
        x = nn.functional.embedding(item_ids, self.table) + self.positions
        last: Tensor = self.blocks(x, mask=self.mask, is_causal=True)[:, -1]
        return last


def sides_of(model: LRURec, length: int) -> dict[str, Callable[[], Tensor]]:
    """What each side does after an event, up to the user vector (1, dim)."""
    history = torch.randint(1, model.table.num_items + 1, (1, length), generator=torch.Generator().manual_seed(length))
    stepper, transformer = Stepper(model), Transformer(model.table.weight, length).eval()
    carried = [model.step(history[0, -1:], model.init_state(1))[1].transpose(0, 1).contiguous()]

    def step() -> Tensor:
        vector, carried[0] = stepper.step(history[:, -1], carried[0])
        return vector

    return {
        "step": step,
        "encode again": lambda: model.encode(history),
        "Transformer": lambda: transformer.encode(history),
    }


def ranking_of(model: LRURec) -> Callable[[Tensor], object]:
    """The best items for one user."""
    weight, bias, none = model.item_rows(), model.table.bias, torch.empty(0, dtype=torch.int64)
    if Shortlist.usable(weight):
        shortlist = Shortlist(weight, bias)
        return lambda vector: shortlist.top_k(vector, K, [[]])
    return lambda vector: top_k(vector, weight, bias, K, none, none)


def measure(model: LRURec, length: int, seconds: float, clock: Callable[[], float]) -> dict[tuple[str, str], list[float]]:
    """Seconds of each request, by side and by what is timed: the model, or the model and the ranking."""
    best = ranking_of(model)
    taken: dict[tuple[str, str], list[float]] = {}
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for side, run in sides_of(model, length).items():
        calls[side, "model"] = run
        calls[side, "with top-k"] = functools.partial(lambda run: best(run()), run)
    weight, bias, transformer = model.item_rows(), model.table.bias, calls["Transformer", "model"]
    calls["Transformer, torch.topk", "with top-k"] = lambda: torch.topk(transformer() @ weight.T + bias, K)
    started, turn = time.perf_counter(), 0
    while turn <= TURNS or time.perf_counter() - started < seconds:
        for name, call in calls.items():
            ends = time.perf_counter() + TURN_S
            times = taken.setdefault(name, []) if turn else []  # the first turn warms up
            while not times or time.perf_counter() < ends:
                begun = clock()
                call()
                times.append(clock() - begun)
        turn += 1
    return taken


def build_model(items: int) -> LRURec:
    """Weights as before training: times do not depend on them."""
    torch.manual_seed(0)
    model = LRURec(num_items=items, dim=DIM, hidden=HIDDEN, blocks=BLOCKS, dropout=0.0)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def main() -> None:
    """Measure, print a table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("items", nargs="*", type=int)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each length and catalogue")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processor-time", action="store_true", help="of one thread")
    arguments = parser.parse_args()
    arrange_cpu()
    torch.set_num_threads(1 if arguments.processor_time else arguments.threads)
    clock = time.process_time if arguments.processor_time else time.perf_counter
    rows, figures = [], {}
    for items in arguments.items or [57_000, 1_000_000]:
        model = build_model(items)
        for length in LENGTHS:
            taken = measure(model, length, arguments.seconds, clock)
            for what in ("model", "with top-k"):
                step = statistics.median(taken["step", what])
                for side in SIDES:
                    if (side, what) not in taken:
                        continue
                    times = sorted(taken[side, what])
                    middle, late = statistics.median(times), times[math.ceil(0.99 * len(times)) - 1]
                    figure = {
                        "p50_us": round(middle * 1e6, 1),
                        "p99_us": round(late * 1e6, 1),
                        "requests_per_s": round(len(times) / sum(times), 1),
                        "times_the_step": round(middle / step, 2),
                        "requests": len(times),
                    }
                    figures[f"{items} {length} {side}, {what}"] = figure
                    rows.append([f"{items:,}", f"{length:,}", what, side, *(f"{value:,}" for value in figure.values())])
    say(f"{torch.get_num_threads()} thread(s), dim {DIM}, hidden {HIDDEN}, {BLOCKS} blocks, top {K}, torch {torch.__version__}")
    say(format_table(["items", "history", "timed", "side", "p50, us", "p99, us", "requests/s", "of the step", "requests"], rows))
    say(json.dumps(figures))


if __name__ == "__main__":
    main()
