"""The one door to storage: URLs in, committed directories out.

Object stores have no rename, so a directory exists once its `manifest.json` exists: the manifest
is written last and lists every file with its size and SHA-256. Readers ignore a directory without
one. All functions take URLs (`/local`, `file://`, `s3://`, `gs://`, `hdfs://`, `memory://`).
"""

import glob
import hashlib
import json
import os
import uuid
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lrurec_dist.errors import IntegrityError

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem of `url` and the path within it; listings are never cached."""
    options = {} if "://" not in url or url.startswith("file://") else {"use_listings_cache": False}
    fs, path = url_to_fs(url, **options)
    return fs, path


def arrow_filesystem(url: str) -> tuple[pa.fs.FileSystem, str]:
    """The same place for readers that want a pyarrow filesystem, with the path within it."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        return pa.fs.LocalFileSystem(), path
    return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(fs)), path


def absolute(url: str) -> str:
    """`url` with a relative local path made absolute, so that every process means the same place."""
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def join(url: str, *parts: str) -> str:
    """`url` extended by path components."""
    return "/".join([url.rstrip("/"), *parts])


def exists(url: str) -> bool:
    """Whether a file or directory is there."""
    fs, path = filesystem(url)
    return bool(fs.exists(path))


def expand(pattern: str) -> dict[str, str]:
    """Every data file behind a file, a directory or a glob, as a sorted map from URL to version.

    The version is text that changes with the content: size with modification time or e-tag. Names
    that start with a dot or an underscore (`_SUCCESS`, `_temporary/…`) are left out. No match: empty.
    """
    fs, path = filesystem(pattern)
    roots = [path] if fs.exists(path) else sorted(fs.glob(path)) if glob.has_magic(path) else []
    found = {}
    for root in roots:
        entries = [fs.info(root)] if fs.isfile(root) else fs.find(root, detail=True).values()
        for entry in entries:
            below = entry["name"][len(root.rstrip("/")) :] or os.path.basename(root)
            if not any(part.startswith((".", "_")) for part in below.split("/")):
                changed = next((entry[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if key in entry), "")
                found[_url_of(fs, entry["name"])] = f"{int(entry['size'])} bytes, {changed}"
    return dict(sorted(found.items()))


def _url_of(fs: fsspec.AbstractFileSystem, path: str) -> str:
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file; on local disk a reader sees the old content or the new, never a part."""
    fs, path = filesystem(url)
    fs.makedirs(fs._parent(path), exist_ok=True)
    if isinstance(fs, LocalFileSystem):
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.remove(temporary)
            raise
    else:
        fs.pipe_file(path, data)


def read_bytes(url: str) -> bytes:
    """The whole content of a file."""
    fs, path = filesystem(url)
    return bytes(fs.cat_file(path))


def write_json(url: str, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys."""
    write_bytes(url, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def read_json(url: str) -> Any:
    """The JSON value in a file."""
    return json.loads(read_bytes(url))


def append_line(url: str, line: str) -> None:
    """Append one line; object stores cannot append, so there the file is rewritten."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        fs.makedirs(fs._parent(path), exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    else:
        before = fs.cat_file(path) if fs.exists(path) else b""
        fs.pipe_file(path, before + line.encode() + b"\n")


def write_table(url: str, table: pa.Table) -> dict[str, Any]:
    """Write one Parquet file, whole or not at all, and return its manifest entry."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    write_bytes(url, data)
    return {"bytes": len(data), "sha256": sha256(data)}


def read_table(url: str, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file into memory."""
    return pq.read_table(pa.BufferReader(read_bytes(url)), columns=columns)


def list_files(url: str) -> list[str]:
    """Paths of all files below a directory, relative to it; none if it is not there."""
    fs, root = filesystem(url)
    return sorted(path[len(root.rstrip("/")) + 1 :] for path in fs.find(root)) if fs.exists(root) else []


def remove_tree(url: str) -> None:
    """Delete a directory and all it holds; nothing happens if it is not there."""
    fs, path = filesystem(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def file_sha256(url: str) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    fs, path = filesystem(url)
    with fs.open(path, "rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


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
            file = join(url, relative)
            fs, path = filesystem(file)
            files[relative] = {"bytes": int(fs.size(path)), "sha256": file_sha256(file)}
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
    return manifest
