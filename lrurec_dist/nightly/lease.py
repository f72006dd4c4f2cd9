"""One run at a time below a directory: a file that its holder renews, and a token that tells a late one it was replaced.

Nobody's clock is compared with another's: whoever finds the lease held watches it. If it is renewed
the holder lives; if nothing happens for the time that the holder itself promised, it is dead, and the
watcher takes over with the next token, by compare-and-swap.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace

from lrurec_dist.conditional import create_if_absent, read_with_version, replace_if_unchanged
from lrurec_dist.errors import IntegrityError, LeaseError, StorageError
from lrurec_dist.reporting import say

_RENEWALS = 4  # in the time after which a silent holder counts as dead
_LOOKS = 20  # at a lease that is held, in that time


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the file says. `token` counts holders from 1 and never falls; a free lease keeps that of its last one."""

    token: int
    holder: str  # host and process, for people
    work: str  # what for
    lease_s: float
    held: bool
    renewed: float  # seconds since 1970, for people
    id: str  # unlike that of any other write, so that a write whose answer is lost is known again


class Lease:
    """A lease that this process holds, until somebody takes it over."""

    def __init__(self, url: str, claim: Claim, version: str) -> None:
        self.url, self.token = url, claim.token
        self._claim, self._version = claim, version
        self._lock = threading.Lock()
        self._alive = time.monotonic()

    def check(self) -> None:
        """Renew the lease now.

        Raises:
            LeaseError: somebody else took it over; what this process would still write is not wanted.
            StorageError: the store does not answer.
        """
        with self._lock:
            self._write(replace(self._claim, renewed=round(time.time(), 3), id=uuid.uuid4().hex))

    def silent_for_s(self) -> float:
        """Seconds since the lease was renewed."""
        return time.monotonic() - self._alive

    def release(self) -> None:
        """Let others have it; nothing happens if they have it already."""
        with self._lock, suppress(LeaseError):
            self._write(replace(self._claim, held=False, id=uuid.uuid4().hex))

    def _write(self, claim: Claim) -> None:
        begun = time.monotonic()
        version = _replaced(self.url, claim, self._version)
        if version is None:
            found = _read(self.url)
            by = f"{found[0].holder} holds it with token {found[0].token}, for {found[0].work}" if found else "the file is gone"
            raise LeaseError(f"{self.url}: this run held it with token {self.token}, and now {by}; this run changes nothing more")
        self._claim, self._version, self._alive = claim, version, begun


@contextmanager
def held(url: str, work: str, lease_s: float, lost: Callable[[str], None] | None = None) -> Iterator[Lease]:
    """Hold the lease at a URL while the context is open; a thread renews it.

    Args:
        url: of its file.
        work: what it is for, in words.
        lease_s: after so long a silence others may take it for dead.
        lost: called, in the thread, with the reason when the lease is lost or could not be renewed in
            time; by default the process ends at once with exit code 40, before it writes anything more.

    Raises:
        LeaseError: another process holds it and lives.
        ConfigError: the store has no conditional writes.
    """
    lease = _acquire(url, work, lease_s)
    say(f"lease: {url}, token {lease.token}")
    closing = threading.Event()

    def renew() -> None:
        while not closing.wait(lease_s / _RENEWALS):
            try:
                lease.check()
            except LeaseError as error:
                if not closing.is_set():
                    (lost or _end_process)(str(error))
                return
            except (OSError, StorageError) as error:
                if lease.silent_for_s() > lease_s:
                    (lost or _end_process)(f"{url}: could not be renewed for {lease.silent_for_s():.0f} s ({error})")
                    return

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        closing.set()
        thread.join()
        with suppress(OSError, StorageError):  # it runs out by itself
            lease.release()


def _end_process(reason: str) -> None:
    say(f"LeaseError: {reason}")
    os._exit(LeaseError.exit_code)


def _acquire(url: str, work: str, lease_s: float) -> Lease:
    while True:
        found = _read(url)
        if found is None:
            claim = _claim(1, work, lease_s)
            version = _version_of(url, claim) if create_if_absent(url, _bytes(claim)) else None
        else:
            if found[0].held:
                found = _watched(url, *found)
            claim = _claim(found[0].token + 1, work, lease_s)
            version = _replaced(url, claim, found[1])
        if version is not None:
            return Lease(url, claim, version)


def _watched(url: str, claim: Claim, version: str) -> tuple[Claim, str]:
    """What may be replaced: the claim that was not renewed in its time, or the free one that came instead."""
    say(f"lease: {claim.holder} holds {url} for {claim.work}; watching for {claim.lease_s:g} s whether it lives")
    until, pause = time.monotonic() + claim.lease_s, threading.Event()
    while time.monotonic() < until:
        pause.wait(claim.lease_s / _LOOKS)
        found = _read(url)
        if found is None:
            raise LeaseError(f"{url}: was removed while it was watched; run the same command again")
        if not found[0].held:
            return found
        if found[1] != version:
            raise LeaseError(
                f"{url}: {found[0].holder} holds it with token {found[0].token}, for {found[0].work}; one run at a time, "
                "so wait for its end and run the same command"
            )
    say(f"lease: {claim.holder} was silent for {claim.lease_s:g} s; taking over")
    return claim, version


def _claim(token: int, work: str, lease_s: float) -> Claim:
    return Claim(
        token=token,
        holder=f"{socket.gethostname()}, process {os.getpid()}",
        work=work,
        lease_s=lease_s,
        held=True,
        renewed=round(time.time(), 3),
        id=uuid.uuid4().hex,
    )


def _bytes(claim: Claim) -> bytes:
    return json.dumps(asdict(claim), indent=2).encode() + b"\n"


def _read(url: str) -> tuple[Claim, str] | None:
    try:
        data, version = read_with_version(url)
    except FileNotFoundError:
        return None
    try:
        return Claim(**json.loads(data)), version
    except (ValueError, TypeError) as reason:
        raise IntegrityError(f"{url} is no lease: {reason}; remove it if nothing runs") from None


def _replaced(url: str, claim: Claim, version: str) -> str | None:
    """The version of what was written; None if the file was no longer of the version given."""
    return _version_of(url, claim) if replace_if_unchanged(url, _bytes(claim), version) else None


def _version_of(url: str, claim: Claim) -> str | None:
    found = _read(url)
    return found[1] if found and found[0].id == claim.id else None
