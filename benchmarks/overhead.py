"""What Ray Train, Ray Data and DeepSpeed cost per step, against a bare loop over the same batches.

    python benchmarks/overhead.py [config.yaml] [key=value ...]

One worker, on every core but one and on every core: Ray's own dozen of idle processes takes about a
tenth of a core, which a training that leaves them none has to give up. The bare loop has its batches in memory and nothing else to do: model,
loss, clipping, AdamW. Both go through the same batches, in turn TURNS times, each in a process of
its own; a figure is the time of the steps after FIRST. Without arguments: a synthetic log of the
size of ML-1M.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray
import torch

from lrurec_dist.config import Config
from lrurec_dist.config_file import load_config
from lrurec_dist.data.batches import TrainingBatch, iter_batches
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.model.loss import softmax_loss
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.model.process import arrange_cpu
from lrurec_dist.reporting import METRICS, MetricsFile, format_table, say
from lrurec_dist.train.launch import launch_training
from lrurec_dist.train.optimizer import adamw
from lrurec_dist.train.order import data_order

STEPS, FIRST, TURNS = 80, 20, 3
ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = [
    "train.workers=1",
    f"train.max_steps={STEPS}",
    f"train.validate_every={STEPS}",
    f"train.report_every={FIRST}",
    "synthetic.users=6000",
    "synthetic.items=3400",
    "synthetic.mean_length=80",
    "batch.max_length=100",
    "model.dropout=0.2",
]


def batches_of(config: Config) -> list[TrainingBatch]:
    """The first STEPS batches that training sees on one worker."""
    dataset = SequenceDataset(config.dataset_url)
    order = data_order(config, dataset)
    return list(itertools.islice(iter_batches(dataset, order, epoch=0, first_batch=0, rank=0, world_size=1), STEPS))


def bare(config: Config) -> float:
    """Milliseconds a step of the bare loop."""
    arrange_cpu()
    torch.set_num_threads(config.train.threads_per_worker or os.cpu_count() or 1)
    batches = [(torch.from_numpy(batch.item_ids), torch.from_numpy(batch.targets)) for batch in batches_of(config)]
    options, train = config.model, config.train
    torch.manual_seed(config.seed)
    num_items = SequenceDataset(config.dataset_url).num_items
    model = LRURec(num_items=num_items, dim=options.dim, hidden=options.hidden, blocks=options.blocks, dropout=options.dropout)
    groups = [{"params": list(model.parameters()), "weight_decay": train.weight_decay}]
    optimizer = adamw(groups, learning_rate=train.learning_rate, epsilon=train.epsilon)
    started = 0.0
    for step, (item_ids, targets) in enumerate(batches):
        if step == FIRST:
            started = time.perf_counter()
        keep, table = targets > 0, model.table
        vectors = model(item_ids, keep)
        include = config.loss.include_padding_class
        total, count = softmax_loss(vectors, table.weight, table.bias, targets[keep], include_padding_class=include)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - started) / (STEPS - FIRST) * 1e3


def under_ray(config: Config) -> float:
    """Milliseconds a step under Ray Train and DeepSpeed, everything between two reports included."""
    ray.init(address="local", num_cpus=os.cpu_count(), logging_level="ERROR", log_to_driver=False)
    launch_training(config)
    times = {
        record["step"]: record["time"]
        for record in MetricsFile(f"{config.run_dir}/{METRICS}").read()
        if "targets_per_s" in record
    }
    return (times[STEPS] - times[FIRST]) / (STEPS - FIRST) * 1e3


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    if sys.argv[1:2] in (["bare"], ["ray"]):
        config = load_config(sys.argv[2], sys.argv[3:])
        say(str(bare(config) if sys.argv[1] == "bare" else under_ray(config)))
        return
    given = sys.argv[1:]
    path = given.pop(0) if given and "=" not in given[0] else str(ROOT / "configs" / "quickstart.yaml")
    cores = os.cpu_count() or 1
    threads = {f"{spared} of {cores} cores": spared for spared in sorted({max(1, cores - 1), cores})}
    times: dict[str, dict[str, list[float]]] = {name: {"bare": [], "ray": []} for name in threads}
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*DEFAULTS, f"dataset.dir={folder}/dataset", *given]
        prepare = [sys.executable, str(ROOT / "jobs" / "prepare.py"), path, *overrides, f"run_dir={folder}/prepare"]
        subprocess.run(prepare, check=True, capture_output=True)  # noqa: S603
        for turn, name, side in itertools.product(range(TURNS), threads, ("bare", "ray")):
            settings = [
                *overrides,
                f"train.threads_per_worker={threads[name]}",
                f"run_dir={folder}/{side}-{threads[name]}-{turn}",
            ]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
            command = [sys.executable, __file__, side, path, *settings]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)  # noqa: S603
            times[name][side].append(float(done.stdout.split()[-1]))
    rows, ratios = [], {}
    for name, sides in times.items():
        each = [mine / base for base, mine in zip(*sides.values(), strict=True)]
        ratios[name] = round(statistics.median(each), 4)
        figures = [f"{statistics.median(values):.0f} ({min(values):.0f}–{max(values):.0f})" for values in sides.values()]
        rows.append([name, *figures, f"{ratios[name]:.3f} ({min(each):.3f}–{max(each):.3f})"])
    say(f"{' '.join([path, *given])}, one worker, torch {torch.__version__}")
    say(format_table(["training on", "bare loop, ms", "Ray Train + DeepSpeed, ms", "ratio"], rows))
    say(json.dumps({"ratios": ratios, "ms": times}))


if __name__ == "__main__":
    main()
