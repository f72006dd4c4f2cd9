"""From a log to a dataset, by both ways of preparing it."""

import contextlib
import functools
import http.server
import itertools
import os
import shutil
import threading
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec_dist import storage
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.data.shards import shard_of
from lrurec_dist.errors import CatalogueError, ConfigError, DataQualityError, IntegrityError, LrurecError
from tests.dirty_log import (
    CLEAN,
    DIRTY,
    OPTIONS,
    REASONS,
    expected_keys,
    expected_sequences,
    kept_files,
    prepare,
    sequences_of,
    write_csv,
    write_parquet,
)

pytestmark = pytest.mark.usefixtures("ray_session")


def test_sequences_are_ordered_by_time_then_item_id(dataset):
    assert len({row[:1] + row[2:] for row in CLEAN}) < len(CLEAN)  # there are ties
    assert sequences_of(dataset) == expected_sequences(CLEAN)


def test_ids_follow_first_time_then_key_and_unusable_rows_bring_no_items(dataset):
    assert dataset.catalogue.keys.to_pylist() == expected_keys(CLEAN)
    assert dataset.num_items == dataset.catalogue.num_items == len(expected_keys(CLEAN))


def test_stored_times_are_those_of_the_events(dataset):
    for name in dataset.shard_names:
        table = storage.read_table(storage.join(dataset.url, name))
        for user, times in zip(table["user_key"].to_pylist(), table["timestamps"].to_pylist(), strict=True):
            assert times == sorted(time * 1_000_000 for who, _, time in CLEAN if who == user)


def test_the_manifest_accounts_for_every_row(dataset):
    lengths = sorted(map(len, expected_sequences(CLEAN).values()))
    figures = {
        "rows_read": len(CLEAN) + len(DIRTY),
        "rows_rejected": REASONS,
        "interactions": len(CLEAN),
        "users": 11,
        "users_evaluable": 9,
        "users_too_short_to_evaluate": 2,  # test_sequences_are_ordered… finds them in the dataset all the same
        "new_items": len(expected_keys(CLEAN)),
        "time_range": [0, 11_000_000],
        "time_unit": "us",
    }
    assert {name: dataset.manifest[name] for name in figures} == figures
    assert [dataset.manifest["length_percentiles"][share] for share in ("0", "50", "100")] == [
        lengths[0],
        lengths[5],
        lengths[-1],
    ]


def test_the_manifest_says_what_was_read_and_written_and_how_long_it_took(dataset, log):
    facts = dataset.manifest
    assert facts["bytes_read"] == sum(Path(file).stat().st_size for file in storage.expand(log))
    beside = {f"{dataset.url}/{storage.MANIFEST}"}
    assert facts["bytes_written"] == sum(Path(file).stat().st_size for file in storage.expand(dataset.url).keys() - beside)
    seconds = dict(facts["seconds"])
    whole = seconds.pop("all")
    assert set(seconds) == {"read", "number", "merge", "commit"}
    assert sum(seconds.values()) == pytest.approx(whole, abs=0.005)  # each is rounded to a millisecond


@pytest.mark.parametrize("shards", [3, 40])  # 40: some without anybody
def test_the_lengths_of_each_shard_are_kept_beside_the_sequences(tmp_path, log, shards):
    prepared, _ = prepare(tmp_path / "dataset", log, shards=shards)
    kept = SequenceDataset(prepared.url).lengths
    assert list(kept) == prepared.shard_names
    for name, (lengths, users) in kept.items():
        assert np.repeat(lengths, users).tolist() == sorted(prepared.read_shard(name).lengths)
        assert np.all(np.diff(lengths) > 0)
    assert any(len(lengths) == 0 for lengths, _ in kept.values()) == (shards == 40)


def test_counts_and_times_of_items_are_those_of_the_usable_rows(dataset):
    times = defaultdict(list)
    for _, item, time in CLEAN:
        times[item].append(time * 1_000_000)
    for row in dataset.catalogue.table.to_pylist():
        seen = times[row["item_key"]]
        assert (row["count"], row["first_seen"], row["last_seen"]) == (len(seen), min(seen), max(seen))


@pytest.mark.parametrize(("shards", "files"), [(1, 1), (8, 4), (3, 5)])
def test_sequences_and_ids_do_not_depend_on_shards_files_order_or_tasks(dataset, tmp_path, by, shards, files):
    other, _ = prepare(tmp_path / "dataset", write_parquet(tmp_path / "log", CLEAN + DIRTY, files, seed=files), shards=shards)
    assert sequences_of(other) == expected_sequences(CLEAN)
    assert other.catalogue.fingerprint == dataset.catalogue.fingerprint
    assert other.manifest["rows_rejected"] == REASONS
    assert other.manifest["prepared"] == by
    for name in other.shard_names:
        users = other.read_shard(name).user_keys
        assert {f"sequences/part-{shard:05d}.parquet" for shard in shard_of(users, shards)} <= {name}
    if shards == OPTIONS.shards:
        assert kept_files(other) == kept_files(dataset)  # to the byte


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize(("shards", "files"), [(1, 1), (3, 5)])
def test_first_ids_by_count_put_the_frequent_first_and_later_nights_append(tmp_path, shards, files):
    log = write_parquet(tmp_path / "log", CLEAN + DIRTY, files, seed=files)
    counted, _ = prepare(tmp_path / "counted", log, shards=shards, first_ids="count")
    occurs = Counter(item for _, item, _ in CLEAN)
    by_count = sorted(expected_keys(CLEAN), key=lambda item: -occurs[item])  # stable: ties by first time, then by key
    assert counted.catalogue.keys.to_pylist() == by_count != expected_keys(CLEAN)
    assert counted.catalogue.table["count"].to_pylist() == sorted(occurs.values(), reverse=True)
    for name in counted.shard_names:
        shard = counted.read_shard(name, timestamps=True)
        for begin, end in itertools.pairwise(shard.offsets):
            pairs = list(zip(shard.timestamps[begin:end], shard.item_ids[begin:end], strict=True))
            assert pairs == sorted(pairs), "at the same time by item_id, whatever gave the ids"
    assert counted.manifest["inputs"]["first_ids"] == "count"
    with pytest.raises(ConfigError, match="with other first_ids"):
        prepare(tmp_path / "counted", log, shards=shards)
    more = write_parquet(tmp_path / "more", [(1, 500, 20), (1, 400, 21), (2, 400, 22)])
    later, _ = prepare(tmp_path / "later", f"{log},{more}", parent=counted.url, shards=shards, first_ids="count")
    assert later.catalogue.keys.to_pylist() == [*by_count, 500, 400]


def test_csv_keys_stay_the_text_they_are(tmp_path):
    prepared, _ = prepare(tmp_path / "dataset", write_csv(tmp_path / "log", CLEAN + DIRTY))
    as_text = [(f"{user:03d}", f"{item:03d}", time) for user, item, time in CLEAN]
    assert "007" in sequences_of(prepared)
    assert sequences_of(prepared) == expected_sequences(as_text)
    as_read = REASONS | {"unparsable_timestamp": REASONS["out_of_range_timestamp"]}
    assert prepared.manifest["rows_rejected"] == {name: n for name, n in as_read.items() if not name.startswith("out")}


def test_a_second_call_finds_the_dataset_and_leaves_it_alone(dataset, log):
    before = storage.expand(dataset.url)
    again, was_there = prepare(dataset.url, log, log_format="parquet")  # what auto had found
    assert was_there
    assert again.manifest == dataset.manifest
    assert storage.expand(dataset.url) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"shards": 4}, "shards"),
        ({"timestamp_unit": "ms"}, "timestamp_unit"),
        ({"user_column": "item", "item_column": "user"}, "columns"),
        ({"keep": ("item > 3",), "shards": 4}, "keep, shards"),
    ],
)
def test_a_dataset_prepared_in_another_way_is_not_reused_or_replaced(dataset, log, changes, named):
    with pytest.raises(ConfigError, match=rf"dataset\.dir={dataset.url}: .* with other {named}; choose another dataset\.dir"):
        prepare(dataset.url, log, **changes)
    assert SequenceDataset(dataset.url, verify=True).manifest == dataset.manifest


@pytest.mark.parametrize("change", ["a new file", "a changed file"])
def test_a_dataset_of_other_sources_is_not_reused(dataset, log, place, change):
    source = place / "log" / "part-0.parquet"
    times = source.stat()
    if change == "a new file":
        shutil.copy(source, place / "log" / "part-9.parquet")
    else:
        os.utime(source, (0, 0))
    with pytest.raises(ConfigError, match="prepared with other sources"):
        prepare(dataset.url, log)
    (place / "log" / "part-9.parquet").unlink(missing_ok=True)
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert prepare(dataset.url, log)[1]


def test_a_dataset_with_a_changed_file_is_found_out(copy, log):
    with open(copy / "catalogue" / "part-00000.parquet", "r+b") as file:
        file.write(b"X")
    with pytest.raises(IntegrityError, match=r"catalogue/part-00000\.parquet changed after the commit"):
        prepare(copy, log)


def test_a_dataset_of_another_schema_or_catalogue_is_not_opened(copy):
    manifest = storage.read_json(f"{copy}/{storage.MANIFEST}")
    storage.write_json(f"{copy}/{storage.MANIFEST}", manifest | {"catalogue_fingerprint": "0" * 16})
    with pytest.raises(CatalogueError, match="but the manifest names 0000000000000000"):
        _ = SequenceDataset(str(copy)).catalogue
    storage.write_json(f"{copy}/{storage.MANIFEST}", manifest | {"schema_version": 0})
    with pytest.raises(DataQualityError, match=r"schema_version=0, this code reads 3; prepare it again"):
        SequenceDataset(str(copy))


def test_an_interrupted_preparation_is_redone_cleanly(copy, log, dataset):
    (copy / storage.MANIFEST).unlink()
    (copy / dataset.shard_names[0]).unlink()
    (copy / dataset.shard_names[1]).write_bytes(b"half")
    (copy / "sequences" / "part-00077.parquet").write_bytes(b"of another number of shards")
    (copy / "catalogue" / "part-00009.parquet").write_bytes(b"stray")
    redone, was_there = prepare(copy, log)
    assert not was_there
    assert redone.manifest["files"] == dataset.manifest["files"]
    assert SequenceDataset(str(copy), verify=True).shard_names == dataset.shard_names


def test_preparation_never_deletes_the_log(tmp_path):
    log = write_parquet(tmp_path / "log", CLEAN)
    with contextlib.suppress(LrurecError):
        prepare(log, log)  # dataset.dir is the directory of the log
    assert pq.read_table(f"{log}/part-0.parquet").num_rows == len(CLEAN)


class RangeRequestHandler(http.server.SimpleHTTPRequestHandler):
    """Serves parts of files, as every object store does and Python's own server does not."""

    def do_GET(self):
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = 0, len(data) - 1
        if asked := self.headers["Range"]:
            first, last = (int(bound) for bound in asked.removeprefix("bytes=").split("-"))
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(data[first : last + 1])


def test_a_log_on_a_remote_file_system_gives_the_same_dataset(tmp_path):
    folder = write_parquet(tmp_path / "log", CLEAN)
    handler = functools.partial(RangeRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        remote, _ = prepare(tmp_path / "remote", f"http://127.0.0.1:{server.server_port}/part-0.parquet")
        server.shutdown()
    local, _ = prepare(tmp_path / "local", f"{folder}/part-0.parquet")
    assert remote.manifest["interactions"] == len(CLEAN)
    assert remote.manifest["files"] == local.manifest["files"]


@pytest.mark.parametrize(("rows", "limit", "share"), [(CLEAN + DIRTY, 0.059, "6.00% of 100"), (DIRTY, 1.0, "100.00% of 6")])
def test_too_many_or_only_unusable_rows_stop_the_job_with_their_reasons(tmp_path, rows, limit, share):
    with pytest.raises(DataQualityError) as error:
        prepare(tmp_path / "dataset", write_parquet(tmp_path / "log", rows), max_rejected_share=limit)
    message = str(error.value)
    assert message.startswith(f"log.max_rejected_share={limit}: {share} rows are unusable (")
    assert all(f"{reason} {count}" in message for reason, count in REASONS.items())
    assert not storage.is_committed(f"{tmp_path}/dataset")


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_an_empty_log_is_an_error(tmp_path, kind):
    path = {"parquet": write_parquet, "csv": write_csv}[kind](tmp_path / "log", [])
    with pytest.raises(DataQualityError, match="the log is empty"):
        prepare(tmp_path / "dataset", path)


@pytest.mark.parametrize(
    ("column", "values"), [("user", ["10"]), ("item", ["10"]), ("user", [1.5]), ("item", [1.5]), ("time", [1.5])]
)
def test_a_later_file_with_a_column_of_another_type_is_a_data_error(tmp_path, column, values):
    log = write_parquet(tmp_path / "log", CLEAN)
    pq.write_table(pa.table({"user": [1], "item": [1], "time": [1]} | {column: values}), f"{log}/part-1.parquet")
    with pytest.raises(DataQualityError, match=column):
        prepare(tmp_path / "dataset", log)


def test_float_keys_are_a_data_error_naming_column_and_way_out(tmp_path):
    pq.write_table(pa.table({"user": [1.0], "item": [1], "time": [1]}), tmp_path / "log.parquet")
    with pytest.raises(DataQualityError, match=r"column user is double; keys are integers or strings, so cast it"):
        prepare(tmp_path / "dataset", tmp_path / "log.parquet")


def test_a_later_file_that_lacks_a_column_or_cannot_be_read_is_a_data_error(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "a.csv").write_text("user,item,time\n1,1,1\n")
    for content in ("user,time\n1,1\n", ""):
        (tmp_path / "log" / "b.csv").write_text(content)
        with pytest.raises(DataQualityError):
            prepare(tmp_path / "dataset", tmp_path / "log")


def test_what_is_quarantined_can_be_mended_and_read_again(dataset):
    quarantined = pq.read_table(f"{dataset.url}/quarantine")
    assert sorted(quarantined["_reason"].to_pylist()) == sorted(reason for reason, n in REASONS.items() for _ in range(n))
    rows = list(zip(*(quarantined[name].to_pylist() for name in ("user", "item", "time")), strict=True))
    assert sorted(rows, key=str) == sorted(DIRTY, key=str)
    for row, source, number in zip(rows, quarantined["_source"].to_pylist(), quarantined["_row"].to_pylist(), strict=True):
        there = pq.read_table(source).slice(number, 1).to_pylist()[0]
        assert (there["user"], there["item"], there["time"]) == row


def test_a_log_none_of_whose_rows_is_wanted_is_an_error(tmp_path):
    with pytest.raises(DataQualityError, match=r"none of 94 rows passes log\.keep"):
        prepare(tmp_path / "dataset", write_parquet(tmp_path / "log", CLEAN), keep=("item > 1000",))


@settings(deadline=None, max_examples=15)
@given(
    rows=st.lists(
        st.tuples(
            st.one_of(st.none(), st.integers(1, 6)),
            st.one_of(st.none(), st.integers(1, 8)),
            st.one_of(st.none(), st.integers(0, 5), st.just(2**62)),
        ),
        min_size=1,
        max_size=60,
    ),
    files=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_every_row_read_is_kept_quarantined_filtered_or_dropped(tmp_path_factory, rows, files, seed):
    folder = tmp_path_factory.mktemp("dirty")
    log = write_parquet(folder / "log", [*rows, (1, 1, 1)], files, seed)
    options = {"max_rejected_share": 1.0, "keep": ("item < 7",), "until": 4_000_000, "drop_duplicates": True}
    dataset, _ = prepare(folder / "dataset", log, **options)
    facts = dataset.manifest
    assert facts["rows_read"] == len(rows) + 1
    assert facts["rows_read"] == facts["interactions"] + sum(
        sum(facts[name].values()) for name in ("rows_rejected", "rows_filtered", "events_dropped")
    )
    wanted = {row for row in [*rows, (1, 1, 1)] if None not in row and row[1] < 7 and row[2] < 4}
    assert facts["interactions"] == len(wanted)
    quarantined = storage.list_files(f"{dataset.url}/quarantine")
    assert sum(pq.read_table(f"{dataset.url}/quarantine/{name}").num_rows for name in quarantined) == sum(
        facts["rows_rejected"].values()
    )


def test_a_user_with_most_and_an_item_with_half_of_a_million_events_do_no_harm(tmp_path, by):
    draw = np.random.default_rng(0)
    rows = 1_000_000
    users, items = draw.integers(1, 2000, rows), draw.integers(2, 5000, rows)
    users[: rows * 6 // 10], items[::2] = 7, 1
    table = pa.table({"user": users, "item": items, "time": np.arange(rows)})
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=100_000)
    dataset, _ = prepare(tmp_path / "dataset", tmp_path / "log.parquet")
    assert dataset.manifest["prepared"] == by
    assert dataset.manifest["interactions"] == rows
    assert dataset.manifest["length_percentiles"]["100"] == np.bincount(users).max() > rows / 2
    assert dataset.catalogue.table["count"].to_pylist()[0] == rows / 2
    capped, _ = prepare(tmp_path / "capped", tmp_path / "log.parquet", max_user_events=1000)
    assert capped.manifest["length_percentiles"]["100"] == 1000
