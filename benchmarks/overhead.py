"""What Ray Train, Ray Data and DeepSpeed cost per step, against a bare loop over the same batches.

    python benchmarks/overhead.py [config.yaml] [key=value ...]

One worker, as many threads as the configuration says (default 1, so that Ray Data's tasks have the
other core of a small machine). The bare loop has its batches in memory and nothing else to do:
model, loss, clipping, AdamW. Both go through the same batches, in turn three times, each in a
process of its own; a figure is the time of the last 100 of 120 steps. Without arguments: the
quickstart's configuration on a larger synthetic log.
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

import torch

from lrurec_dist.config import Config, load_config
from lrurec_dist.data.batches import TrainingBatch, iter_group_batches
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.model.loss import softmax_loss
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.reporting import METRICS, format_table, say
from lrurec_dist.train.optimizer import adamw
from lrurec_dist.train.process import keep_freed_memory

STEPS, FIRST, TURNS = 120, 20, 3
ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = ["synthetic.users=6000", "synthetic.items=3400", "synthetic.mean_length=80", "batch.max_length=100"]


def batches_of(config: Config) -> list[TrainingBatch]:
    """The first STEPS batches that training sees on one worker."""
    dataset = SequenceDataset(config.dataset_url)
    groups = -(-len(dataset.shard_names) // config.batch.shards_mixed)
    stream = itertools.chain.from_iterable(
        iter_group_batches(
            dataset,
            epoch=epoch,
            group=group,
            seed=config.seed,
            shards_mixed=config.batch.shards_mixed,
            global_batch_size=config.batch.global_batch_size,
            max_length=config.batch.max_length,
            first_item_is_target=config.batch.first_item_is_target,
            rank=0,
            world_size=1,
        )
        for epoch in itertools.count()
        for group in range(groups)
    )
    return list(itertools.islice(stream, STEPS))


def bare(config: Config) -> float:
    """Milliseconds a step of the bare loop."""
    keep_freed_memory()
    torch.set_num_threads(config.train.threads_per_worker)
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


def job(arguments: list[str], run_dir: str) -> float:
    """Milliseconds a step of the training job, everything between two reports included."""
    limits = [f"train.max_steps={STEPS}", f"train.validate_every={STEPS}", f"train.report_every={FIRST}", f"run_dir={run_dir}"]
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), *arguments, *limits]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"})  # noqa: S603
    records = [json.loads(line) for line in (Path(run_dir) / METRICS).read_text().splitlines()]
    times = {record["step"]: record["time"] for record in records if record["kind"] == "train"}
    return (times[STEPS] - times[FIRST]) / (STEPS - FIRST) * 1e3


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    if sys.argv[1:2] == ["--bare"]:
        path, *overrides = sys.argv[2:]
        say(str(bare(load_config(path, overrides))))
        return
    given = sys.argv[1:]
    path = given[0] if given and "=" not in given[0] else str(ROOT / "configs" / "quickstart.yaml")
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            *([] if given else DEFAULTS),
            "train.workers=1",
            "train.threads_per_worker=1",
            f"dataset.dir={folder}/dataset",
        ]
        overrides += [value for value in given if "=" in value]
        job([path, *overrides], f"{folder}/warm")  # prepares the dataset, compiles the kernels
        times: dict[str, list[float]] = {"bare loop": [], "Ray Train + DeepSpeed": []}
        for turn in range(TURNS):
            command = [sys.executable, __file__, "--bare", path, *overrides, f"run_dir={folder}/bare"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
            times["bare loop"].append(float(done.stdout))
            times["Ray Train + DeepSpeed"].append(job([path, *overrides], f"{folder}/{turn}"))
    each = [mine / base for base, mine in zip(*times.values(), strict=True)]
    rows = [[name, f"{statistics.median(values):.1f}", f"{min(values):.1f}–{max(values):.1f}"] for name, values in times.items()]
    say(f"{' '.join([path, *given[1:]])}, one worker, torch {torch.__version__}")
    say(format_table(["a step", "ms", "spread"], rows))
    say(f"the job takes {statistics.median(each):.3f} times the bare loop ({min(each):.3f}–{max(each):.3f})")
    say(json.dumps({"ratio": round(statistics.median(each), 4), "ratios": [round(ratio, 4) for ratio in each], "ms": times}))


if __name__ == "__main__":
    main()
