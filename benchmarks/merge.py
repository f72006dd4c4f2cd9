"""A log merged night by night, against reading all of it every night; and whether both give the same bytes.

    python benchmarks/merge.py LOG.parquet [user item timestamp unit] [nights]

Splits the log by time into as many nights (default 16; columns user_id item_id timestamp, in ms),
merges each into the dataset of the night before, then prepares everything anew, once from nothing and
once with the ids of the last night. Exits with an error unless all three hold the same sequences and ids.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lrurec_dist.data.events import EventRules
from lrurec_dist.data.prepare import PrepareOptions, prepare_dataset
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.reporting import format_table, say, silent

SHARDS = 8


def split_by_time(log: str, time_column: str, nights: int, folder: Path) -> None:
    """One Hive partition a night; bounds at equal distances in time."""
    table = pq.read_table(log)
    times = table[time_column]
    first, last = (pc.cast(bound(times), pa.int64()).as_py() for bound in (pc.min, pc.max))
    bounds = np.linspace(first, last + 1, nights + 1).astype(np.int64)
    for night in range(nights):
        part = table.filter(pc.and_(pc.greater_equal(times, bounds[night]), pc.less(times, bounds[night + 1])))
        place = folder / f"date={night:03d}"
        place.mkdir(parents=True)
        pq.write_table(part, place / "part-0.parquet", compression="zstd")


def kept(dataset: SequenceDataset) -> dict[str, str]:
    """SHA-256 of every file of sequences and catalogue."""
    files = dataset.manifest["files"].items()
    return {name: entry["sha256"] for name, entry in files if not name.startswith("quarantine/")}


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    log, *columns = sys.argv[1:6]
    user, item, stamp, unit = columns or ["user_id", "item_id", "timestamp", "ms"]
    nights = int(sys.argv[6]) if len(sys.argv) > 6 else 16
    rules = EventRules(
        user_column=user,
        item_column=item,
        timestamp_column=stamp,
        timestamp_unit=unit,
    )

    with tempfile.TemporaryDirectory() as folder:
        split_by_time(log, stamp, nights, Path(folder) / "log")

        def prepared(name: str, to: str = "", parent: str = "", rebuild: bool = False) -> tuple[SequenceDataset, float]:
            options = PrepareOptions(
                log_path=f"{folder}/log",
                log_format="parquet",
                rules=rules,
                max_rejected_share=0.0,
                shards=SHARDS,
                to_partition=to,
                parent=parent,
                rebuild=rebuild,
            )
            started = time.perf_counter()
            dataset, _ = prepare_dataset(f"{folder}/{name}", options, silent, lambda: None)
            return dataset, time.perf_counter() - started

        rows, parent = [], ""
        for night in range(nights):
            merged, seconds = prepared(f"night-{night}", f"{night + 1:03d}", parent)
            parent = merged.url
            facts = merged.manifest
            rows.append([f"night {night + 1}", facts["rows_read"], facts["interactions"], facts["new_items"], f"{seconds:.2f}"])
        again, again_s = prepared("again", parent=parent, rebuild=True)
        afresh, afresh_s = prepared("afresh")
        rows.append(["rebuild with the ids", again.manifest["rows_read"], again.manifest["interactions"], 0, f"{again_s:.2f}"])
        rows.append(
            [
                "rebuild from nothing",
                afresh.manifest["rows_read"],
                afresh.manifest["interactions"],
                afresh.num_items,
                f"{afresh_s:.2f}",
            ]
        )
        if not kept(merged) == kept(again) == kept(afresh):
            sys.exit("the merged dataset differs from a rebuild")
    say(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {log}")
    say(format_table(["dataset", "rows read", "interactions", "new items", "seconds"], rows))
    say(f"all three hold the same {len(kept(merged))} files, to the byte")
    last = float(rows[nights - 1][-1])
    say(json.dumps({"last_night_s": last, "rebuild_s": round(afresh_s, 3), "ratio": round(afresh_s / last, 3), "equal": True}))


if __name__ == "__main__":
    main()
