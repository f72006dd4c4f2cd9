"""What the service keeps of each user: the state, and the last item keys, from which another version makes a state of its own.

A session lies as bytes in a store: of this process, here, or one that several processes share (`redis_store.py`).
"""

import json
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from lrurec_dist.errors import StateError
from lrurec_dist.serve.item_keys import Key
from lrurec_dist.serve.user_state import UserState

# a number of its own, so that a write is known again if the answer to it was lost; bytes of the state
_HEAD = struct.Struct("<8sI")


@dataclass(frozen=True)
class Session:
    """A user's state and the item keys of the last events, oldest first, known to the catalogue or not."""

    state: UserState
    history: tuple[Key, ...]

    def to_bytes(self) -> bytes:
        """The session for a store; other bytes each time."""
        state = self.state.to_bytes()
        return (
            _HEAD.pack(os.urandom(8), len(state))
            + state
            + json.dumps(self.history, ensure_ascii=False, separators=(",", ":")).encode()
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "Session":
        """The session that `to_bytes` gave.

        Raises:
            StateError: the bytes are not those of a session.
        """
        try:
            begin = _HEAD.size
            end = begin + _HEAD.unpack_from(data)[1]
            history = json.loads(data[end:])
        except (struct.error, ValueError):
            raise StateError(f"session: {len(data):,} bytes that are no session; make a new one") from None
        return cls(UserState.from_bytes(data[begin:end]), tuple(history))


class Change(NamedTuple):
    """Another session for a user, if the one before is still there; None: there was none."""

    user: str
    before: bytes | None
    after: bytes


class SessionStore(Protocol):
    """Sessions by user. Every method raises TryAgainError while the store does not answer."""

    shared: bool  # whether other processes see the same sessions

    def get_many(self, users: Sequence[str]) -> list[bytes | None]:
        """The session of each user; None where there is none."""

    def replace_many(self, changes: Sequence[Change]) -> list[bool]:
        """Make each change whose `before` still is what the store holds; which ones were made."""

    def count(self) -> int:
        """How many sessions there are."""


class MemoryStore:
    """At most `capacity` sessions in this process; the least recently used one goes first."""

    shared = False

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._sessions: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get_many(self, users: Sequence[str]) -> list[bytes | None]:
        """As `SessionStore`; what is asked for counts as used."""
        with self._lock:
            for user in users:
                if user in self._sessions:
                    self._sessions.move_to_end(user)
            return [self._sessions.get(user) for user in users]

    def replace_many(self, changes: Sequence[Change]) -> list[bool]:
        """As `SessionStore`."""
        made = []
        with self._lock:
            for user, before, after in changes:
                made.append(self._sessions.get(user) == before)
                if made[-1]:
                    self._sessions[user] = after
                    self._sessions.move_to_end(user)
            while len(self._sessions) > self._capacity:
                self._sessions.popitem(last=False)
        return made

    def count(self) -> int:
        """As `SessionStore`."""
        return len(self._sessions)
