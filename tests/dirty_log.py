"""A small dirty log, written in several ways, and what has to become of it."""

import dataclasses
import gzip
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from lrurec_dist.data.events import EventRules
from lrurec_dist.data.prepare import PrepareOptions, prepare_dataset
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.reporting import silent

Row = tuple[Any, Any, Any]  # user, item, time

RULES = EventRules(
    user_column="user",
    item_column="item",
    timestamp_column="time",
    timestamp_unit="s",
)
OPTIONS = PrepareOptions(
    log_path="",
    log_format="auto",
    rules=RULES,
    max_rejected_share=0.06,  # exactly what DIRTY is of DIRTY + CLEAN
    drop_duplicates=False,
    shards=3,
)


def make_clean() -> list[Row]:
    """94 events of 11 users: many at the same time, one repeated, a user with one event and one with two."""
    draw = np.random.default_rng(11)
    columns = (draw.integers(*bounds, 89).tolist() for bounds in ((1, 10), (1, 25), (0, 12)))
    return [*zip(*columns, strict=True), (100, 3, 5), (101, 4, 9), (101, 3, 9), (1, 1, 0), (1, 1, 0)]


CLEAN = make_clean()
DIRTY: list[Row] = [(None, 99, 3), (None, None, None), (1, None, 3), (2, 5, None), (2, 5, 2**62), (3, 98, 2**62)]
REASONS = {"null_item_key": 1, "null_timestamp": 1, "null_user_key": 2, "out_of_range_timestamp": 2}


def write_parquet(directory: Path, rows: list[Row], files: int = 1, seed: int = 0) -> str:
    """The rows, shuffled over some files."""
    directory.mkdir()
    order = np.random.default_rng(seed).permutation(len(rows))
    for file in range(files):
        part = [rows[row] for row in order[file::files]]
        columns = {name: pa.array([row[at] for row in part], pa.int64()) for at, name in enumerate(("user", "item", "time"))}
        pq.write_table(pa.table(columns), directory / f"part-{file}.parquet")
    return str(directory)


def write_csv(directory: Path, rows: list[Row]) -> str:
    """The rows with keys as text with leading zeros, in a plain and a compressed file, columns in another order."""
    directory.mkdir()

    def text_of(part: list[Row]) -> str:
        lines = ["time,price,item,user"]
        for user, item, time in part:
            user, item = ("" if key is None else f"{key:03d}" for key in (user, item))
            lines.append(f"{'' if time is None else 'soon' if time == 2**62 else time},9.99,{item},{user}")
        return "\n".join([*lines, ""])

    (directory / "a.csv").write_text(text_of(rows[::2]))
    (directory / "b.csv.gz").write_bytes(gzip.compress(text_of(rows[1::2]).encode()))
    return str(directory)


def ray_is_there() -> None:
    """The test that lets tasks be used has the fixture ray_session."""
    assert ray.is_initialized()


def prepare(url: Path | str, log_path: Path | str, **changes: Any) -> tuple[SequenceDataset, bool]:
    rules = {field: changes.pop(field) for field in list(changes) if hasattr(RULES, field)}
    options = dataclasses.replace(OPTIONS, log_path=str(log_path), rules=dataclasses.replace(RULES, **rules), **changes)
    return prepare_dataset(str(url), options, silent, ray_is_there)


def expected_keys(rows: list[Row]) -> list[Any]:
    """Item keys in the order of their ids: by first time, then by key."""
    first_seen: dict[Any, int] = {}
    for _, item, time in rows:
        first_seen[item] = min(time, first_seen.get(item, time))
    return sorted(first_seen, key=lambda item: (first_seen[item], item))


def expected_sequences(rows: list[Row]) -> dict[Any, list[Any]]:
    """Item keys per user, by time, then by item id."""
    ids = {key: index for index, key in enumerate(expected_keys(rows), start=1)}
    sequences = defaultdict(list)
    for user, item, _ in sorted(rows, key=lambda row: (row[2], ids[row[1]])):
        sequences[user].append(item)
    return dict(sequences)


def sequences_of(dataset: SequenceDataset) -> dict[Any, list[Any]]:
    """Item keys per user, as stored; a user who is in two places is an error."""
    sequences = {}
    for name in dataset.shard_names:
        shard = dataset.read_shard(name)
        for user, begin, end in zip(shard.user_keys.to_pylist(), shard.offsets, shard.offsets[1:], strict=False):
            assert user not in sequences
            sequences[user] = dataset.catalogue.keys_of(shard.item_ids[begin:end])
    return sequences


def kept_files(dataset: SequenceDataset) -> dict[str, Any]:
    """Manifest entries of catalogue and sequences; what is quarantined names its source."""
    return {name: entry for name, entry in dataset.manifest["files"].items() if not name.startswith("quarantine/")}
