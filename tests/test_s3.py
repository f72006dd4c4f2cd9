"""Storage on an S3 server in a process of its own, with faults on the wire."""

import gc
import json
import re
import threading
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
import pytest
import s3fs

from lrurec_dist import storage, stores
from lrurec_dist.errors import ConfigError, TryAgainError
from lrurec_dist.files import new_file
from tests.dirty_log import prepare
from tests.processes import killed_at
from tests.stores import BUCKET, S3Server

pytestmark = pytest.mark.usefixtures("no_wait")

UNAVAILABLE = {"action": "refuse", "status": 503, "code": "ServiceUnavailable"}
PASSING = {
    "unavailable": UNAVAILABLE,
    "internal error": {"action": "refuse", "status": 500, "code": "InternalError"},
    "throttled": {"action": "refuse", "status": 429, "code": "TooManyRequests"},
    "dropped": {"action": "drop"},
    "answer lost": {"action": "lose the answer"},
    "answer cut": {"action": "cut the answer"},
}
PART = bytes(17 << 20)  # more than one part


def unfinished_uploads() -> list[str]:
    fs, _ = storage.filesystem(f"s3://{BUCKET}")
    return [upload["Key"] for upload in fs.list_multipart_uploads(BUCKET)]


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_fails_twice_in_passing_then_succeeds(s3, bucket, fault):
    url = storage.join(bucket, "day=1", "file")
    s3.order({"request": "PUT", "times": 2, **fault})
    storage.write_bytes(url, b"content")
    s3.order({"request": "HEAD", "times": 2, **fault}, {"request": "GET .*/file", "times": 2, **fault})
    assert storage.file_sha256(url) == storage.sha256(b"content")
    s3.order({"request": "GET .*/file", "times": 2, **fault})
    assert storage.read_bytes(url) == b"content"
    s3.order({"request": "GET .*list-type", "times": 2, **fault})
    assert len(storage.expand(bucket)) == 1
    s3.order({"request": "GET .*list-type", "times": 2, **fault})
    assert len(storage.expand(f"{bucket}/*/file")) == 1
    s3.order({"request": "POST .*delete", "times": 2, **fault})
    storage.remove_tree(bucket)
    assert not storage.exists(bucket)


def test_a_body_that_came_too_slowly_is_sent_again(s3, bucket):
    s3.order({"request": "PUT", "times": 1, "action": "refuse", "status": 400, "code": "RequestTimeout"})
    storage.write_bytes(storage.join(bucket, "file"), b"content")
    assert len(s3.requests()) == 2


def test_a_server_that_stays_unavailable_says_where_and_how_often(s3, bucket):
    url = storage.join(bucket, "file")
    s3.order({"request": "/file", "times": 1000, **UNAVAILABLE})
    with pytest.raises(TryAgainError, match=rf"{url}: could not write in {stores.ATTEMPTS} attempts"):
        storage.write_bytes(url, b"content")
    assert len(s3.requests()) == stores.ATTEMPTS
    with pytest.raises(TryAgainError, match="could not read"):
        storage.read_bytes(url)


def test_a_server_that_does_not_answer_does_not_make_a_commit_look_absent(s3, bucket):
    storage.commit(bucket, {})
    s3.order({"request": "manifest", "times": 1000, **UNAVAILABLE})
    with pytest.raises(TryAgainError):
        storage.is_committed(bucket)


@pytest.fixture
def other_environment(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:  # noqa: ARG001
    """Sets variables that new connections obey."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield monkeypatch
    s3fs.S3FileSystem.clear_instance_cache()


def test_no_server_is_said_with_its_address(other_environment):
    other_environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(TryAgainError, match=rf"in {stores.ATTEMPTS} attempts.*127\.0\.0\.1:9"):
        storage.read_bytes(f"s3://{BUCKET}/file")


def test_missing_credentials_are_a_configuration_error(other_environment, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        other_environment.delenv(name)
    other_environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
    other_environment.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"NoCredentialsError.*credentials and endpoint in the environment"):
        storage.read_bytes(f"s3://{BUCKET}/file")


def test_what_is_not_there_is_asked_for_once(s3, bucket):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(bucket, "nothing"))
    requests = s3.requests()
    assert len(requests) == len(set(requests)) > 0


def test_missing_rights_are_named_and_not_tried_again(s3, bucket):
    url = storage.join(bucket, "file")
    s3.order({"request": "/file", "times": 9, "action": "refuse", "status": 403, "code": "AccessDenied"})
    with pytest.raises(ConfigError, match=rf"{url}: refuses to write \(PermissionError"):
        storage.write_bytes(url, b"content")
    assert len(s3.requests()) == 1


@pytest.mark.usefixtures("s3")
def test_a_bucket_is_never_made_by_writing_into_it():
    with pytest.raises(ConfigError, match="s3://no-such-bucket/file: cannot be written, the bucket or directory is not there"):
        storage.write_bytes("s3://no-such-bucket/file", b"content")
    with pytest.raises(ConfigError, match="not there"):
        storage.write_table("s3://no-such-bucket/file", pa.table({"a": [1]}))
    assert not storage.exists("s3://no-such-bucket")


def test_a_version_is_the_content_however_it_is_found(bucket):
    url = storage.join(bucket, "file")
    storage.write_bytes(url, b"one")
    first = storage.expand(bucket)
    assert first == storage.expand(url) == storage.expand(f"{bucket}/f*")
    storage.write_bytes(url, b"two")
    assert storage.expand(bucket).keys() == first.keys()
    assert storage.expand(bucket) != first
    storage.write_bytes(url, b"one")
    assert storage.expand(bucket) == first


def test_objects_that_stand_for_directories_are_no_files(bucket):
    fs, path = storage.filesystem(bucket)
    for marker in (path, f"{path}/day=1"):
        fs.call_s3("put_object", Bucket=BUCKET, Key=marker.partition("/")[2] + "/", Body=b"")
    storage.write_bytes(f"{bucket}/day=1/a.parquet", b"a")
    assert storage.list_files(bucket) == ["day=1/a.parquet"]
    for pattern in (bucket, f"{bucket}/", f"{bucket}/*", f"{bucket}/**"):
        assert list(storage.expand(pattern)) == [f"{bucket}/day=1/a.parquet"]
    storage.remove_tree(bucket)
    assert not storage.exists(bucket)


def test_an_upload_that_fails_half_way_leaves_the_old_content_and_no_parts(bucket):
    url = storage.join(bucket, "file")
    storage.write_bytes(url, b"old")

    def die_half_way() -> None:
        with new_file(url) as file:
            file.write(PART)
            assert unfinished_uploads(), "nothing was uploaded yet"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        die_half_way()
    gc.collect()  # fsspec completes uploads of files that it finds open
    assert unfinished_uploads() == []
    assert storage.read_bytes(url) == b"old"


def test_a_writer_that_is_killed_half_way_through_an_upload_shows_nothing(bucket):
    url = storage.join(bucket, "directory", "file")
    killed_at(
        "half",
        f"""
import time
from lrurec_dist.files import new_file
with new_file({url!r}) as file:
    file.write(bytes({len(PART)}))
    print("half", flush=True)
    time.sleep(600)
""",
    )
    assert unfinished_uploads(), "the process was not killed half-way"
    assert not storage.exists(url)
    assert storage.list_files(bucket) == []
    assert storage.expand(bucket) == {}
    storage.write_bytes(url, b"again")
    assert storage.list_files(bucket) == ["directory/file"]


@pytest.mark.parametrize("fault", ["dropped", "unavailable", "answer lost"])
@pytest.mark.parametrize("request_", ["POST .*uploads", "partNumber=2", "POST .*uploadId"])
def test_an_upload_in_parts_is_repeated_until_it_is_whole(s3, bucket, request_, fault):
    table = pa.table({"noise": np.random.default_rng(0).integers(0, 2**62, 2_500_000)})
    s3.order({"request": request_, "times": 1, **PASSING[fault]})
    entry = storage.write_table(storage.join(bucket, "table.parquet"), table)
    assert entry["bytes"] > len(PART)
    assert entry["sha256"] == storage.file_sha256(storage.join(bucket, "table.parquet"))


def test_a_commit_that_is_killed_half_way_commits_nothing(bucket):
    storage.write_bytes(storage.join(bucket, "a"), b"a")
    killed_at(
        "here",
        f"""
import time
from lrurec_dist import storage

def stop(*_):
    print("here", flush=True)
    time.sleep(600)

storage.write_json = stop
storage.commit({bucket!r}, {{}})
""",
    )
    assert not storage.is_committed(bucket)


def test_a_manifest_is_removed_before_what_it_lists(s3, bucket):
    storage.write_bytes(storage.join(bucket, "a"), b"a")
    storage.commit(bucket, {})
    s3.order({"request": "POST .*delete", "times": 1000, "after": 1, **UNAVAILABLE})
    with pytest.raises(TryAgainError, match="could not remove"):
        storage.remove_tree(bucket)
    assert storage.list_files(bucket) == ["a"]
    assert not storage.is_committed(bucket)


def test_a_removed_tree_leaves_its_neighbours_and_the_bucket(bucket):
    storage.write_bytes(f"{bucket}/a", b"a")
    storage.write_bytes(f"{bucket}-neighbour/a", b"a")
    storage.remove_tree(bucket)
    assert storage.list_files(f"{bucket}-neighbour") == ["a"]
    fs, _ = storage.filesystem("s3://whole")
    fs.mkdir("whole")
    storage.write_bytes("s3://whole/a", b"a")
    storage.remove_tree("s3://whole")
    assert storage.list_files("s3://whole") == []
    assert storage.exists("s3://whole")


def test_a_reader_sees_the_old_content_or_the_new_while_it_is_replaced(bucket):
    url, contents = storage.join(bucket, "file"), [bytes([version]) * 300_000 for version in range(2)]
    storage.write_bytes(url, contents[0])

    def replace_many_times() -> None:
        for version in range(20):
            storage.write_bytes(url, contents[version % 2])

    writer = threading.Thread(target=replace_many_times)
    writer.start()
    seen = []
    while writer.is_alive():
        seen.append(storage.read_bytes(url))
    writer.join()
    assert seen
    assert all(content in contents for content in seen)


@pytest.mark.parametrize("fault", ["unavailable", "dropped", "answer cut"])
def test_arrow_reads_parquet_csv_and_json_over_a_faulty_wire(s3, bucket, fault):
    table = pa.table({"user_id": np.arange(5000), "name": [f"é{number}" for number in range(5000)]})
    storage.write_table(f"{bucket}/log.parquet", table)
    text = pa.BufferOutputStream()
    with pa.CompressedOutputStream(text, "gzip") as file:
        pa.csv.write_csv(table, file)
    storage.write_bytes(f"{bucket}/log.csv.gz", text.getvalue().to_pybytes())
    storage.write_bytes(f"{bucket}/log.json", "\n".join(map(json.dumps, table.to_pylist())).encode())
    filesystem, path = storage.arrow_filesystem(bucket)
    broken = {"request": "(GET|HEAD) .*/log", "times": 3, **PASSING[fault]}
    s3.order(broken)
    assert pq.read_table(f"{path}/log.parquet", filesystem=filesystem).equals(table)
    s3.order(broken)
    with filesystem.open_input_stream(f"{path}/log.csv.gz") as stream:
        assert pa.csv.read_csv(stream).equals(table)
    s3.order(broken)
    with filesystem.open_input_stream(f"{path}/log.json") as stream:
        assert pa.json.read_json(stream).equals(table)


def test_only_the_wanted_columns_are_fetched(s3, bucket):
    noise = np.random.default_rng(0).integers(0, 2**62, 300_000)
    table = pa.table({"small": np.zeros(300_000, dtype=np.int8), "large": noise})
    size = storage.write_table(f"{bucket}/table.parquet", table)["bytes"]
    s3.order()
    assert storage.read_table(f"{bucket}/table.parquet", columns=["small"]).equals(table.select(["small"]))
    ranges = [re.search(r"bytes=(\d+)-(\d+)$", request) for request in s3.requests() if request.startswith("GET")]
    assert len(ranges) <= 3  # the end of the file, perhaps more of it, the column
    assert sum(int(found[2]) - int(found[1]) for found in ranges if found) < size / 4
    assert all(ranges)


@pytest.mark.usefixtures("ray_session")
def test_a_dataset_is_prepared_and_merged_from_s3_on_s3(bucket, by):
    users = np.repeat(np.arange(40), 6)
    log = pa.table({"user_id": users, "item_id": users % 7 + np.tile(np.arange(6), 40), "timestamp": np.arange(240)})
    storage.write_table(f"{bucket}/log/day=1/a.parquet", log.slice(0, 100))
    storage.write_table(f"{bucket}/log/day=2/b.parquet", log.slice(100))
    columns = {"user_column": "user_id", "item_column": "item_id", "timestamp_column": "timestamp"}
    log_path = f"{bucket}/log/day=1,{bucket}/log/day=*/b.parquet"
    dataset, was_there = prepare(f"{bucket}/dataset", log_path, **columns)
    assert not was_there
    assert dataset.manifest["prepared"] == by
    assert dataset.manifest["interactions"] == 240
    assert dataset.manifest["users"] == 40
    assert prepare(f"{bucket}/dataset", log_path, **columns)[1]
    storage.write_table(f"{bucket}/log/day=3/b.parquet", log.slice(0, 3))
    later, _ = prepare(f"{bucket}/later", log_path, parent=dataset.url, **columns)
    assert (later.manifest["rows_read"], later.manifest["interactions"]) == (3, 243)
