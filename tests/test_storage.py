import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from lrurec_dist import storage
from lrurec_dist.errors import BundleError, IntegrityError


@pytest.fixture(params=["local", "file", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty directory's URL on each kind of storage."""
    here = {"local": f"{tmp_path}/place", "file": f"file://{tmp_path}/place", "memory": "memory://place"}
    url = here.get(request.param) or request.getfixturevalue("bucket")
    yield url
    storage.remove_tree(url)


def write_files(url: str, *names: str) -> None:
    for name in names:
        storage.write_bytes(storage.join(url, name), name.encode())


def names_of(url: str, files: dict[str, str]) -> list[str]:
    _, root = storage.filesystem(url)
    return [storage.filesystem(file)[1].removeprefix(root + "/") for file in files]


def test_what_is_written_is_read_back(place):
    url = storage.join(place, "new", "directories", "file")
    storage.write_bytes(url, b"\x00\xff")
    assert storage.read_bytes(url) == b"\x00\xff"
    storage.write_bytes(url, b"s")
    assert storage.read_bytes(url) == b"s"


def test_json_is_read_back_equal(place):
    value = {"b": [1, 2.5, None], "a": {"é": True}}
    storage.write_json(storage.join(place, "value.json"), value)
    assert storage.read_json(storage.join(place, "value.json")) == value


def test_a_table_is_read_back_equal_and_its_entry_is_its_hash(place):
    url = storage.join(place, "table.parquet")
    table = pa.table(
        {"item_key": pa.array(["a", None], pa.large_string()), "item_ids": pa.array([[1], [2, 3]], pa.large_list(pa.int32()))}
    )
    entry = storage.write_table(url, table)
    assert storage.read_table(url).equals(table)
    assert storage.read_table(url, columns=["item_key"]).column_names == ["item_key"]
    assert entry == {"bytes": len(storage.read_bytes(url)), "sha256": storage.file_sha256(url)}


def test_a_local_write_leaves_no_other_file(tmp_path):
    storage.write_bytes(f"{tmp_path}/file", b"old")
    storage.write_bytes(f"{tmp_path}/file", b"new")
    assert os.listdir(tmp_path) == ["file"]


def test_a_local_write_that_fails_keeps_the_old_content(tmp_path):
    storage.write_bytes(f"{tmp_path}/file", b"old")
    with pytest.raises(TypeError):
        storage.write_bytes(f"{tmp_path}/file", "text is not bytes")  # type: ignore[arg-type]
    assert storage.read_bytes(f"{tmp_path}/file") == b"old"


def test_a_reader_sees_the_old_content_or_the_new_while_it_is_replaced(tmp_path):
    url, contents = f"{tmp_path}/file", [bytes([version]) * 300_000 for version in range(2)]
    storage.write_bytes(url, contents[0])

    def replace_many_times() -> None:
        for version in range(40):
            storage.write_bytes(url, contents[version % 2])

    writer = threading.Thread(target=replace_many_times)
    writer.start()
    seen = []
    while writer.is_alive():
        seen.append(storage.read_bytes(url))
    writer.join()
    assert seen
    assert all(content in contents for content in seen)


def test_appended_lines_keep_their_order(place):
    url = storage.join(place, "lines")
    for line in ("first", "é", "third"):
        storage.append_line(url, line)
    assert storage.read_bytes(url).decode() == "first\né\nthird\n"


def test_a_removed_tree_is_gone_and_removing_it_again_is_no_error(place):
    write_files(place, "a", "b/c")
    assert storage.exists(place)
    storage.remove_tree(place)
    assert not storage.exists(place)
    storage.remove_tree(place)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("", ["a.parquet", "b.parquet", "day=1/c.parquet"]),
        ("/a.parquet", ["a.parquet"]),
        ("/day=1", ["day=1/c.parquet"]),
        ("/*.parquet", ["a.parquet", "b.parquet"]),
        ("/day=*", ["day=1/c.parquet"]),
        ("/**/*.parquet", ["a.parquet", "b.parquet", "day=1/c.parquet"]),
        ("/[ab].parquet", ["a.parquet", "b.parquet"]),
        ("/nothing", []),
        ("/*.csv", []),
    ],
)
def test_a_file_a_directory_and_a_glob_expand_to_their_data_files(place, pattern, found):
    write_files(place, "b.parquet", "a.parquet", "day=1/c.parquet", "_SUCCESS", ".hidden.parquet", "day=1/.c.crc")
    assert names_of(place, storage.expand(place + pattern)) == found


def test_links_on_local_disk_are_followed_where_they_are_named(tmp_path):
    write_files(f"{tmp_path}/real", "a", "b")
    os.symlink(tmp_path / "real", tmp_path / "directory")
    os.symlink(tmp_path / "real" / "a", tmp_path / "file")
    assert list(storage.expand(f"{tmp_path}/directory")) == [f"{tmp_path}/directory/a", f"{tmp_path}/directory/b"]
    assert list(storage.expand(f"{tmp_path}/file")) == [f"{tmp_path}/file"]


def test_files_below_a_hidden_directory_are_left_out(place):
    write_files(place, "a.parquet", "_temporary/0/half_written.parquet", ".trash/old.parquet")
    assert names_of(place, storage.expand(place)) == ["a.parquet"]


def test_expanded_urls_can_be_read(place):
    write_files(place, "a", "b")
    assert [storage.read_bytes(url) for url in storage.expand(place)] == [b"a", b"b"]


def test_a_version_changes_with_the_size_of_the_file(place):
    write_files(place, "a", "b")
    before = storage.expand(place)
    storage.write_bytes(storage.join(place, "b"), b"longer")
    after = storage.expand(place)
    assert [before[url] == after[url] for url in before] == [True, False]


def test_a_version_changes_with_the_time_of_the_change(tmp_path):
    write_files(str(tmp_path), "a")
    before = storage.expand(str(tmp_path))
    os.utime(tmp_path / "a", (0, 0))
    assert storage.expand(str(tmp_path)) != before


def test_arrow_reads_the_same_bytes(place):
    write_files(place, "a")
    filesystem, path = storage.arrow_filesystem(storage.join(place, "a"))
    with filesystem.open_input_stream(path) as stream:
        assert stream.read() == b"a"


def test_only_relative_local_paths_are_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/a") == f"{tmp_path}/runs/a"
    assert storage.absolute("/runs/a") == "/runs/a"
    assert storage.absolute("s3://bucket/a") == "s3://bucket/a"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}, True),
        ({"a": 1}, {"a": 2}, False),
        ({"a": 1}, {"b": 1}, False),
        ([1, 2], [2, 1], False),
        ("1", 1, False),
    ],
)
def test_a_fingerprint_ignores_the_order_of_keys_and_nothing_else(one, other, same):
    assert (storage.fingerprint(one) == storage.fingerprint(other)) is same


def test_a_directory_exists_for_readers_once_it_is_committed(place):
    write_files(place, "a", "b/c")
    assert not storage.is_committed(place)
    with pytest.raises(IntegrityError, match="never committed"):
        storage.read_manifest(place)
    storage.commit(place, {"schema_version": 1})
    assert storage.is_committed(place)
    assert storage.read_manifest(place)["schema_version"] == 1


def test_a_manifest_lists_every_file_but_itself(place):
    write_files(place, "a", "b/c", "b/_d")
    storage.commit(place, {})
    manifest = storage.commit(place, {})  # the second time a manifest is there
    assert manifest["files"] == {
        name: {"bytes": len(name), "sha256": storage.sha256(name.encode())} for name in ("a", "b/c", "b/_d")
    }


def test_known_entries_are_taken_from_their_writer(place):
    write_files(place, "a", "b")
    manifest = storage.commit(place, {}, {"a": {"bytes": 7, "sha256": "told"}})
    assert manifest["files"]["a"] == {"bytes": 7, "sha256": "told"}
    assert manifest["files"]["b"]["bytes"] == 1


def test_a_missing_file_is_found(place):
    write_files(place, "a", "b/c")
    storage.commit(place, {})
    storage.remove_tree(storage.join(place, "b/c"))
    with pytest.raises(IntegrityError, match=r"b/c is missing; its manifest lists 3 bytes"):
        storage.read_manifest(place)


def test_a_changed_byte_is_found(place):
    write_files(place, "a", "b/c")
    storage.commit(place, {})
    storage.write_bytes(storage.join(place, "b/c"), b"b/d")
    with pytest.raises(IntegrityError, match=r"b/c changed after the commit"):
        storage.read_manifest(place)
    assert storage.read_manifest(place, verify=False)["files"]["b/c"]["bytes"] == 3


@pytest.mark.parametrize("name", ["../outside", "b/../../outside", "/etc/hostname", ".."])
def test_a_name_that_leaves_the_directory_is_refused_before_it_is_read(place, name):
    write_files(place, "a")
    manifest = storage.commit(place, {})
    manifest["files"][name] = manifest["files"]["a"]
    storage.write_json(storage.join(place, storage.MANIFEST), manifest)
    with pytest.raises(IntegrityError, match="leaves the directory"):
        storage.read_manifest(place)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": []}', '{"files": null}'])
def test_what_is_not_a_manifest_is_refused(place, text):
    storage.write_bytes(storage.join(place, storage.MANIFEST), text.encode())
    with pytest.raises(IntegrityError, match="manifest"):
        storage.read_manifest(place)


@pytest.mark.parametrize("entry", [{}, {"bytes": 1}, 5, None])
def test_an_entry_without_size_and_hash_is_refused(tmp_path, entry):
    write_files(str(tmp_path), "a")
    storage.write_json(f"{tmp_path}/{storage.MANIFEST}", {"files": {"a": entry}})
    with pytest.raises(IntegrityError):
        storage.read_manifest(str(tmp_path))


def test_the_error_is_the_kind_the_caller_asked_for(place):
    with pytest.raises(BundleError):
        storage.read_manifest(place, error=BundleError)
