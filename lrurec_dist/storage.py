"""The one door to storage: URLs in, committed directories out.

Object stores have no rename, so a directory exists once its `manifest.json` exists: the manifest
is written last and lists every file with its size and SHA-256. Readers ignore a directory without
one. All functions take URLs (`/local`, `file://`, `s3://`, `gs://`, `hdfs://`, `memory://`).

Every function repeats what fails for a passing reason (`lrurec_dist.stores.retried`) before it
raises TryAgainError.
"""

import fcntl
import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from lrurec_dist import stores
from lrurec_dist.errors import IntegrityError
from lrurec_dist.files import RetriedReader, full_disk_named, new_file
from lrurec_dist.files import arrow_filesystem as arrow_filesystem
from lrurec_dist.stores import filesystem as filesystem
from lrurec_dist.stores import retried

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20
_TEMPORARY = re.compile(r"(^|/)\.[^/]+\.([0-9a-f]{32}\.tmp|lock)$")  # what writers use, and leave when they are killed


def absolute(url: str) -> str:
    """`url` with a relative local path made absolute, so that every process means the same place.

    Raises:
        ConfigError: the URL holds credentials.
    """
    stores.refuse_secrets(url)
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def join(url: str, *parts: str) -> str:
    """`url` extended by path components."""
    return "/".join([url.rstrip("/"), *parts])


def exists(url: str) -> bool:
    """Whether a file or directory is there; a store that does not answer is an error, not an absence."""
    return _info(url) is not None


def modified(url: str) -> float:
    """When a file was written last, in seconds since 1970; FileNotFoundError if it is not there."""
    fs, path = filesystem(url)
    return float(retried("read", url, lambda: fs.modified(path).timestamp()))


def _info(url: str) -> dict[str, Any] | None:
    fs, path = filesystem(url)
    try:
        return retried("read", url, lambda: fs.info(path))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _entries(fs: fsspec.AbstractFileSystem, root: str, depth: float = math.inf) -> dict[str, dict[str, Any]]:
    """Path and facts of all that lies below a directory, so many levels deep.

    fsspec's own find and glob leave out what cannot be listed, so that a fault looks like fewer files.
    """
    found, directories = {}, [(root, 1)]
    while directories:
        directory, level = directories.pop()
        with suppress(FileNotFoundError):  # removed in the meantime
            for entry in fs.ls(directory, detail=True):
                name = entry["name"].rstrip("/")
                if name != directory.rstrip("/"):  # an object that stands for the directory
                    found[name] = entry
                    if entry["type"] == "directory" and level < depth:
                        directories.append((name, level + 1))
    return found


def _files_below(fs: fsspec.AbstractFileSystem, root: str) -> dict[str, dict[str, Any]]:
    if stores.is_object_store(fs):
        found = fs.find(root, detail=True)  # one listing, whatever the number of directories
        return {name: entry for name, entry in found.items() if not name.endswith("/")}  # objects that stand for directories
    return {name: entry for name, entry in _entries(fs, root).items() if entry["type"] != "directory"}


def expand(pattern: str) -> dict[str, str]:
    """Every data file behind a file, a directory or a glob, as a sorted map from URL to version.

    The version is text that changes with the content: size with modification time or e-tag. Names
    that start with a dot or an underscore (`_SUCCESS`, `_temporary/…`) are left out. No match: empty.
    """
    fs, path = filesystem(pattern)

    def find() -> dict[str, str]:
        found = {}
        for root, info in _roots(fs, path).items():
            for entry in [info] if info["type"] == "file" else _files_below(fs, root).values():
                below = entry["name"][len(root.rstrip("/")) :] or os.path.basename(root)
                if not any(part.startswith((".", "_")) for part in below.split("/")):
                    found[_url_of(fs, entry["name"])] = stores.version_of(entry)
        return dict(sorted(found.items()))

    return retried("list", pattern, find)


def _roots(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
    """What a path means: itself if it is there, else what it matches as a glob."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return {path: fs.info(path)}
    if not glob.has_magic(path):
        return {}
    root = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
    depth = math.inf if "**" in path else path.count("/", len(root))
    pattern = re.compile(glob_translate(path))
    return {name: entry for name, entry in _entries(fs, root or fs.root_marker, depth).items() if pattern.match(name)}


def canonical(url: str) -> str:
    """`url` as `expand` names what lies there: one spelling for a place, whatever alias its scheme has."""
    return _url_of(*filesystem(url))


def _url_of(fs: fsspec.AbstractFileSystem, path: str) -> str:
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file; a reader sees the old content or the new, never a part."""
    fs, path = filesystem(url)

    def write() -> None:
        if stores.is_object_store(fs):
            fs.pipe_file(path, data)  # all parts at once
        else:
            with new_file(url, len(data)) as file:
                file.write(data)

    retried("write", url, write)


def read_bytes(url: str) -> bytes:
    """The whole content of a file."""
    fs, path = filesystem(url)
    return bytes(retried("read", url, lambda: fs.cat_file(path)))


def write_json(url: str, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys."""
    write_bytes(url, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def read_json(url: str) -> Any:
    """The JSON value in a file."""
    return json.loads(read_bytes(url))


def append_line(url: str, line: str) -> None:
    """Append one line, whole or not at all; object stores cannot append, so there one writer rewrites the file."""
    fs, path = filesystem(url)
    data = line.encode() + b"\n"

    def append_local() -> None:
        fs.makedirs(fs._parent(path), exist_ok=True)
        with open(path, "ab", buffering=0) as file, full_disk_named(url, path, lambda: f"{len(data):,} bytes"):
            fcntl.flock(file, fcntl.LOCK_EX)  # so that what is cut off is ours
            before = os.fstat(file.fileno()).st_size
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
            except BaseException:
                os.ftruncate(file.fileno(), before)
                raise

    if isinstance(fs, LocalFileSystem):
        retried("write", url, append_local)
    else:
        write_bytes(url, (read_bytes(url) if exists(url) else b"") + data)


def write_table(url: str, table: pa.Table, *, near: tuple[str, ...] = ()) -> dict[str, Any]:
    """Write one Parquet file, whole or not at all, and return its manifest entry.

    Integer columns in `near`, where neighbours differ little, are stored as differences. No column
    gets a dictionary: of columns as ours it makes files larger and both writing and reading slower.
    """
    encodings = dict.fromkeys(near, "DELTA_BINARY_PACKED") or None

    def write() -> dict[str, Any]:
        with new_file(url) as file:
            pq.write_table(table, file, compression="zstd", use_dictionary=False, column_encoding=encodings)
        return file.entry()

    return retried("write", url, write)


def read_table(url: str, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file into memory; of an object store's, only the columns are fetched."""
    fs, path = filesystem(url)

    def read() -> pa.Table:
        with pa.OSFile(path) if isinstance(fs, LocalFileSystem) else RetriedReader(fs, path, whole=False) as file:
            return pq.ParquetFile(file, pre_buffer=True).read(columns)

    return retried("read", url, read)


def iter_row_groups(url: str) -> Iterator[pa.Table]:
    """The row groups of one Parquet file, one in memory at a time."""
    fs, path = filesystem(url)
    with pa.OSFile(path) if isinstance(fs, LocalFileSystem) else RetriedReader(fs, path, whole=False) as file:
        parquet = pq.ParquetFile(file, pre_buffer=True)
        for index in range(parquet.num_row_groups):
            yield parquet.read_row_group(index)


def list_files(url: str) -> list[str]:
    """Paths of all files below a directory, relative to it, without what a killed writer left; none if it is not there."""
    fs, root = filesystem(url)
    names = retried("list", url, lambda: list(_files_below(fs, root))) if exists(url) else []
    return sorted(name for path in names if not _TEMPORARY.search(name := path[len(root.rstrip("/")) + 1 :]))


def list_names(url: str) -> list[str]:
    """Names of all files and directories directly below a directory, in order; none if it is not there."""
    fs, root = filesystem(url)
    found = retried("list", url, lambda: _entries(fs, root, depth=1))
    return sorted(path[len(root.rstrip("/")) + 1 :] for path in found)


def remove_tree(url: str) -> None:
    """Delete a directory and all it holds, its manifest first; nothing happens if it is not there."""
    fs, root = filesystem(url)

    def remove(path: str) -> None:
        with suppress(FileNotFoundError):
            is_bucket = stores.is_object_store(fs) and "/" not in path  # which stays
            fs.rm(list(_files_below(fs, path)) if is_bucket else path, recursive=not is_bucket)

    manifest = join(url, MANIFEST)
    if exists(manifest):  # a half-removed directory must not look committed
        retried("remove", manifest, lambda: remove(filesystem(manifest)[1]))
    if exists(url):
        retried("remove", url, lambda: remove(root))


def file_sha256(url: str) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    return str(_entry(url)["sha256"])


def _entry(url: str) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with RetriedReader(*filesystem(url), whole=True) as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def sha256(data: bytes) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(value: Any) -> str:
    """16 hex digits that identify a JSON value, whatever the order of its keys."""
    return sha256(json.dumps(value, sort_keys=True).encode())[:16]


def commit(url: str, description: dict[str, Any], known: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """Make the directory exist for readers: write its manifest, listing every file below it.

    Args:
        url: the directory.
        description: what else the manifest says.
        known: entries of files whose writer knows size and hash; the others are read back.

    Returns:
        The manifest: `description` plus `files`, a map of relative path to size and SHA-256.
    """
    files = dict(known or {})
    for relative in list_files(url):
        if relative != MANIFEST and relative not in files:
            files[relative] = _entry(join(url, relative))
    manifest = {**description, "files": files}
    write_json(join(url, MANIFEST), manifest)
    return manifest


def is_committed(url: str) -> bool:
    """Whether the directory has a manifest."""
    return exists(join(url, MANIFEST))


def read_manifest(url: str, *, verify: bool = True, error: type[IntegrityError] = IntegrityError) -> dict[str, Any]:
    """The manifest of a committed directory, after every listed file was found unchanged.

    Args:
        url: the directory.
        verify: compare sizes and SHA-256 of all files; False trusts the commit.
        error: what to raise.

    Raises:
        error: there is no readable manifest, it names a file outside the directory, or a file is
            missing or differs from what was committed.
    """
    try:
        manifest = read_json(join(url, MANIFEST))
    except FileNotFoundError:
        raise error(f"{url} has no {MANIFEST}: it was never committed, or is being written") from None
    except ValueError as reason:
        raise error(f"{join(url, MANIFEST)} is not JSON: {reason}") from None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        raise error(f"{join(url, MANIFEST)} lists no files: it is not a manifest")
    for relative, entry in files.items() if verify else ():
        verify_file(url, relative, entry, error=error)
    return manifest


def verify_file(url: str, relative: str, entry: Any, *, error: type[IntegrityError] = IntegrityError) -> None:
    """Raise `error` unless a file below the directory is what its manifest's entry says."""
    if relative.startswith("/") or ".." in relative.split("/"):
        raise error(f"{join(url, MANIFEST)} names {relative!r}, which leaves the directory")
    if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int) or not isinstance(entry.get("sha256"), str):
        raise error(f"{join(url, MANIFEST)} lists {relative!r} without size and SHA-256")
    try:
        actual = file_sha256(join(url, relative))
    except FileNotFoundError:
        raise error(f"{join(url, relative)} is missing; its manifest lists {entry['bytes']:,} bytes") from None
    except IsADirectoryError:
        raise error(f"{join(url, relative)} is a directory; its manifest lists a file") from None
    if actual != entry["sha256"]:
        raise error(f"{join(url, relative)} changed after the commit: SHA-256 {actual[:12]}, expected {entry['sha256'][:12]}")
