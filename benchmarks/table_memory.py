"""What a rank of a whole training takes, by where the item table lies and by number of ranks.

    python benchmarks/table_memory.py [items] [--ranks 1 2 4]      (default: 1000000 items, 1, 2 and 4 ranks)

Two steps, a validation and a checkpoint of the training loop, full softmax, AdamW, rows 64 wide, ZeRO 1, on processes of this
machine with gloo between them. Figures are the largest over ranks: growth of the peak resident set from the start of the loop to
the end of the last step, and to the end of the checkpoint, whose copy a rank keeps until the next one.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from lrurec_dist.config_file import load_config
from lrurec_dist.data.events import EventRules
from lrurec_dist.data.prepare import PrepareOptions, prepare_dataset
from lrurec_dist.reporting import format_table, say, silent
from lrurec_dist.train.presence import Presence
from lrurec_dist.train.worker_process import prepare_process

EVENTS = 10_000  # of each user, every one of another item: few users to rank, many items
STEPS = 2


def make_dataset(folder: str, items: int) -> str:
    """Every item once, in the histories of few users."""
    order = np.random.default_rng(0).permutation(items)
    pq.write_table(
        pa.table({"user": np.arange(items) // EVENTS, "item": order, "time": np.arange(items)}), f"{folder}/log.parquet"
    )
    rules = EventRules(user_column="user", item_column="item", timestamp_column="time", timestamp_unit="s")
    options = PrepareOptions(log_path=f"{folder}/log.parquet", log_format="auto", rules=rules, max_rejected_share=0.0)
    return prepare_dataset(f"{folder}/dataset", options, silent, lambda: None)[0].url


def serve(rank: int, ranks: int, overrides: list[str], rendezvous: str, results: Any) -> None:
    """One rank: trains, and reports both peaks."""
    # DeepSpeed asks the environment even where the process group exists
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    prepare_process(cuda=False)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
    from lrurec_dist.train import loop  # DeepSpeed reads what was prepared when it is imported

    peaks = [_status("VmRSS")]
    worker = loop._Worker(load_config(None, overrides), torch.device("cpu"), Presence())
    validate = worker._validate

    def validate_then() -> dict[str, float]:
        peaks.append(_status("VmHWM"))
        return validate()

    worker._validate = validate_then  # type: ignore[method-assign]
    worker.run(lambda _: None)
    peaks.append(_status("VmHWM"))
    results.put([peak - peaks[0] for peak in peaks[1:]])
    dist.barrier()
    dist.destroy_process_group()


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(ranks: int, overrides: list[str]) -> list[float]:
    """Both peaks in MiB, the largest over ranks."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        settings = [*overrides, f"run_dir={folder}/run", f"train.workers={ranks}"]
        arguments = (ranks, settings, f"file://{folder}/rendezvous", results)
        processes = [context.Process(target=serve, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        try:
            found = [results.get(timeout=1800) for _ in processes]
        finally:
            for process in processes:
                process.join(timeout=30)
                process.kill()
    return [max(peaks) / 2**20 for peaks in zip(*found, strict=True)]


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("items", nargs="?", type=int, default=1_000_000)
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2, 4])
    arguments = parser.parse_args()
    budget = [f"train.{name}={STEPS}" for name in ("max_steps", "validate_every", "report_every")]
    shape = ["model.dim=64", "model.hidden=16", "batch.global_batch_size=8", "batch.max_length=8", "evaluate.batch_size=32"]
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(folder, arguments.items)
        for table in ("replicated", "sharded"):
            for ranks in arguments.ranks:
                steps, saved = measure(ranks, [f"dataset.dir={dataset}", f"model.table={table}", *budget, *shape])
                figures[f"{table}, {ranks} ranks"] = {"steps_mib": round(steps), "checkpoint_mib": round(saved)}
                rows.append([table, str(ranks), f"{steps:,.0f}", f"{saved:,.0f}"])
    rows_mib = (arguments.items + 1) * 65 * 4 / 2**20
    say(f"{arguments.items:,} items, width 64: rows and biases are {rows_mib:,.0f} MiB; the largest rank, one thread each")
    say(format_table(["table", "ranks", "peak to the last step, MiB", "with checkpoint, MiB"], rows))
    say(json.dumps(figures))


if __name__ == "__main__":
    main()
