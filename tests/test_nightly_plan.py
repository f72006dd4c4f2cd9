"""Which nights run, what they begin with, what is late, and what old nights keep; with real datasets, without training."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.config_file import load_config
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import ConfigError, DataNotReadyError, DataQualityError, LeaseError
from lrurec_dist.nightly.history import describe_night, history, nights_table
from lrurec_dist.nightly.lease import held
from lrurec_dist.nightly.night import run_nights
from lrurec_dist.nightly.plan import (
    begin,
    check_ready,
    check_settings,
    config_of,
    dates_to_run,
    list_sources,
    partition_of_night,
    registry_of,
    stages_of,
)
from lrurec_dist.nightly.records import NightRecord, read_nights
from lrurec_dist.nightly.retention import apply, what_to_remove
from lrurec_dist.serve.registry import rollback
from tests.nights import DAYS, ended, partition, prepared, tiny, write_log


@pytest.fixture
def log(tmp_path: Path) -> Path:
    write_log(tmp_path / "log")
    return tmp_path / "log"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def due(config: Config) -> tuple[list[str], list[str]]:
    return dates_to_run(config, read_nights(config.night.root), {source.partition for source in list_sources(config)})


def add_rows(path: Path, *, users: list[str], times: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    items = ["item-00001"] * len(users)
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), path)


def test_the_first_night_runs_alone_and_missed_ones_are_caught_up_in_order(root, log):
    assert due(tiny(root, log, f"night.date={DAYS[0]}")) == ([DAYS[0]], [])
    ended(tiny(root, log, f"night.date={DAYS[0]}"))
    assert due(tiny(root, log, f"night.date={DAYS[3]}")) == (list(DAYS[1:]), [])
    assert due(tiny(root, log, f"night.date={DAYS[3]}", "night.catch_up=false")) == ([DAYS[3]], [])
    partition(log, DAYS[2]).unlink()
    assert due(tiny(root, log, f"night.date={DAYS[3]}")) == ([DAYS[1], DAYS[3]], [DAYS[2]])


def test_a_range_runs_every_night_that_is_not_over(root, log):
    assert due(tiny(root, log, f"night.date={DAYS[2]}", f"night.from_date={DAYS[0]}")) == (list(DAYS[:3]), [])
    ended(tiny(root, log, f"night.date={DAYS[1]}"), promoted=False)
    assert due(tiny(root, log, f"night.date={DAYS[2]}", f"night.from_date={DAYS[0]}")) == ([DAYS[0], DAYS[2]], [])
    assert due(tiny(root, log, f"night.date={DAYS[1]}")) == ([DAYS[1]], []), "a refused night goes through the gate again"


def test_a_night_whose_dataset_is_committed_is_not_caught_up_since_later_ones_contain_it(root, log):
    ended(tiny(root, log, f"night.date={DAYS[0]}"))
    prepared(tiny(root, log, f"night.date={DAYS[1]}"))
    assert due(tiny(root, log, f"night.date={DAYS[2]}")) == ([DAYS[2]], [])
    night = begin(tiny(root, log), DAYS[2], read_nights(str(root)))
    assert night.parent == f"{root}/nights/{DAYS[1]}/dataset"
    assert night.previous == f"{root}/nights/{DAYS[0]}"


def test_a_night_begins_with_the_run_that_serves_also_after_a_rollback(root, log):
    for day in DAYS[:2]:
        ended(tiny(root, log, f"night.date={day}"))
    ended(tiny(root, log, f"night.date={DAYS[2]}"), promoted=False)
    config = tiny(root, log, f"night.date={DAYS[3]}")
    night = begin(config, DAYS[3], read_nights(str(root)))
    assert (night.parent, night.previous) == (f"{root}/nights/{DAYS[2]}/dataset", f"{root}/nights/{DAYS[1]}")
    rollback(registry_of(config), None)
    assert begin(config, DAYS[3], read_nights(str(root))).previous == f"{root}/nights/{DAYS[0]}"


def test_what_a_night_began_with_does_not_change_between_attempts(root, log):
    ended(tiny(root, log, f"night.date={DAYS[0]}"))
    before = prepared(tiny(root, log, f"night.date={DAYS[2]}")).night
    ended(tiny(root, log, f"night.date={DAYS[1]}"))
    assert begin(tiny(root, log), DAYS[2], read_nights(str(root))) == before


def test_the_configuration_of_a_night_follows_from_its_date_and_what_it_begins_with(root, log):
    ended(tiny(root, log, f"night.date={DAYS[0]}"))
    config = tiny(root, log, f"night.date={DAYS[2]}", "night.warm_steps=12", "night.late_days=2")
    derived = config_of(config, begin(config, DAYS[2], read_nights(str(root))))
    first = f"{root}/nights/{DAYS[0]}"
    assert (derived.run_dir, derived.dataset.parent) == (f"{root}/nights/{DAYS[2]}", f"{first}/dataset")
    assert (derived.train.warm_start, derived.evaluate.previous, derived.train.max_steps) == (first, first, 12)
    assert (derived.log.min_time, derived.log.max_time) == ("2025-01-25", "2025-01-30")
    assert derived.log.to_partition == "2025-01-29"
    scratch = tiny(root, log, f"night.date={DAYS[2]}", "night.warm_steps=12", "night.warm_start=false")
    derived = config_of(scratch, begin(scratch, DAYS[2], read_nights(str(root))))
    assert (derived.train.warm_start, derived.evaluate.previous, derived.train.max_steps) == ("", first, 20)


def test_a_merged_night_takes_late_rows_of_its_window_and_quarantines_others(root, log):
    first = prepared(tiny(root, log, f"night.date={DAYS[0]}"))
    midnight = 1_737_936_000  # of 2025-01-27
    day = 86_400
    late = [midnight - 2 * day, midnight - 2 * day - 1, midnight + 2 * day, midnight + 2 * day - 1]
    add_rows(log / f"date={DAYS[0]}" / "late.parquet", users=["u"] * 4, times=late)
    config = tiny(root, log, f"night.date={DAYS[1]}", "night.late_days=2", "log.max_rejected_share=0.5")
    dataset = SequenceDataset(prepared(config).dataset)
    assert dataset.manifest["rows_rejected"] == {"future": 1, "late": 1}
    counted = dataset.manifest["partitions"][DAYS[0]]
    assert (counted["rows_read"], counted["events"], counted["rows_rejected"]) == (4, 2, {"future": 1, "late": 1})
    assert sum(counted["events"] for counted in dataset.manifest["partitions"].values()) == dataset.manifest["rows_read"] - 2
    quarantined = [
        row
        for name in dataset.manifest["files"]
        if name.startswith("quarantine/")
        for row in storage.read_table(storage.join(dataset.url, name)).to_pylist()
    ]
    assert sorted((row["_reason"], row["timestamp"]) for row in quarantined) == [("future", late[2]), ("late", late[1])]
    fresh = pq.ParquetFile(partition(log, DAYS[1])).metadata.num_rows
    assert dataset.manifest["interactions"] == SequenceDataset(first.dataset).manifest["interactions"] + fresh + 2


def test_partitions_may_be_spelled_otherwise_and_lag_behind_the_date(root, log):
    config = tiny(root, log, "night.date=2025-03-01", "night.lag_days=1", "night.partition_format='%Y%m%d'")
    assert partition_of_night(config, "2025-03-01") == "20250228"
    assert config_of(config, begin(config, "2025-03-01", [])).log.to_partition == "20250301"


def test_a_missing_partition_is_data_that_is_not_ready_and_leaves_no_night(root, log):
    with pytest.raises(
        DataNotReadyError, match=r"partition date=2025-01-31 of .* is not there; the last one before it is 2025-01-29"
    ):
        run_nights(tiny(root, log, "night.date=2025-01-31"))
    assert read_nights(str(root)) == []
    status = storage.read_json(f"{root}/status.json")
    assert (status["result"], status["exit_code"]) == ("failed", 20)


def test_a_partition_without_its_ready_file_is_being_written(root, log):
    config = tiny(root, log, f"night.date={DAYS[0]}", "night.ready_file=_SUCCESS")
    with pytest.raises(DataNotReadyError, match=r"night\.ready_file=_SUCCESS: .*/date=2025-01-26 has none"):
        run_nights(config)
    (log / f"date={DAYS[0]}" / "_SUCCESS").touch()
    check_ready(config, begin(config, DAYS[0], []), list_sources(config))


def test_a_corrupted_partition_fails_the_night_and_names_the_file_and_the_mended_one_goes_through(root, log):
    ended(tiny(root, log, f"night.date={DAYS[0]}"))
    whole = partition(log, DAYS[1]).read_bytes()
    partition(log, DAYS[1]).write_bytes(whole[: len(whole) // 2])
    config = tiny(root, log, f"night.date={DAYS[1]}")
    with pytest.raises(DataQualityError, match=f"date={DAYS[1]}/part-0.parquet"):
        run_nights(config)
    status = storage.read_json(f"{root}/nights/{DAYS[1]}/status.json")
    assert (status["result"], status["stage"], status["exit_code"]) == ("failed", "prepare", 21)
    with pytest.raises(DataQualityError, match="part-0"):  # not 30: nothing is committed that this setting would contradict
        run_nights(tiny(root, log, f"night.date={DAYS[1]}", "model.dropout=0.1"))
    record = read_nights(str(root))[0]
    assert record.result == "failed in prepare (21)"
    assert "2025-01-27  failed in prepare (21)" in nights_table([describe_night(each) for each in history(str(root), 5)])
    partition(log, DAYS[1]).write_bytes(whole)
    assert due(tiny(root, log, f"night.date={DAYS[2]}")) == (list(DAYS[1:3]), [])
    assert prepared(config).dataset


def test_a_second_submission_is_refused_and_leaves_the_outcome_to_the_first(root, log):
    with held(f"{root}/lease.json", "night 2025-01-26", 0.4), pytest.raises(LeaseError, match="for night 2025-01-26"):
        run_nights(tiny(root, log, f"night.date={DAYS[0]}"))
    assert not (root / "status.json").exists()
    assert read_nights(str(root)) == []


def test_an_older_night_is_not_published_over_a_newer_one(root, log):
    ended(tiny(root, log, f"night.date={DAYS[0]}"))
    ended(tiny(root, log, f"night.date={DAYS[2]}"))
    config = tiny(root, log, f"night.date={DAYS[1]}", "night.recommend=true")
    records = read_nights(str(root))
    everything = ["prepare", "train", "evaluate", "bundle", "publish", "recommend"]
    assert stages_of(config, begin(config, DAYS[1], records), records) == (everything[:4], DAYS[2])
    later = tiny(root, log, f"night.date={DAYS[3]}", "night.recommend=true")
    assert stages_of(later, begin(later, DAYS[3], records), records) == (everything, "")


def test_old_nights_keep_small_files_and_what_serves_or_comes_next_keeps_all(root, log):
    partition(log, DAYS[3]).unlink()  # a night without new files, whose dataset names the one before
    for day in DAYS:
        ended(tiny(root, log, f"night.date={day}"))
    config = tiny(root, log)
    registry = registry_of(config)
    assert what_to_remove(read_nights(str(root)), registry, 0) == []
    assert what_to_remove(read_nights(str(root)), registry, 1) == [], "the champions before may be rolled back to"
    champion = json.loads((root / "registry/channels/champion.json").read_text())
    champion["previous"] = []
    (root / "registry/channels/champion.json").write_text(json.dumps(champion))
    found = what_to_remove(read_nights(str(root)), registry, 1)
    assert [removal.date for removal in found] == [DAYS[0], DAYS[1]], "the third one has the files of the last one, which serves"
    before = sum(path.stat().st_size for path in (root / "nights" / DAYS[0]).rglob("*.*") if path.is_file())
    assert 0 < found[0].bytes < before
    for removal in found:
        apply(removal)
    left = sorted(
        str(path.relative_to(root / "nights" / DAYS[0])) for path in (root / "nights" / DAYS[0]).rglob("*") if path.is_file()
    )
    small = ["config.yaml", "evaluation/leave_last_out/metrics.json", "lineage.json", "metrics.jsonl", "night.json"]
    assert left == [*small, "report.html", "status.json"]
    assert what_to_remove(read_nights(str(root)), registry, 1) == []
    assert SequenceDataset(f"{root}/nights/{DAYS[3]}/dataset").catalogue.num_items == 80
    assert due(tiny(root, log, f"night.date={DAYS[3]}", f"night.from_date={DAYS[0]}")) == ([], []), "what is over stays over"


def test_an_unfinished_night_keeps_what_it_goes_on_from(root, log):
    for day in DAYS[:2]:
        ended(tiny(root, log, f"night.date={day}"), promoted=day == DAYS[0])
    config = tiny(root, log, f"night.date={DAYS[2]}")
    prepared(config)
    for name in ("champion", "candidate"):
        os.remove(f"{root}/registry/channels/{name}.json")
    assert what_to_remove(read_nights(str(root)), registry_of(config), 1) == []


def test_a_dry_run_before_the_first_night_promises_nothing(root, log, capsys):
    run_nights(tiny(root, log, f"night.date={DAYS[0]}", "night.dry_run=true", "night.cost_per_hour=2"))
    said = capsys.readouterr().out
    assert "expected: unknown, since no night is done yet" in said
    assert "2.00" not in said


def test_a_dry_run_says_what_would_run_and_changes_nothing(root, log, capsys):
    ended(tiny(root, log, f"night.date={DAYS[0]}"))
    (root / "nights" / DAYS[0] / "metrics.jsonl").write_text('{"kind": "stage", "stage": "train", "seconds": 1800}\n')
    prepared(tiny(root, log, f"night.date={DAYS[1]}"))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    settings = (f"night.date={DAYS[2]}", f"night.from_date={DAYS[1]}", "night.dry_run=true", "night.cost_per_hour=2")
    run_nights(tiny(root, log, *settings, "night.keep_nights=1"))
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    said = " ".join(capsys.readouterr().out.split())
    size = partition(log, DAYS[2]).stat().st_size
    assert f"{DAYS[1]} prepare committed" in said
    assert f"{DAYS[2]} prepare would run 1 files, {size:,} bytes unknown" in said
    assert f"{DAYS[2]} train would run 30 min 00 s" in said
    assert "expected: 1 h 00 min, 2.00 at night.cost_per_hour=2" in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["night.date=21.11.2026"], r"night\.date=21\.11\.2026: is no date; write it as 2026-11-21"),
        (
            ["night.date=2026-11-21", "night.from_date=2026-11-22"],
            r"night\.from_date=2026-11-22: is after night\.date=2026-11-21",
        ),
        (["night.partition_format='%d.%m.%Y'"], r"night\.partition_format=.*do not sort like dates"),
        (["night.late_days=-2"], r"night\.late_days=-2: is a number of days"),
        (["log.path=/log"], r"night\.date is not set"),
        (["night.date=2026-11-21"], r"log\.path is not set"),
        (["night.date=2026-11-21", "log.path=/log", "dataset.dir=/data"], r"dataset\.dir=/data: each night has its own"),
        (
            ["night.date=2026-11-21", "night.from_date=2026-11-20", "night.catch_up=false", "log.path=/log"],
            r"night\.from_date=2026-11-20: contradicts night\.catch_up=false",
        ),
        (
            ["night.date=2026-11-21", "log.path=/log", "night.warm_steps=100", "train.validate_every=150"],
            r"night\.warm_steps=100: is below train\.validate_every=150.*set train\.validate_every=100 or lower",
        ),
    ],
)
def test_settings_that_nights_cannot_have_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check_settings(load_config(None, overrides))


def test_the_table_of_nights_says_what_became_of_each(root, log):
    ended(tiny(root, log, f"night.date={DAYS[0]}"))
    lineage = {
        "result": "refused",
        "dataset": {"rows_read": 1234, "new_items": 5},
        "evaluation": {
            "model": {"recall@10": 0.25},
            "beside_previous": {"recall@10": {"value": -0.02, "low": -0.03, "high": -0.01}},
        },
        "serving": "2025-01-26-good",
    }
    record = prepared(tiny(root, log, f"night.date={DAYS[1]}"))
    storage.write_json(f"{record.url}/lineage.json", lineage)
    storage.write_bytes(f"{record.url}/metrics.jsonl", b'{"kind": "stage", "stage": "train", "seconds": 5400}\n')
    table = nights_table([describe_night(NightRecord(record.date, record.url))]).splitlines()
    assert table[2].split() == (
        ["2025-01-27", "refused", "1,234", "5", "0.25000", "-0.02000", "-0.03000", "to", "-0.01000", "1.50", "2025-01-26-good"]
    )
