"""Files of a bundle, read as if a stranger had written them: nothing outside, nothing larger than said, nothing unchecked."""

import json
import math
import os
import re
import struct
from typing import Any

import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from lrurec_dist import storage
from lrurec_dist.errors import BundleError
from lrurec_dist.files import RetriedReader
from lrurec_dist.stores import filesystem, retried

MANIFEST_BYTES = 4 << 20  # some 30,000 files
HEADER_BYTES = 16 << 20  # of a safetensors file
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")  # neither absolute, nor up, nor a URL
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.int64: "I64"}


def parse_json(data: bytes, where: str) -> Any:
    """The JSON value in `data`; NaN, infinite numbers, a key that is given twice and endless nesting are refused.

    Raises:
        BundleError: with `where` and the reason.
    """
    try:
        return json.loads(data, object_pairs_hook=_distinct, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as reason:
        raise BundleError(f"{where} is not JSON as a bundle has it: {str(reason) or type(reason).__name__}") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)[:80]!r} is given twice")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


class VerifiedFiles:
    """The files that a bundle's manifest lists, each compared with size and SHA-256 before anything is made of it.

    Opening reads the manifest, at most `MANIFEST_BYTES`, and compares every listed size with the real one; no content is
    read before. Names may have letters, digits, `_`, `-` and `.`; a link that leads out of the directory is not followed.

    Raises:
        BundleError: no readable manifest, an entry that is none, a file that is missing or of another size or no file.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._read = set[str]()
        manifest_url = storage.join(url, storage.MANIFEST)
        if self._size(storage.MANIFEST) is None:
            raise BundleError(f"{url} has no {storage.MANIFEST}: it was never committed, or is being written")
        data = self._bytes(storage.MANIFEST, MANIFEST_BYTES)
        if len(data) > MANIFEST_BYTES:
            raise BundleError(f"{manifest_url} is larger than {MANIFEST_BYTES:,} bytes: no manifest of a bundle is")
        manifest = parse_json(data, manifest_url)
        if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
            raise BundleError(f"{manifest_url} lists no files: it is not a manifest")
        self.manifest: dict[str, Any] = manifest

    def check_entries(self) -> None:
        """Compare every entry with the file that is there, by size alone.

        Raises:
            BundleError: as said above.
        """
        for relative, entry in self.manifest["files"].items():
            if not _NAME.fullmatch(relative) or relative == storage.MANIFEST:
                raise BundleError(
                    f"{self.url}: the manifest names {relative[:200]!r}, which leaves the directory or is no file's name"
                )
            size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
            if type(size) is not int or size < 0 or not isinstance(digest, str) or not _SHA256.fullmatch(digest):
                raise BundleError(f"{self.url}: the manifest lists {relative} without size and SHA-256")
            actual = self._size(relative)
            if actual is None:
                raise BundleError(f"{storage.join(self.url, relative)} is missing; its manifest lists {size:,} bytes")
            if actual != size:
                raise BundleError(
                    f"{storage.join(self.url, relative)} changed after the commit: {actual:,} bytes, expected {size:,}"
                )

    def read(self, relative: str, limit: int) -> bytes:
        """The content of a listed file, never more than the manifest says.

        Raises:
            BundleError: it is not listed, listed with more than `limit` bytes, missing, or changed.
        """
        entry = self.manifest["files"].get(relative)
        if entry is None:
            raise BundleError(f"{self.url}: the manifest does not list {relative}")
        if entry["bytes"] > limit:
            raise BundleError(f"{self.url}: {relative} has {entry['bytes']:,} bytes, at most {limit:,} are possible")
        data = self._bytes(relative, entry["bytes"])
        if (actual := storage.sha256(data)) != entry["sha256"]:
            raise BundleError(
                f"{storage.join(self.url, relative)} changed after the commit: SHA-256 {actual[:12]}, expected {entry['sha256'][:12]}"
            )
        self._read.add(relative)
        return data

    def check_rest(self) -> None:
        """Compare the SHA-256 of every listed file that was not read.

        Raises:
            BundleError: one is missing or changed.
        """
        for relative, entry in self.manifest["files"].items():
            if relative not in self._read:
                storage.verify_file(self.url, relative, entry, error=BundleError)

    def _size(self, relative: str) -> int | None:
        """Bytes of a file; None where there is none."""
        fs, path = filesystem(storage.join(self.url, relative))
        try:
            info = retried("read", path, lambda: fs.info(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        if info["type"] != "file":
            raise BundleError(f"{path} is a {info['type']}; its manifest lists a file")
        if isinstance(fs, LocalFileSystem):
            root, real = os.path.realpath(filesystem(self.url)[1]), os.path.realpath(path)
            if os.path.commonpath([root, real]) != root:
                raise BundleError(f"{path} is a link that leaves the directory")
        return int(info["size"])

    def _bytes(self, relative: str, size: int) -> bytes:
        """At most `size` bytes and one more, by which a file that grew is told."""
        try:
            with RetriedReader(*filesystem(storage.join(self.url, relative)), whole=True) as file:
                return file.read(size + 1)
        except FileNotFoundError:
            raise BundleError(f"{storage.join(self.url, relative)} is missing; its manifest lists {size:,} bytes") from None


def tensor_header(data: bytes, where: str) -> dict[str, tuple[str, list[int]]]:
    """Type code and shape of each tensor in a safetensors file, before any of them is made.

    Raises:
        BundleError: it is no safetensors file.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
    except struct.error:
        raise BundleError(f"{where} is no safetensors file: {len(data)} bytes") from None
    if length > min(HEADER_BYTES, len(data) - 8):
        raise BundleError(f"{where} is no safetensors file: a header of {length:,} bytes in {len(data):,}")
    header = parse_json(data[8 : 8 + length], f"the header of {where}")
    if not isinstance(header, dict) or not all(
        isinstance(entry, dict) and {"dtype", "shape"} <= entry.keys() for name, entry in header.items() if name != "__metadata__"
    ):
        raise BundleError(f"{where} is no safetensors file: its header lists no tensors")
    return {name: (entry["dtype"], entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def read_tensors(data: bytes, expected: dict[str, tuple[torch.dtype, list[int]]], where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which has to hold exactly those expected.

    Raises:
        BundleError: others, or of other types or shapes; or it is no safetensors file.
    """
    found, wanted = tensor_header(data, where), {name: (_CODES[dtype], shape) for name, (dtype, shape) in expected.items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise BundleError(
                f"{where}: contents do not fit together: {name[:80]} is {found.get(name, 'missing')}, "
                f"the configuration asks for {wanted.get(name, 'no such tensor')}"
            )
    try:
        return load(data)
    except (SafetensorError, ValueError) as reason:
        raise BundleError(f"{where} is no safetensors file: {reason}") from None
