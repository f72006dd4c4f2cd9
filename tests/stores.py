"""Real stores for tests: an S3 server in a process of its own, and a filesystem that fails on order."""

import errno
import json
import os
import select
import subprocess
import sys
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from lrurec_dist import storage

ROOT = Path(__file__).resolve().parent.parent
BUCKET = "bucket"


@dataclass(frozen=True)
class S3Server:
    """The server behind `s3://` URLs of a test."""

    endpoint: str

    def order(self, *faults: dict[str, Any]) -> None:
        """Replace the faults that are still to come, and forget the requests so far; see `tests/s3_server.py`."""
        self._post("faults", faults)

    def requests(self) -> list[str]:
        """What was asked since this or `order` was called last, as `METHOD /bucket/key?query range`."""
        return self._post("requests", None)

    def _post(self, what: str, value: Any) -> Any:
        request = urllib.request.Request(f"{self.endpoint}/-/{what}", json.dumps(value).encode(), method="POST")  # noqa: S310
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return json.load(answer)


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[S3Server]:
    """A running S3 server with one bucket, and the environment that leads to it."""
    process = subprocess.Popen([sys.executable, "-m", "tests.s3_server"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with pytest.MonkeyPatch.context() as patch:
        try:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], 60)
            assert ready, "the S3 server did not start within 60 s"
            endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"
            patch.delenv("AWS_PROFILE", raising=False)
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            patch.setenv("AWS_ACCESS_KEY_ID", "testing")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            storage.filesystem(f"s3://{BUCKET}")[0].mkdir(BUCKET)
            yield S3Server(endpoint)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]


@pytest.fixture
def s3(s3_environment: S3Server) -> Iterator[S3Server]:
    """The S3 server, without faults."""
    s3_environment.order()
    yield s3_environment
    s3_environment.order()


@pytest.fixture
def bucket(s3: S3Server) -> str:  # noqa: ARG001
    """An empty directory's URL on the S3 server."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@dataclass
class Faults:
    """What the next operations of `faulty://` fail with, in order; used up one by one, None for success."""

    reads: list[BaseException | None] = field(default_factory=list)
    writes: list[BaseException | None] = field(default_factory=list)  # after half of the bytes
    listings: list[BaseException | None] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)

    def next(self, kind: str) -> BaseException | None:
        """The fault for one operation of a kind."""
        self.counted[kind] += 1
        coming = getattr(self, kind)
        return coming.pop(0) if coming else None


class FaultyFileSystem(fsspec.AbstractFileSystem):
    """Local disk at `faulty:///path` that fails as `faults` says."""

    protocol = "faulty"
    root_marker = "/"
    cachable = False
    faults: ClassVar[Faults]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._disk = LocalFileSystem()

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return self._disk.info(self._strip_protocol(path))

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        if fault := self.faults.next("listings"):
            raise fault
        return self._disk.ls(self._strip_protocol(path), detail=detail)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._disk.makedirs(path, exist_ok=exist_ok)

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        os.replace(path1, path2)

    def rm_file(self, path: str) -> None:  # of a directory, too, when a tree is removed
        os.rmdir(path) if os.path.isdir(path) else os.remove(path)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return _FaultyFile(self.faults, path, mode)


class _FaultyFile:
    def __init__(self, faults: Faults, path: str, mode: str) -> None:
        self._faults = faults
        self._file = open(path, mode)  # noqa: SIM115
        self.flush, self.seek, self.tell, self.close = self._file.flush, self._file.seek, self._file.tell, self._file.close

    def read(self, size: int = -1) -> bytes:
        if fault := self._faults.next("reads"):
            self._file.read(3)  # a failed read moves the position, too
            raise fault
        return self._file.read(size)

    def write(self, data: bytes) -> int:
        if fault := self._faults.next("writes"):
            self._file.write(data[: len(data) // 2])
            raise fault
        return self._file.write(data)

    def __enter__(self) -> "_FaultyFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[tuple[str, Faults]]:
    """An empty directory's URL on a filesystem that fails on order, and what to order."""
    FaultyFileSystem.faults = Faults()
    yield f"faulty://{tmp_path}", FaultyFileSystem.faults
    FaultyFileSystem.faults = Faults()


def passing() -> OSError:
    """A failure that passes."""
    return OSError(errno.EIO, "Input/output error")


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once."""
    monkeypatch.setattr("lrurec_dist.stores.FIRST_WAIT_S", 0)
