"""What serving keeps of a user instead of the history: of one size, however long that is."""

import struct
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from lrurec_dist.errors import StateError, StateVersionError

_MAGIC = b"LRUS"
_FORMAT = 1
# magic, format, bytes of the version, blocks, hidden, dim, recent items, events; then version, floats, items, CRC-32; little endian
_HEADER = struct.Struct("<4sHHHIIIQ")
_CRC = struct.Struct("<I")


@dataclass(frozen=True, eq=False)
class UserState:
    """A user after all events so far, as one bundle sees it.

    Attributes:
        version: of the bundle; every other one refuses the state, since its numbers mean something else there.
        recurrent: (blocks, 2, hidden) float32, real and imaginary plane of the recurrence.
        vector: (dim,) float32, the user vector, so that recommending encodes nothing.
        recent: ids of the last items, oldest first; as many as the recommender keeps, to leave them out of the candidates.
        events: how many events of known items made it.

    Nothing writes to the tensors of a state once it is made.
    """

    version: str
    recurrent: Tensor
    vector: Tensor
    recent: tuple[int, ...]
    events: int

    def check_version(self, version: str) -> None:
        """Raise StateVersionError unless the bundle `version` made this state."""
        if self.version != version:
            raise StateVersionError(
                f"state of version={self.version}: this is version {version}, to which its numbers mean nothing; "
                "make a new state from the user's history (Recommender.encode)"
            )

    def to_bytes(self) -> bytes:
        """The state as bytes, for a key-value store; a function of the state alone."""
        version = self.version.encode()
        blocks, _, hidden = self.recurrent.shape
        header = _HEADER.pack(_MAGIC, _FORMAT, len(version), blocks, hidden, len(self.vector), len(self.recent), self.events)
        floats = [*self.recurrent.flatten().tolist(), *self.vector.tolist()]
        body = header + version + struct.pack(f"<{len(floats)}f", *floats) + struct.pack(f"<{len(self.recent)}i", *self.recent)
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def from_bytes(cls, data: bytes) -> "UserState":
        """The state that `to_bytes` wrote, equal to the bit. Executes nothing.

        Raises:
            StateError: the bytes are not those of a state: cut, longer, changed, or of another format.
        """
        if len(data) < _HEADER.size + _CRC.size or data[:4] != _MAGIC:
            raise StateError(f"user state: {len(data):,} bytes that are no state; make a new one from the user's history")
        _, form, named, blocks, hidden, dim, recent, events = _HEADER.unpack_from(data)
        if form != _FORMAT:
            raise StateError(f"user state: format={form}, this code reads {_FORMAT}; update the older side, or make a new state")
        numbers = 2 * blocks * hidden + dim
        size = _HEADER.size + named + 4 * numbers + 4 * recent + _CRC.size
        if len(data) != size:
            raise StateError(f"user state: {len(data):,} bytes, its header says {size:,}; make a new one from the user's history")
        if _CRC.unpack_from(data, size - _CRC.size)[0] != zlib.crc32(memoryview(data)[: size - _CRC.size]):
            raise StateError("user state: its bytes changed since they were written; make a new one from the user's history")
        at = _HEADER.size + named
        floats = torch.tensor(struct.unpack_from(f"<{numbers}f", data, at))
        return cls(
            version=data[_HEADER.size : at].decode(errors="replace"),
            recurrent=floats[: numbers - dim].view(blocks, 2, hidden),
            vector=floats[numbers - dim :],
            recent=struct.unpack_from(f"<{recent}i", data, at + 4 * numbers),
            events=events,
        )
