"""What a failing disk, network or server does to readers and writers; `faulty://` is local disk that fails on order."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from fsspec.registry import _registry as drivers

from lrurec_dist import storage, stores
from lrurec_dist.config import Config
from lrurec_dist.config_data import LogConfig
from lrurec_dist.config_file import with_absolute_paths
from lrurec_dist.errors import ConfigError, StorageError, TryAgainError
from lrurec_dist.files import RetriedReader
from tests.processes import killed_at

pytestmark = pytest.mark.usefixtures("no_wait")

LOST = (OSError(errno.EIO, "Input/output error"), ConnectionResetError(errno.ECONNRESET, "reset"), TimeoutError("too slow"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs rights that this process lacks")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("fault", LOST, ids=lambda fault: type(fault).__name__)
def test_a_read_that_fails_twice_then_succeeds(faulty, fault):
    url, faults = faulty
    storage.write_bytes(f"{url}/file", b"content")
    faults.reads = [fault, fault]
    assert storage.read_bytes(f"{url}/file") == b"content"
    assert faults.counted["reads"] == 3


def test_a_read_that_goes_on_failing_says_where_and_how_often(faulty):
    url, faults = faulty
    storage.write_bytes(f"{url}/file", b"content")
    faults.reads = [LOST[0]] * stores.ATTEMPTS
    with pytest.raises(TryAgainError, match=rf"{url}/file: could not read in {stores.ATTEMPTS} attempts.*Input/output") as caught:
        storage.read_bytes(f"{url}/file")
    assert caught.value.exit_code == 75
    assert faults.reads == []


def test_a_stream_goes_on_where_it_failed(faulty):
    url, faults = faulty
    storage.write_bytes(f"{url}/file", bytes(range(250)) * 30_000)
    faults.reads = [None, LOST[0], None, None, LOST[1], LOST[2]]
    assert storage.file_sha256(f"{url}/file") == storage.sha256(bytes(range(250)) * 30_000)
    assert faults.reads == []


def test_arrow_reads_on_where_a_read_failed(faulty):
    url, faults = faulty
    table = pa.table({"number": np.arange(200_000)})
    with pa.CompressedOutputStream(storage.filesystem(url)[1] + "/log.csv.gz", "gzip") as file:
        pa.csv.write_csv(table, file)
    storage.write_table(f"{url}/log.parquet", table)
    filesystem, path = storage.arrow_filesystem(f"{url}/log.csv.gz")
    faults.reads = [None, None, LOST[0], LOST[1]]
    with filesystem.open_input_stream(path) as stream:
        assert pa.csv.read_csv(stream).equals(table)
    faults.reads = [LOST[0], None, LOST[1]]
    assert storage.read_table(f"{url}/log.parquet").equals(table)
    assert faults.reads == []


def test_a_file_that_is_replaced_between_two_attempts_is_not_mixed(faulty):
    url, faults = faulty
    storage.write_bytes(f"{url}/file", b"a" * 3_000_000)
    with RetriedReader(*storage.filesystem(f"{url}/file"), whole=True) as file:
        file.read(1_000_000)
        storage.write_bytes(f"{url}/file", b"b" * 3_000_001)
        faults.reads = [LOST[0]]
        with pytest.raises(StorageError, match="was replaced while it was read"):
            file.read(1_000_000)


@pytest.mark.parametrize("pattern", ["", "/day=*", "/*/*.parquet", "/**"])
def test_a_directory_that_cannot_be_listed_does_not_count_as_empty(faulty, pattern):
    url, faults = faulty
    storage.write_bytes(f"{url}/day=1/a.parquet", b"a")
    whole = storage.expand(url + pattern)
    assert len(whole) == 1
    faults.listings = [None, LOST[0], None, LOST[0]]  # the subdirectory, twice
    assert storage.expand(url + pattern) == whole
    assert faults.listings == []
    faults.listings = [LOST[0]] * stores.ATTEMPTS
    with pytest.raises(TryAgainError, match="could not list"):
        storage.expand(url + pattern)


@pytest.mark.parametrize("lost", [1, stores.ATTEMPTS])
def test_a_write_that_dies_half_way_leaves_the_old_content_or_the_new(faulty, tmp_path, lost):
    url, faults = faulty
    storage.write_bytes(f"{url}/file", b"old content")
    faults.writes = [LOST[1]] * lost
    if lost < stores.ATTEMPTS:
        storage.write_bytes(f"{url}/file", b"new")
        assert storage.read_bytes(f"{url}/file") == b"new"
    else:
        with pytest.raises(TryAgainError, match="could not write"):
            storage.write_bytes(f"{url}/file", b"new")
        assert storage.read_bytes(f"{url}/file") == b"old content"
    assert os.listdir(tmp_path) == ["file"]


def test_a_table_is_written_again_from_its_beginning(faulty):
    url, faults = faulty
    table = pa.table({"number": np.arange(100_000)})
    faults.writes = [None, LOST[0], None, None, LOST[0]]
    entry = storage.write_table(f"{url}/table.parquet", table)
    assert faults.writes == []
    assert entry["sha256"] == storage.file_sha256(f"{url}/table.parquet")
    assert storage.read_table(f"{url}/table.parquet").equals(table)


@pytest.mark.parametrize("fault", [FileNotFoundError("gone"), OSError(errno.EINVAL, "no"), ValueError("no")], ids=repr)
def test_what_stays_is_not_tried_again(faulty, fault):
    url, faults = faulty
    storage.write_bytes(f"{url}/file", b"content")
    faults.reads = [fault]
    with pytest.raises(type(fault)):
        storage.read_bytes(f"{url}/file")
    assert faults.counted["reads"] == 1


def test_missing_rights_are_named_and_not_tried_again(faulty):
    url, faults = faulty
    storage.write_bytes(f"{url}/file", b"content")
    faults.reads = [PermissionError(errno.EACCES, "Permission denied")]
    with pytest.raises(ConfigError, match=r"/file: refuses to read \(PermissionError"):
        storage.read_bytes(f"{url}/file")
    assert faults.counted["reads"] == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_store_is_named_with_what_was_to_be_written_and_not_tried_again(faulty, tmp_path, code):
    url, faults = faulty
    storage.write_bytes(f"{url}/file", b"old")
    faults.writes = [OSError(code, os.strerror(code))]
    with pytest.raises(StorageError, match=rf"{url}/file: no room to write 4,321 bytes \({os.strerror(code)}"):
        storage.write_bytes(f"{url}/file", bytes(4321))
    assert faults.counted["writes"] == 2
    assert storage.read_bytes(f"{url}/file") == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_keeps_what_was_there(small_disk):
    storage.write_bytes(f"{small_disk}/file", b"old")
    storage.write_bytes(f"{small_disk}/lines", b"first\n")
    with pytest.raises(StorageError, match=r"no room to write 2,000,000 bytes \(No space left on device; 1,0[0-9,]+ bytes free"):
        storage.write_bytes(f"{small_disk}/file", bytes(2_000_000))
    with pytest.raises(StorageError, match=r"no room to write [0-9,]+ bytes and more \(No space"):
        storage.write_table(f"{small_disk}/file", pa.table({"number": np.random.default_rng(0).random(300_000)}))
    with pytest.raises(StorageError, match=r"/lines: no room to write 2,000,001 bytes"):
        storage.append_line(f"{small_disk}/lines", "x" * 2_000_000)
    assert sorted(os.listdir(small_disk)) == ["file", "lines"]
    assert storage.read_bytes(f"{small_disk}/file") == b"old"
    storage.append_line(f"{small_disk}/lines", "second")
    assert storage.read_bytes(f"{small_disk}/lines") == b"first\nsecond\n"


def test_a_file_size_limit_counts_as_a_full_disk(tmp_path):
    script = f"""
import resource, signal
from lrurec_dist import storage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
storage.write_bytes({str(tmp_path)!r} + "/file", bytes(1_000_000))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert "StorageError" in run.stderr
    assert "no room to write 1,000,000 bytes (File too large" in run.stderr
    assert os.listdir(tmp_path) == []


WRITE_AND_STOP = """
import os, sys, time
from lrurec_dist import storage

def stop(*_):
    print("here", flush=True)
    time.sleep(600)

os.replace = stop
"""


def test_a_writer_that_is_killed_leaves_the_old_content_and_no_file_that_counts(tmp_path):
    url = f"{tmp_path}/file"
    storage.write_bytes(url, b"old")
    killed_at("here", WRITE_AND_STOP + f"storage.write_bytes({url!r}, b'new')")
    assert storage.read_bytes(url) == b"old"
    assert len(os.listdir(tmp_path)) == 2, "the process was not killed half-way"
    assert storage.list_files(str(tmp_path)) == ["file"]
    assert list(storage.expand(str(tmp_path))) == [url]
    assert list(storage.commit(str(tmp_path), {})["files"]) == ["file"]


def test_a_commit_that_is_killed_half_way_commits_nothing(tmp_path):
    storage.write_bytes(f"{tmp_path}/a", b"a")
    killed_at("here", WRITE_AND_STOP + f"storage.commit({str(tmp_path)!r}, {{}})")
    assert any("manifest.json" in name for name in os.listdir(tmp_path)), "the process was not killed half-way"
    assert not storage.is_committed(str(tmp_path))
    assert storage.list_files(str(tmp_path)) == ["a"]


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:hush@bucket/log",
        "s3://AKIA:hush/hush@bucket/log",
        "s3://AKIA@bucket/hush",
        "s3://bucket/log?secret=hush",
        "s3://bucket/log?key=1&AWS_SECRET_ACCESS_KEY=hush",
        "https://bucket.example/log?X-Amz-Signature=hush",
        "https://bucket.example/log?x-amz-security-token=hush",
        "abfs://container@account.dfs.core.windows.net/log?sig=hush",
        "gs://bucket/log?token=hush",
        "hdfs://user:hush@host:8020/log",
        "simplecache::s3://AKIA:hush@bucket/log",
    ],
)
def test_a_url_with_a_secret_is_refused_without_repeating_it(url):
    with pytest.raises(ConfigError, match="holds no credentials") as caught:
        storage.read_bytes(url)
    assert "hush" not in str(caught.value)
    assert "AKIA" not in str(caught.value)
    with pytest.raises(ConfigError, match="holds no credentials"):
        with_absolute_paths(Config(log=LogConfig(path=url)))


@pytest.mark.parametrize(
    "url",
    [
        "/data/a@b:c?token=1",
        "s3://bucket/part-?.parquet",
        "s3://bucket/user@example/10:30",
        "s3://arn:aws:s3:us-east-1:123456789012:accesspoint/name/log",
        "abfs://container@account.dfs.core.windows.net/log",
        "hdfs://user@host:8020/log@1",
    ],
)
def test_a_url_without_a_secret_is_taken(url):
    stores.refuse_secrets(url)


@pytest.mark.parametrize(
    ("scheme", "module", "extra"),
    [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs"), ("abfs", "adlfs", "azure")],
)
def test_a_missing_driver_is_named_with_its_extra(monkeypatch, scheme, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(drivers, scheme, raising=False)  # loaded before
    with pytest.raises(ConfigError, match=rf"no driver for {scheme}:// .* pip install 'lrurec_dist\[{extra}\]'"):
        storage.exists(f"{scheme}://bucket/file")


def test_missing_hadoop_libraries_are_named(monkeypatch):
    for name in ("JAVA_HOME", "HADOOP_HOME", "ARROW_LIBHDFS_DIR"):
        monkeypatch.setenv(name, "/nowhere")
    with pytest.raises(ConfigError, match=r"Hadoop's libraries do not load .*set JAVA_HOME, HADOOP_HOME and CLASSPATH"):
        storage.exists("hdfs://localhost:9/file")


def test_an_unknown_scheme_is_a_configuration_error():
    with pytest.raises(ConfigError, match="s4://bucket/file: Protocol not known"):
        storage.read_bytes("s4://bucket/file")
