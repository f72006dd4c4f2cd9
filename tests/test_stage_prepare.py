"""The stage as a job runs it: from settings to a dataset."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.config_file import load_config
from lrurec_dist.data.filters import ABOVE_CAP
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.ray_session import RaySession
from lrurec_dist.reporting import Status
from lrurec_dist.stage_prepare import UNFILTERED, prepare

EVENTS = [(1, 1, 0), (1, 1, 2), (1, 2, 3), (1, 2, 9), (2, 3, 0), (2, 2, 1), (2, 3, 9), (2, 3, 12)]


def prepared(folder: Path, name: str, *overrides: str) -> tuple[Config, SequenceDataset]:
    folder.mkdir(exist_ok=True)
    columns = dict(zip(("user_id", "item_id", "timestamp"), zip(*EVENTS, strict=True), strict=True))
    pq.write_table(pa.table({key: pa.array(values) for key, values in columns.items()}), folder / "log.parquet")
    run_dir = folder / name
    config = load_config(None, [f"run_dir={run_dir}", f"log.path={folder / 'log.parquet'}", "dataset.shards=1", *overrides])
    prepare(config, Status(str(run_dir)), RaySession(config))
    assert not ray.is_initialized(), "a small night needs no Ray"
    return config, SequenceDataset(config.dataset_url, verify=True)


def times_of(dataset: SequenceDataset) -> dict[int, list[int]]:
    shard = dataset.read_shard(dataset.shard_names[0], timestamps=True)
    assert shard.timestamps is not None
    bounds = zip(shard.offsets, shard.offsets[1:], strict=False)
    return {
        user: shard.timestamps[begin:end].tolist() for user, (begin, end) in zip(shard.user_keys.to_pylist(), bounds, strict=True)
    }


@pytest.mark.parametrize(("unit", "tolerance", "stored"), [("s", "2.5", 10**6), ("ms", "0.0025", 10**3), ("position", "2.5", 1)])
def test_a_tolerance_is_in_seconds_or_in_positions_whatever_the_log_counts_in(tmp_path, unit, tolerance, stored):
    unit_setting = f"log.timestamp_unit={unit}"
    _, dataset = prepared(tmp_path, "run", unit_setting, f"log.duplicate_tolerance={tolerance}")
    kept = {1: [0, 3, 9], 2: [0, 1, 9, 12]}
    assert times_of(dataset) == {user: [time * stored for time in times] for user, times in kept.items()}
    assert dataset.manifest["inputs"]["filters"]["duplicate_tolerance"] == int(2.5 * stored)


def test_the_cap_counts_what_is_left_when_duplicates_are_gone(tmp_path):
    _, exact = prepared(tmp_path, "exact", "log.max_user_events=3")
    assert times_of(exact) == {1: [2_000_000, 3_000_000, 9_000_000], 2: [1_000_000, 9_000_000, 12_000_000]}
    assert not storage.is_committed(f"{exact.url}{UNFILTERED}"), "one copy is enough"
    config, near = prepared(tmp_path, "near", "log.max_user_events=3", "log.duplicate_tolerance=2")
    assert times_of(near) == {1: [0, 3_000_000, 9_000_000], 2: [1_000_000, 9_000_000, 12_000_000]}
    assert SequenceDataset(f"{config.dataset_url}{UNFILTERED}").manifest["interactions"] == len(EVENTS)


def test_a_user_above_the_cap_is_quarantined_and_the_table_says_so(tmp_path, capsys):
    rules = ["log.max_user_events=3", "log.duplicate_tolerance=2", "log.users_above_cap=quarantined"]
    _, dataset = prepared(tmp_path, "run", *rules, "dataset.first_ids=count")
    assert times_of(dataset) == {1: [0, 3_000_000, 9_000_000]}
    rows = storage.read_table(f"{dataset.url}/quarantine/part-00000.parquet").to_pylist()
    assert [(row["user_key"], row["item_key"], row["timestamp"]) for row in rows] == [
        (user, item, time * 1_000_000) for user, item, time in EVENTS if user == 2
    ]
    assert dataset.catalogue.keys.to_pylist() == [2, 1], "by the count of what is kept"
    everything = SequenceDataset(f"{dataset.url}{UNFILTERED}").catalogue.keys.to_pylist()
    assert everything == [1, 3, 2], "by appearance, which breaks the ties of the filtered one"
    printed = " ".join(capsys.readouterr().out.split())
    assert f"quarantined, {ABOVE_CAP} 4 users quarantined 1 interactions 3" in printed
    assert "dropped, duplicate within log.duplicate_tolerance 1" in printed
