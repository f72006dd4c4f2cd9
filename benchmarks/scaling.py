"""A whole training on 1, 2 and 4 processes: time, bytes sent against the formula, checkpoint stall, and a lost worker.

    python benchmarks/scaling.py [--shape video|ml_1m] [--ranks 1 2 4] [--without-loss]

Each training is `torchrun` on a prepared synthetic dataset: the loop as it is, gloo between processes, one thread each. The
global batch is the same on any number of ranks, so a step computes the same. Bytes are what one rank sends, counted where
tensors enter torch.distributed (a reduction counts as a ring's), beside `cost_model.traffic`. Processes beyond the machine's cores
share them: their times say nothing about scaling, their bytes do. A checkpoint's stall is the time that training stood still for
it, against a step. At the end a worker of a training under Ray is killed, and the time to the next step counted.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from cost_model import FLOAT, Work, traffic

from lrurec_dist.config_file import load_config
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import StoppedError
from lrurec_dist.reporting import METRICS, MetricsFile, format_table, say

ROOT = Path(__file__).resolve().parent.parent
STEPS, FIRST, CHECKPOINTS = 60, 20, 20
SHAPES = {
    "video": [
        "synthetic.users=12000",
        "synthetic.items=23715",
        "synthetic.mean_length=9",
        "batch.max_length=50",
        "model.dropout=0.6",
    ],
    "ml_1m": [
        "synthetic.users=3000",
        "synthetic.items=3416",
        "synthetic.mean_length=120",
        "batch.max_length=200",
        "model.dropout=0.2",
    ],
}
MODES = {
    "replicated, ZeRO 0": ["train.zero_stage=0"],
    "replicated, ZeRO 1": ["train.zero_stage=1"],
    "replicated, ZeRO 2": ["train.zero_stage=2"],
    "sharded": ["train.zero_stage=0", "model.table=sharded"],
}
BUDGET = [
    f"train.max_steps={STEPS}",
    f"train.validate_every={STEPS}",
    f"train.report_every={FIRST}",
    f"train.checkpoint_every={CHECKPOINTS}",
    "train.threads_per_worker=1",
    "train.patience=1000",
]


class Counter:
    """Bytes this rank sends to others, by kind, from the tensors that enter torch.distributed."""

    def __init__(self) -> None:
        self.sent: dict[str, float] = {}
        self._within = False  # some of these functions call others of them
        one = lambda others, ranks, tensor: 2 * tensor.nbytes * others / ranks  # noqa: E731
        self._wrap("all_reduce", one)
        self._wrap("all_to_all_single", lambda others, ranks, _, rows, *sizes: self._away(rows, others, ranks, *sizes))
        for name in ("all_gather_into_tensor", "all_gather_single", "_all_gather_base"):
            self._wrap(name, lambda others, _, __, rows: rows.nbytes * others)
        self._wrap("all_gather", lambda others, _, __, rows: rows.nbytes * others)
        for name in ("reduce_scatter_tensor", "reduce_scatter_single", "_reduce_scatter_base"):
            self._wrap(name, lambda others, ranks, _, rows: rows.nbytes * others / ranks)
        self._wrap("reduce", lambda others, ranks, rows, *_: rows.nbytes * others / ranks)
        self._wrap("broadcast", lambda others, ranks, rows, *_: rows.nbytes * others / ranks)

    @staticmethod
    def _away(rows: torch.Tensor, others: int, ranks: int, _: Any = None, sent: list[int] | None = None) -> float:
        return rows.nbytes * (1 - sent[dist.get_rank()] / max(1, sum(sent)) if sent else others / ranks)

    def _wrap(self, name: str, size: Any) -> None:
        plain = getattr(dist, name, None)
        if plain is None:
            return

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._within:
                return plain(*args, **kwargs)
            ranks = dist.get_world_size()
            given = [*args, *(value for value in kwargs.values() if isinstance(value, torch.Tensor | list))]
            self.sent[name] = self.sent.get(name, 0.0) + size(ranks - 1, ranks, *given[: 4 if name == "all_to_all_single" else 2])
            self._within = True
            try:
                return plain(*args, **kwargs)
            finally:
                self._within = False

        setattr(dist, name, counted)
        for module in (dist.distributed_c10d,):
            if getattr(module, name, None) is plain:
                setattr(module, name, counted)


def serve(arguments: list[str]) -> None:
    """One rank of a training; rank 0 says what the steps after FIRST took and sent, and what was in them."""
    counter = Counter()
    from lrurec_dist.train.loop import _Worker  # once the exchanges are counted
    from lrurec_dist.train.standalone import train_standalone

    plain_step, seen = _Worker._step, []

    def step(self: _Worker, batch: Any, *arguments: Any) -> None:
        started, before = time.perf_counter(), dict(counter.sent)
        plain_step(self, batch, *arguments)
        ids = sum(len(micro.item_ids.unique()) for micro in batch.micro_batches)
        sent = {name: total - before.get(name, 0.0) for name, total in counter.sent.items()}
        seen.append((time.perf_counter() - started, batch.num_targets, ids, sent))

    _Worker._step = step  # type: ignore[method-assign]
    train_standalone(load_config(arguments[0], arguments[1:]))
    if os.environ["RANK"] == "0":
        taken, targets, ids, sent = zip(*seen[FIRST:], strict=True)
        each = {name: statistics.mean(step.get(name, 0.0) for step in sent) for name in sent[-1]}
        figures = {"ms": statistics.median(taken) * 1e3, "targets": statistics.mean(targets), "ids": statistics.mean(ids)}
        say(json.dumps({**figures, "sent": each}))


def train(ranks: int, path: str, overrides: list[str]) -> dict[str, Any]:
    """What rank 0 of a training says."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    command = [*torchrun, "--rdzv-endpoint=localhost:0", __file__, "serve", path, *overrides]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)  # noqa: S603
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    found: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"ms"')))
    return found


def stall_ms(run_dir: str) -> float:
    """Median milliseconds that training stood still for a checkpoint, of those between validations."""
    records = [record for record in MetricsFile(f"{run_dir}/{METRICS}").read() if record["kind"] == "checkpoint"]
    return statistics.median((record["snapshot_s"] + record["waited_s"]) * 1e3 for record in records)


def lost_worker(path: str, overrides: list[str]) -> float:
    """Seconds from a worker's SIGKILL to the next step of the training that goes on."""
    import ray

    from lrurec_dist.train.launch import launch_training

    ray.init(address="local", num_cpus=4, logging_level="ERROR", log_to_driver=False)
    slow = [
        "train.workers=2",
        "train.max_steps=4000",
        "train.validate_every=4000",
        "train.report_every=1",
        "train.checkpoint_every=50",
    ]
    config = load_config(path, [*overrides, *slow])
    metrics, killed, found = MetricsFile(f"{config.run_dir}/{METRICS}"), 0.0, []

    def steps() -> list[dict[str, Any]]:
        return [record for record in metrics.read() if record["kind"] == "train"]

    def strike() -> None:
        nonlocal killed
        while not any(record["step"] >= 60 for record in steps()):
            time.sleep(0.05)
        workers = [child for child in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(child.cmdline())]
        before, killed = len(steps()), time.time()
        workers[-1].send_signal(signal.SIGKILL)
        while not (later := [record for record in steps()[before:] if record["time"] > killed + 1]):
            time.sleep(0.05)
        found.append(later[0]["time"] - killed)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    with contextlib.suppress(StoppedError):
        launch_training(config)
    thread.join(timeout=60)
    ray.shutdown()
    return found[0]


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="video")
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2, 4])
    parser.add_argument("--without-loss", action="store_true", help="do not kill a worker at the end")
    arguments = parser.parse_args()
    path, rows, figures = str(ROOT / "configs" / "quickstart.yaml"), [], {}
    with tempfile.TemporaryDirectory() as folder:
        shape = [*SHAPES[arguments.shape], f"dataset.dir={folder}/dataset"]
        prepare = [sys.executable, str(ROOT / "jobs" / "prepare.py"), path, *shape, f"run_dir={folder}/prepare"]
        subprocess.run(prepare, check=True, capture_output=True)  # noqa: S603
        for ranks, (mode, settings) in itertools.product(arguments.ranks, MODES.items()):
            overrides = [*shape, *BUDGET, *settings, f"run_dir={folder}/{ranks}-{mode.replace(' ', '-')}"]
            found = train(ranks, path, overrides)
            run_dir = overrides[-1].partition("=")[2]
            config = load_config(path, overrides)
            items, targets = SequenceDataset(config.dataset_url).num_items, round(found["targets"] / ranks)
            shape_of = {"items": items, "dim": config.model.dim, "blocks": config.model.blocks, "sharded": mode == "sharded"}
            shape_of["zero_stage"] = config.train.zero_stage
            work = Work(positions=round(found["ids"]), targets=targets, ranks=ranks, **shape_of)
            stall = stall_ms(run_dir)
            sent, expected = sum(found["sent"].values()), traffic(work)
            figures[f"{mode}, {ranks}"] = {**found, "sent_bytes": sent, "formula_bytes": expected, "stall_ms": stall}
            rows.append(
                [
                    mode,
                    str(ranks),
                    f"{found['ms']:.0f}",
                    f"{found['targets'] / found['ms'] * 1e3:,.0f}",
                    f"{sent / 2**20:.2f}",
                    f"{expected / 2**20:.2f}",
                    f"{stall:.1f} ({stall / found['ms']:.2f})",
                ]
            )
        say(f"{arguments.shape}, torch {torch.__version__}, {os.cpu_count()} cores, bytes of a float: {FLOAT}")
        header = ["table", "ranks", "ms a step", "targets/s", "sent, MiB", "formula, MiB", "checkpoint stall, ms (steps)"]
        say(format_table(header, rows))
        if not arguments.without_loss:
            figures["kill_to_step_s"] = lost_worker(path, [*shape, *BUDGET[4:], f"run_dir={folder}/lost"])
            say(f"from a worker's SIGKILL to the next step of the training: {figures['kill_to_step_s']:.1f} s")
    say(json.dumps(figures))


if __name__ == "__main__":
    main()
