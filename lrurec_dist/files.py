"""One file at a time: read on after a failure, written whole or not at all."""

import errno
import hashlib
import io
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem

from lrurec_dist.errors import StorageError
from lrurec_dist.stores import filesystem, is_object_store, retried, scheme_of, version_of

T = TypeVar("T")

_PART_BYTES = 16 << 20  # S3 takes 10,000 parts, hence files up to 156 GiB
_STREAM_BYTES = 8 << 20  # read ahead where a file is read from its beginning to its end
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class RetriedReader(io.RawIOBase):
    """A file open for reading that is opened again, where it was, when a read fails for a passing reason."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, *, whole: bool) -> None:
        """Open `path`; `whole` says that it will be read from its beginning to its end, hence ahead."""
        self._fs, self._path = fs, path
        self._url = str(fs.unstrip_protocol(path))
        self._options: dict[str, Any] = {}
        if is_object_store(fs):
            self._options = {"block_size": _STREAM_BYTES} if whole else {"cache_type": "none"}
        self._position = 0
        self._version = ""
        self._file: Any = None
        retried("read", self._url, self._open)

    def _open(self) -> None:
        file = self._fs.open(self._path, "rb", **self._options)
        version = version_of(getattr(file, "details", None) or self._fs.info(self._path))
        if self._version and version != self._version:
            file.close()
            raise StorageError(f"{self._url}: was replaced while it was read ({self._version}, now {version}); run again")
        if self._position:
            file.seek(self._position)
        self._file, self._version = file, version

    def _at_position(self, operation: Callable[[Any], T]) -> T:
        def attempt() -> T:
            if self._file is None:
                self._open()
            try:
                return operation(self._file)
            except BaseException:
                with suppress(Exception):
                    self._file.close()
                self._file = None  # what it buffered may be incomplete
                raise

        value = retried("read", self._url, attempt)
        self._position = self._file.tell()
        return value

    def read(self, size: int | None = -1) -> bytes:
        """The next `size` bytes, fewer only at the end."""
        return self._at_position(lambda file: bytes(file.read(-1 if size is None else size)))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position, which is returned."""
        self._at_position(lambda file: file.seek(offset, whence))
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()


def arrow_filesystem(url: str) -> tuple[pa.fs.FileSystem, str]:
    """The same place for readers that want a pyarrow filesystem, with the path within it.

    Reads on anything but local disk are repeated where they fail for a passing reason.
    """
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        return pa.fs.LocalFileSystem(), path
    return pa.fs.PyFileSystem(_ArrowHandler(fs)), path


class _ArrowHandler(pa.fs.FSSpecHandler):  # type: ignore[misc]
    def get_file_info(self, paths: list[str]) -> list[pa.fs.FileInfo]:
        return retried("read", ", ".join(paths[:1]), lambda: super(_ArrowHandler, self).get_file_info(paths))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(RetriedReader(self.fs, path, whole=True), mode="r")

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(RetriedReader(self.fs, path, whole=False), mode="r")


@contextmanager
def full_disk_named(url: str, path: str, needed: Callable[[], str]) -> Iterator[None]:
    """Turn a full disk, an exceeded quota or file-size limit into an error that says how much was to be written where."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        directory = path.rpartition("/")[0] or "/"
        free = f"{shutil.disk_usage(directory).free:,} bytes free there" if scheme_of(url) == "file" else "none of it was kept"
        raise StorageError(
            f"{url}: no room to write {needed()} ({error.strerror}; {free}); free some, or write elsewhere"
        ) from error


class NewFile:
    """A file that is being written; knows the size and SHA-256 of what was written so far."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.bytes = 0
        self.closed = False  # pyarrow asks

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes."""
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing: the file is there when it is complete."""

    def entry(self) -> dict[str, Any]:
        """The manifest entry of what was written."""
        return {"bytes": self.bytes, "sha256": self._digest.hexdigest()}


@contextmanager
def new_file(url: str, size: int | None = None) -> Iterator[NewFile]:
    """A file for writing that readers see, whole, once the context closes without an error, and never before.

    Neither the whole file nor a second copy of it is held in memory. Not repeated by itself: the
    caller knows how to produce the content again.

    Raises:
        StorageError: no room; `size`, if known, is how much would have been needed.
    """
    fs, path = filesystem(url)
    written = NewFile(None)
    uploading = _upload(fs, path) if is_object_store(fs) else _renamed(fs, path)
    with full_disk_named(url, path, lambda: f"{size or written.bytes:,} bytes{'' if size else ' and more'}"), uploading as file:
        written._file = file
        yield written


@contextmanager
def _upload(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[Any]:
    file = fs.open(path, "wb", block_size=_PART_BYTES)
    try:
        yield file
        file.close()
    except BaseException:
        with suppress(Exception):  # the store may be what failed; the first error is the one to report
            file.discard()
        file.closed = True  # or fsspec completes the upload when the object is collected
        raise


@contextmanager
def _renamed(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[Any]:
    directory, _, name = path.rpartition("/")
    temporary = f"{directory}/.{name}.{uuid.uuid4().hex}.tmp"
    is_local = isinstance(fs, LocalFileSystem)
    fs.makedirs(directory, exist_ok=True)
    try:
        with open(temporary, "wb") if is_local else fs.open(temporary, "wb") as file:
            yield file
            file.flush()
            if is_local:
                os.fsync(file.fileno())
        os.replace(temporary, path) if is_local else fs.mv(temporary, path)
    except BaseException:
        with suppress(Exception):
            fs.rm_file(temporary)
        raise
