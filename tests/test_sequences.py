import contextlib
import functools
import gzip
import hashlib
import http.server
import os
import shutil
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lrurec_dist import storage
from lrurec_dist.data.catalogue import build_catalogue, save_catalogue
from lrurec_dist.data.prepare import _assign_ids_and_shards, prepare_dataset, shard_of
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import CatalogueError, ConfigError, DataQualityError, IntegrityError, LrurecError

pytestmark = pytest.mark.usefixtures("ray_session")

Row = tuple[Any, Any, Any]  # user, item, time

OPTIONS = {
    "log_format": "auto",
    "user_column": "user",
    "item_column": "item",
    "timestamp_column": "time",
    "timestamp_unit": "s",
    "max_rejected_share": 0.06,  # exactly what DIRTY is of DIRTY + CLEAN
    "shards": 3,
}


def make_clean() -> list[Row]:
    """94 events of 11 users: many at the same time, one repeated, a user with one event and one with two."""
    draw = np.random.default_rng(11)
    columns = (draw.integers(*bounds, 89).tolist() for bounds in ((1, 10), (1, 25), (0, 12)))
    return [*zip(*columns, strict=True), (100, 3, 5), (101, 4, 9), (101, 3, 9), (1, 1, 0), (1, 1, 0)]


CLEAN = make_clean()
DIRTY: list[Row] = [(None, 99, 3), (None, None, None), (1, None, 3), (2, 5, None), (2, 5, 2**62), (3, 98, 2**62)]
REASONS = {"null_user_key": 2, "null_item_key": 1, "null_timestamp": 1, "unparsable_timestamp": 2}


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


def prepare(url: Path | str, log_path: Path | str, **changes: Any) -> tuple[SequenceDataset, bool]:
    return prepare_dataset(str(url), log_path=str(log_path), **OPTIONS | changes)


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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("module")


@pytest.fixture(scope="module")
def log(place: Path) -> str:
    """The dirty log as three Parquet files behind a glob, beside a file that is none."""
    write_parquet(place / "log", CLEAN + DIRTY, files=3)
    (place / "log" / "_SUCCESS").touch()
    return f"{place}/log/*.parquet"


@pytest.fixture(scope="module")
def dataset(place: Path, log: str) -> SequenceDataset:
    """The dirty log, prepared in three shards."""
    prepared, was_there = prepare(place / "dataset", log)
    assert not was_there
    return prepared


@pytest.fixture
def copy(dataset: SequenceDataset, tmp_path: Path) -> Path:
    """The prepared dataset at a place of the test's own."""
    return Path(shutil.copytree(dataset.url, tmp_path / "copy"))


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


def test_counts_and_times_of_items_are_those_of_the_usable_rows(dataset):
    times = defaultdict(list)
    for _, item, time in CLEAN:
        times[item].append(time * 1_000_000)
    for row in dataset.catalogue.table.to_pylist():
        seen = times[row["item_key"]]
        assert (row["count"], row["first_seen"], row["last_seen"]) == (len(seen), min(seen), max(seen))


@pytest.mark.parametrize(("shards", "files"), [(1, 1), (8, 4), (3, 5)])
def test_sequences_and_ids_do_not_depend_on_shards_files_or_the_order_of_rows(dataset, tmp_path, shards, files):
    other, _ = prepare(tmp_path / "dataset", write_parquet(tmp_path / "log", CLEAN + DIRTY, files, seed=files), shards=shards)
    assert sequences_of(other) == expected_sequences(CLEAN)
    assert other.catalogue.fingerprint == dataset.catalogue.fingerprint
    assert other.manifest["rows_rejected"] == REASONS
    for name in other.shard_names:
        users = other.read_shard(name).user_keys
        assert {f"sequences/part-{shard:05d}.parquet" for shard in shard_of(users, shards)} == {name}
    if shards == OPTIONS["shards"]:
        assert other.manifest["files"] == dataset.manifest["files"]  # to the byte


def test_csv_keys_stay_the_text_they_are(tmp_path):
    prepared, _ = prepare(tmp_path / "dataset", write_csv(tmp_path / "log", CLEAN + DIRTY))
    as_text = [(f"{user:03d}", f"{item:03d}", time) for user, item, time in CLEAN]
    assert "007" in sequences_of(prepared)
    assert sequences_of(prepared) == expected_sequences(as_text)
    assert prepared.manifest["rows_rejected"] == REASONS


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
        ({"log_format": "csv", "shards": 4}, "format, shards"),
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
    with pytest.raises(DataQualityError, match=r"schema_version=0, this code reads 1; prepare it again"):
        SequenceDataset(str(copy))


def test_an_interrupted_preparation_is_redone_cleanly(copy, log, dataset):
    (copy / storage.MANIFEST).unlink()
    (copy / dataset.shard_names[0]).unlink()
    (copy / dataset.shard_names[1]).write_bytes(b"half")
    (copy / "sequences" / "part-00077.parquet").write_bytes(b"of another number of shards")
    (copy / "catalogue" / "part-00009.parquet").write_bytes(b"stray")
    redone, was_there = prepare(copy, log)
    assert not was_there
    assert redone.manifest == dataset.manifest
    assert SequenceDataset(str(copy), verify=True).shard_names == dataset.shard_names


def test_a_task_does_not_remember_the_catalogue_that_lay_here_before(tmp_path):
    keys = pa.array(["a", "b"], pa.large_string())
    events = pa.table({"user_key": keys, "item_key": keys, "timestamp": [0, 0], "reason": pa.nulls(2)})
    for first_seen in ([1, 2], [2, 1]):
        catalogue = build_catalogue(pa.table({"item_key": keys, "count": [1, 1], "first_seen": first_seen, "last_seen": [2, 2]}))
        save_catalogue(catalogue, str(tmp_path))
        assert _assign_ids_and_shards(events, str(tmp_path), catalogue.fingerprint, 1)["item_id"].to_pylist() == first_seen
    with pytest.raises(CatalogueError, match="expected 0000"):
        _assign_ids_and_shards(events, str(tmp_path), "0000", 1)


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


@pytest.mark.parametrize("values", [["10"], [1.5]], ids=["text", "float"])
@pytest.mark.parametrize("column", ["user", "item", "time"])
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


def test_a_dataset_with_a_parent_keeps_the_ids_of_the_parent_and_appends_new_items(dataset, tmp_path):
    later = [(1, 500, -5), (1, 3, 20), (7, 400, 21), (7, 4, 22), (7, 4, 23)]
    log = write_parquet(tmp_path / "log", later)
    child, _ = prepare(tmp_path / "child", log, parent=dataset.url)
    assert child.catalogue.keys.to_pylist() == [*expected_keys(CLEAN), 500, 400]
    assert child.manifest["new_items"] == 2
    assert sequences_of(child) == expected_sequences(later)
    assert prepare(tmp_path / "child", log, parent=dataset.url)[1]
    with pytest.raises(ConfigError, match="prepared with other parent_catalogue"):
        prepare(tmp_path / "child", log)


@pytest.mark.parametrize("shards", [1, 3, 8, 1000])
@pytest.mark.parametrize("keys", [["a", "é", "a", ""], [1, -5, 1, 2**63 - 1]], ids=["strings", "integers"])
def test_a_shard_is_a_hash_of_the_key_that_everyone_can_compute(keys, shards):
    expected = [int.from_bytes(hashlib.blake2b(str(key).encode(), digest_size=8).digest(), "little") % shards for key in keys]
    assert shard_of(pa.array(keys), shards).tolist() == expected
    assert shard_of(pa.chunked_array([keys[:1], keys[1:]]), shards).tolist() == expected
    assert shard_of(pa.array(keys[2:]), shards).tolist() == expected[2:]


def test_users_spread_evenly_over_shards():
    users = np.bincount(shard_of(pa.array([f"user-{index}" for index in range(8_000)]), 8), minlength=8)
    assert users.min() > 850  # 1,000 each; five standard deviations are 148
