"""One safetensors file at any URL: written as a stream, read by rows.

The format is eight bytes with the length of a header, the header as JSON (dtype, shape and place of
each tensor), and the tensors' bytes (https://github.com/huggingface/safetensors). The library of
that name reads single rows of local files only; this reads them from any store, and writes without
a second copy of the tensors in memory.
"""

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lrurec_dist.errors import CheckpointError
from lrurec_dist.files import RetriedReader, new_file
from lrurec_dist.stores import filesystem, retried

_CHUNK_BYTES = 8 << 20  # written and read at once
_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


def write_tensors(url: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write contiguous CPU tensors to a safetensors file, whole or not at all, and return its manifest entry."""
    header, end = {}, 0
    for key, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[key] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned

    def write() -> dict[str, Any]:
        with new_file(url, 8 + len(text) + end) as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor in tensors.values():
                data = tensor.reshape(-1).view(torch.uint8).numpy().data
                for begin in range(0, len(data), _CHUNK_BYTES):
                    file.write(data[begin : begin + _CHUNK_BYTES])
        return file.entry()

    return retried("write", url, write)


class TensorFile:
    """A safetensors file open for reading; whoever opens it has compared its SHA-256.

    Raises:
        CheckpointError: it is no safetensors file.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._file = RetriedReader(*filesystem(url), whole=False)
        try:
            (length,) = struct.unpack("<Q", self._file.read(8))
            self._header = dict(json.loads(self._file.read(length)))
        except (struct.error, ValueError) as reason:
            raise CheckpointError(f"{url}: is no safetensors file: {reason}") from None
        self._data_begins = 8 + length

    def read_into(self, out: Tensor, key: str, rows: range) -> None:
        """Fill `out`, (len(rows), …), with the given rows of a tensor; rows that lie between them may be read along.

        Raises:
            CheckpointError: the file has no such rows of this type.
        """
        if not rows:
            return
        entry = self._header.get(key, {"dtype": "", "shape": [], "data_offsets": [0, 0]})
        expected = [_CODES[out.dtype], list(out.shape[1:])]
        if [entry["dtype"], entry["shape"][1:]] != expected or rows[-1] >= entry["shape"][0]:
            raise CheckpointError(
                f"{self._url}: {key} is {entry['dtype']} {entry['shape']}; expected rows up to {rows[-1]:,} of {expected}"
            )
        row_bytes = math.prod(out.shape[1:]) * out.itemsize
        at_once = max(1, _CHUNK_BYTES // (rows.step * row_bytes))
        for first in range(0, len(rows), at_once):
            part = rows[first : first + at_once]
            span = part[-1] - part[0] + 1
            begin = self._data_begins + entry["data_offsets"][0] + part[0] * row_bytes
            self._file.seek(begin)
            data = bytearray(self._file.read(span * row_bytes))
            if len(data) != span * row_bytes:
                raise CheckpointError(
                    f"{self._url}: ends within {key}, {len(data):,} of {span * row_bytes:,} bytes from {begin:,} on"
                )
            values = torch.frombuffer(data, dtype=out.dtype).view(span, *out.shape[1:])
            out[first : first + len(part)] = values[:: rows.step]

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def dtype_name(dtype: torch.dtype) -> str:
    """What manifests call a type: the code of the safetensors format."""
    return _CODES[dtype]


def dtype_of(name: str) -> torch.dtype:
    """The type that a manifest names."""
    return _DTYPES[name]
