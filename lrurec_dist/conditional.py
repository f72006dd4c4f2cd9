"""Writes that succeed for one process only: create a file if there is none, replace it if nobody else did.

On S3 by conditional requests (AWS, and servers that implement `If-None-Match` and `If-Match` for
PUT), on local disk by hard links and file locks. The answer to a request can be lost after it was
carried out; then the file is read, and counts as ours if it holds our bytes. So what is written has
to be unlike anything another process writes: put a unique name in it.
"""

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lrurec_dist import storage
from lrurec_dist.errors import ConfigError
from lrurec_dist.stores import OBJECT_STORES, is_unmet_condition, retried, scheme_of


def read_with_version(url: str) -> tuple[bytes, str]:
    """The content of a file and the version that `replace_if_unchanged` takes.

    Raises:
        FileNotFoundError: it does not exist.
        ConfigError: the store has no conditional writes.
    """
    fs, path = _conditional(url)
    if isinstance(fs, LocalFileSystem):
        data = storage.read_bytes(url)
        return data, storage.sha256(data)

    def read() -> tuple[bytes, str]:
        with fs.open(path, "rb") as file:  # asks for one e-tag and gets no other
            return bytes(file.read()), str(file.details["ETag"])

    return retried("read", url, read)


def create_if_absent(url: str, data: bytes) -> bool:
    """Write a file if there is none; whether it is ours. Of several processes at once exactly one gets True.

    Raises:
        ConfigError: the store has no conditional writes.
    """
    fs, path = _conditional(url)
    if isinstance(fs, LocalFileSystem):
        return retried("write", url, lambda: _link(path, data))
    return _put_if(fs, url, path, data, IfNoneMatch="*")


def replace_if_unchanged(url: str, data: bytes, version: str) -> bool:
    """Replace a file's content if it still has this version; whether it is ours.

    Of several processes that saw the same version exactly one gets True. On local disk this holds
    among processes that use this function, not against other writers.

    Raises:
        ConfigError: the store has no conditional writes.
    """
    fs, path = _conditional(url)
    if not isinstance(fs, LocalFileSystem):
        return _put_if(fs, url, path, data, IfMatch=version)
    try:
        with _locked(path):
            unchanged = storage.sha256(storage.read_bytes(url)) == version
            if unchanged:
                storage.write_bytes(url, data)
            return unchanged
    except FileNotFoundError:
        return False


def _conditional(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    fs, path = storage.filesystem(url)
    if not isinstance(fs, LocalFileSystem) and OBJECT_STORES.get(scheme_of(url)) != "s3":
        raise ConfigError(f"{url}: {scheme_of(url)}:// has no conditional writes here; use local disk or s3://")
    return fs, path


def _put_if(fs: fsspec.AbstractFileSystem, url: str, path: str, data: bytes, **condition: Any) -> bool:
    bucket, key, _ = fs.split_path(path)

    def put() -> bool:
        try:
            fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
            return True
        except OSError as error:
            if isinstance(error, FileNotFoundError) and "IfMatch" in condition:
                return False
            if not is_unmet_condition(error):
                raise
        return bytes(fs.cat_file(path)) == data

    return retried("write", url, put)


def _link(path: str, data: bytes) -> bool:
    directory, _, name = path.rpartition("/")
    temporary = f"{directory}/.{name}.{uuid.uuid4().hex}.tmp"
    storage.write_bytes(temporary, data)
    try:
        os.link(temporary, path)  # the whole file at once, or FileExistsError
        return True
    except FileExistsError:
        return False
    finally:
        os.remove(temporary)


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold the lock beside a file; the kernel lets go of it when the process ends in whatever way."""
    directory, _, name = path.rpartition("/")
    with open(f"{directory}/.{name}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
