"""Night after night into one dataset, against a rebuild."""

import itertools
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lrurec_dist import storage
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import ConfigError, DataQualityError, IntegrityError
from tests.dirty_log import CLEAN, expected_keys, expected_sequences, kept_files, prepare, sequences_of, write_csv, write_parquet

pytestmark = pytest.mark.usefixtures("ray_session")


def test_a_rebuild_keeps_the_ids_of_the_parent_and_appends_new_items(dataset, tmp_path):
    later = [(1, 500, -5), (1, 3, 20), (7, 400, 21), (7, 4, 22), (7, 4, 23)]
    log = write_parquet(tmp_path / "log", later)
    child, _ = prepare(tmp_path / "child", log, parent=dataset.url, rebuild=True)
    assert child.catalogue.keys.to_pylist() == [*expected_keys(CLEAN), 500, 400]
    assert child.manifest["new_items"] == 2
    assert sequences_of(child) == expected_sequences(later)
    assert prepare(tmp_path / "child", log, parent=dataset.url, rebuild=True)[1]
    with pytest.raises(ConfigError, match="prepared with other parent"):
        prepare(tmp_path / "child", log)


def nights_of(directory: Path) -> list[str]:
    """CLEAN as four nights of a partitioned log: by time, but some events late, some twice, with some unusable rows."""
    draw = np.random.default_rng(4)
    by_time = sorted(CLEAN, key=lambda row: row[2])
    bounds = [0, 30, 55, 80, len(by_time)]
    nights = [by_time[begin:end] for begin, end in itertools.pairwise(bounds)]
    late = [nights[0].pop(at) for at in (3, 11, 17)]
    nights[2] += [*late, *nights[1][4:9]]
    nights[3] += [nights[0][0], (None, 3, 8)]
    for index, night in enumerate(nights):
        folder = directory / f"date=2026-11-0{index + 1}"
        folder.mkdir(parents=True)
        rows = [night[at] for at in draw.permutation(len(night))]
        columns = {name: pa.array([row[at] for row in rows], pa.int64()) for at, name in enumerate(("user", "item", "time"))}
        pq.write_table(pa.table(columns), folder / "part-0.parquet")
    return [str(directory / f"date=2026-11-0{index + 1}") for index in range(4)]


@pytest.mark.parametrize("limit", [0, 6])
@pytest.mark.usefixtures("by")
def test_merging_night_by_night_equals_a_rebuild_to_the_byte(tmp_path, limit):
    nights_of(tmp_path / "log")
    rules = {"drop_duplicates": True, "max_user_events": limit, "max_rejected_share": 1.0}
    parent = ""
    for night in range(1, 5):
        url = tmp_path / f"night-{night}"
        merged, _ = prepare(url, tmp_path / "log", to_partition=f"2026-11-0{night + 1}", parent=parent, **rules)
        parent = str(url)
        assert merged.manifest["rows_read"] < 40, "a night reads its own files alone"
    assert sum(merged.manifest["events_dropped"].values()) >= 1
    rebuilt, _ = prepare(tmp_path / "rebuilt", tmp_path / "log", parent=parent, rebuild=True, **rules)
    assert rebuilt.manifest["rows_read"] > 90
    assert kept_files(rebuilt) == kept_files(merged)
    assert rebuilt.manifest["interactions"] == merged.manifest["interactions"]
    if not limit:
        assert sequences_of(merged) == sequences_of(
            prepare(tmp_path / "distinct", write_parquet(tmp_path / "d", list(set(CLEAN))), parent=parent, rebuild=True)[0]
        )


def test_without_late_events_nights_give_the_ids_of_a_rebuild_from_nothing(tmp_path):
    for night, (begin, end) in enumerate([(0, 4), (4, 8), (8, 99)]):
        write_parquet(tmp_path / f"log-{night}", [row for row in CLEAN if begin <= row[2] < end])
        logs = ",".join(str(tmp_path / f"log-{index}") for index in range(night + 1))
        merged, _ = prepare(tmp_path / f"night-{night}", logs, parent=str(tmp_path / f"night-{night - 1}") if night else "")
    rebuilt, _ = prepare(tmp_path / "rebuilt", write_parquet(tmp_path / "log", CLEAN))
    assert kept_files(merged) == kept_files(rebuilt)


def test_a_night_without_new_files_costs_a_manifest_and_says_so(dataset, log, tmp_path):
    url = dataset.url
    for night in ("first", "second"):
        quiet, _ = prepare(tmp_path / night, log, parent=url)
        assert (quiet.manifest["rows_read"], quiet.manifest["interactions_of_parent"]) == (0, len(CLEAN))
        assert storage.list_files(quiet.url) == [storage.MANIFEST]
        assert quiet.place == dataset.url
        assert sequences_of(quiet) == sequences_of(dataset)
        assert quiet.identity == dataset.identity
        assert prepare(tmp_path / night, log, parent=url)[1], "found, as any other"
        url = quiet.url
    later, _ = prepare(tmp_path / "later", f"{log},{write_parquet(tmp_path / 'more', [(1, 3, 51)])}", parent=url)
    assert later.manifest["interactions"] == len(CLEAN) + 1
    assert later.manifest["rows_read"] == 1


def test_a_quiet_night_whose_content_was_replaced_is_found_out(copy, log, tmp_path):
    prepare(tmp_path / "quiet", log, parent=str(copy))
    manifest = storage.read_json(f"{copy}/{storage.MANIFEST}")
    manifest["files"].popitem()
    storage.write_json(f"{copy}/{storage.MANIFEST}", manifest)
    with pytest.raises(IntegrityError, match="that was replaced; prepare it again"):
        SequenceDataset(str(tmp_path / "quiet"))


def test_users_and_items_asked_to_be_forgotten_are_gone_and_their_ids_stay(dataset, log, tmp_path):
    (tmp_path / "users.txt").write_text("3\n5\n404\n")
    (tmp_path / "items.txt").write_text("4\n")
    forgotten, _ = prepare(
        tmp_path / "night",
        log,
        parent=dataset.url,
        deleted_users=str(tmp_path / "users.txt"),
        deleted_items=str(tmp_path / "items.txt"),
    )
    left = {
        user: [item for item in items if item != 4] for user, items in expected_sequences(CLEAN).items() if user not in (3, 5)
    }
    assert sequences_of(forgotten) == {user: items for user, items in left.items() if items}
    assert forgotten.catalogue.fingerprint == dataset.catalogue.fingerprint
    status = dict(zip(forgotten.catalogue.keys.to_pylist(), forgotten.catalogue.table["status"].to_pylist(), strict=True))
    assert [key for key, value in status.items() if value == "deleted"] == [4]
    dropped = forgotten.manifest["events_dropped"]
    assert sum(dropped.values()) == len(CLEAN) - forgotten.manifest["interactions"]
    later, _ = prepare(tmp_path / "later", write_parquet(tmp_path / "more", [(1, 4, 50), (1, 3, 51)]), parent=forgotten.url)
    assert later.manifest["events_dropped"] == {"of a deleted item": 1}, "a deleted item stays deleted"


def test_a_merge_of_files_that_changed_or_with_other_rules_is_refused(dataset, log, place, tmp_path):
    source = place / "log" / "part-0.parquet"
    times = source.stat()
    os.utime(source, (0, 0))
    with pytest.raises(DataQualityError, match=r"part-0.parquet changed after .* set dataset\.rebuild=true"):
        prepare(tmp_path / "night", log, parent=dataset.url)
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ConfigError, match=r"prepared with other drop_duplicates, .* set dataset\.rebuild=true"):
        prepare(tmp_path / "night", log, parent=dataset.url, drop_duplicates=True)
    with pytest.raises(ConfigError, match=r"dataset\.shards=4: the parent .* has 3"):
        prepare(tmp_path / "night", log, parent=dataset.url, shards=4)


def test_keys_of_another_type_than_the_parents_are_a_data_error(dataset, tmp_path):
    with pytest.raises(DataQualityError, match=r"user keys are int64 in some files and large_string in others"):
        prepare(tmp_path / "night", write_csv(tmp_path / "log", CLEAN), parent=dataset.url)
