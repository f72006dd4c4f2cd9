"""Which version serves: pointers that move by compare-and-swap, and the record of each decision to move one.

channels/candidate.json   what the gate looked at last
channels/champion.json    what serves
decisions/<version>-<n>.json   the n-th decision about a version: checks with their numbers, result

A pointer is replaced as a whole, and only if it still is what the publisher saw when it began, so a
publisher that was paused cannot undo what others did meanwhile.
"""

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lrurec_dist import storage
from lrurec_dist.conditional import create_if_absent, read_with_version, replace_if_unchanged
from lrurec_dist.errors import ChannelMovedError, IntegrityError

CANDIDATE, CHAMPION = "candidate", "champion"
PREVIOUS_KEPT = 10  # earlier champions that a pointer remembers
PENDING_S = 24 * 3600  # a decision that is being taken for longer was broken off
_SCHEMA_VERSION = 1
_TRIES = 100  # of moving the candidate's pointer, which nobody decides on


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """Where a channel points. `previous` are the versions before, newest first; `generation` counts moves from 1."""

    version: str
    manifest_sha256: str
    previous: list[str]
    generation: int
    decision: str
    moved: float  # seconds since 1970
    id: str  # unlike that of any other move, so that a write whose answer is lost is known again


@dataclass(frozen=True)
class Channel:
    """A channel as it was read: its pointer, None before the first move, and what a move compares with."""

    registry_url: str
    name: str
    pointer: Pointer | None
    etag: str | None

    @property
    def generation(self) -> int:
        """0 before the first move."""
        return self.pointer.generation if self.pointer else 0

    @property
    def versions(self) -> list[str]:
        """What it points to and what it pointed to before, newest first."""
        return [self.pointer.version, *self.pointer.previous] if self.pointer else []


def read_channel(registry_url: str, name: str) -> Channel:
    """A channel as it is now.

    Raises:
        ConfigError: the store has no conditional writes.
        IntegrityError: the file is no pointer.
    """
    url = _channel_url(registry_url, name)
    try:
        data, etag = read_with_version(url)
    except FileNotFoundError:
        return Channel(registry_url, name, None, None)
    try:
        values = json.loads(data)
        return Channel(registry_url, name, Pointer(**{key: values[key] for key in Pointer.__dataclass_fields__}), etag)
    except (ValueError, TypeError, KeyError) as reason:
        raise IntegrityError(f"{url} is no pointer to a version: {type(reason).__name__}: {reason}; restore the file") from None


def move(seen: Channel, version: str, manifest_sha256: str, decision: str, previous: list[str]) -> Pointer:
    """Point a channel to another version if nobody moved it since it was read; of several at once exactly one succeeds.

    Raises:
        ChannelMovedError: somebody did; nothing was changed.
    """
    pointer = Pointer(
        version=version,
        manifest_sha256=manifest_sha256,
        previous=previous[:PREVIOUS_KEPT],
        generation=seen.generation + 1,
        decision=decision,
        moved=round(time.time(), 3),
        id=uuid.uuid4().hex,
    )
    url = _channel_url(seen.registry_url, seen.name)
    data = json.dumps({"schema_version": _SCHEMA_VERSION, **asdict(pointer)}, indent=2).encode() + b"\n"
    won = create_if_absent(url, data) if seen.etag is None else replace_if_unchanged(url, data, seen.etag)
    if not won:
        now = read_channel(seen.registry_url, seen.name)
        raise ChannelMovedError(
            f"{url}: was at generation {seen.generation} when this began and is at {now.generation} "
            f"({now.pointer.version if now.pointer else 'removed'}) now; nothing was changed, run the same command again"
        )
    return pointer


def move_candidate(registry_url: str, version: str, manifest_sha256: str, decision: str) -> None:
    """Point the candidate's channel to a version, whatever others point it to at the same time."""
    for left in reversed(range(_TRIES)):
        try:
            move(read_channel(registry_url, CANDIDATE), version, manifest_sha256, decision, [])
            return
        except ChannelMovedError:
            if left == 0:
                raise


@dataclass
class Decision:
    """A decision about a version, its record on storage from the moment it is begun."""

    name: str
    url: str
    record: dict[str, Any]

    def write(self, **values: Any) -> None:
        """Add to the record."""
        self.record |= values
        storage.write_json(self.url, self.record)


def begin_decision(registry_url: str, version: str, kind: str, **about: Any) -> Decision:
    """Claim the next number among the decisions about a version; the record says `pending`."""
    number = len(decisions_about(registry_url, version)) + 1
    started = {"started": round(time.time(), 3), "id": uuid.uuid4().hex}
    while True:
        name = f"{version}-{number}"
        record = {"schema_version": _SCHEMA_VERSION, "version": version, "kind": kind, "result": "pending", **about, **started}
        url = decision_url(registry_url, name)
        if create_if_absent(url, json.dumps(record, indent=2, sort_keys=True).encode()):
            return Decision(name, url, record)
        number += 1


def decision_url(registry_url: str, name: str) -> str:
    """Where a decision's record lies."""
    return storage.join(registry_url, "decisions", f"{name}.json")


def decisions_about(registry_url: str, version: str) -> list[str]:
    """Names of the decisions about a version, the first one first."""
    names = [name.removesuffix(".json") for name in storage.list_names(storage.join(registry_url, "decisions"))]
    numbers = [name.removeprefix(f"{version}-") for name in names if name.startswith(f"{version}-")]
    return [f"{version}-{number}" for number in sorted(int(number) for number in numbers if number.isdigit())]


def is_pending(record: Mapping[str, Any]) -> bool:
    """Whether a decision is being taken, as far as one can know."""
    return record["result"] == "pending" and record["started"] > time.time() - PENDING_S


def _channel_url(registry_url: str, name: str) -> str:
    return storage.join(registry_url, "channels", f"{name}.json")
