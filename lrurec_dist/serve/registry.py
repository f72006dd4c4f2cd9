"""The registry of bundles: a version becomes champion through a gate, goes back on request, and is removed when nothing needs it.

versions/<date>-<hash>/   bundles, as `bundle.py` writes them
channels/, decisions/     as `channels.py` has them
"""

import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lrurec_dist import storage
from lrurec_dist.errors import BundleError, ConfigError, DataNotReadyError
from lrurec_dist.serve.channels import (
    CANDIDATE,
    CHAMPION,
    Channel,
    Decision,
    Pointer,
    begin_decision,
    decision_url,
    decisions_about,
    is_pending,
    move,
    move_candidate,
    read_channel,
)
from lrurec_dist.serve.gate import Check, refused

LEFTOVER_S = 24 * 3600  # a version without a manifest is being written for so long, then it was broken off
_NAMED = 5  # versions in a message


@dataclass(frozen=True)
class Outcome:
    """What the gate said, and where the champion's channel points if it moved; None if the gate refused."""

    decision: str
    checks: list[Check]
    pointer: Pointer | None


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version for a list. `created` is in seconds since 1970, `bytes` of all files; figures are None where there are none."""

    version: str
    created: float
    items: int
    bytes: int
    figures: dict[str, float]
    channels: list[str]


@dataclass(frozen=True, kw_only=True)
class Removal:
    """A directory below `versions` that nothing needs, and why it goes."""

    version: str
    bytes: int
    reason: str


def version_url(registry_url: str, version: str) -> str:
    """Where a version lies."""
    return storage.join(registry_url, "versions", version)


def offer(
    registry_url: str, version: str, examine: Callable[[Channel], tuple[Sequence[Check], dict[str, Any]]], about: dict[str, Any]
) -> Outcome:
    """Put a version through the gate, record the decision, and make it champion if nothing was refused.

    Args:
        examine: makes the checks against the champion's channel as it was when this began, with what else the
            record should say.
        about: what the record says from the beginning.

    The order makes every interruption harmless: the record is begun, the candidate's channel moves, the
    checks are made, the record is written, and only then the champion's channel moves, if it still is
    what it was before the checks.

    Raises:
        ConfigError: no such version.
        ChannelMovedError: another champion was made meanwhile; it stays.
        BundleError: the version was changed or removed meanwhile.
    """
    manifest_sha256 = _manifest_sha256(registry_url, version)
    champion = read_channel(registry_url, CHAMPION)
    beside = {"version": champion.pointer.version, "generation": champion.generation} if champion.pointer else None
    decision = begin_decision(registry_url, version, "publish", manifest_sha256=manifest_sha256, champion=beside, **about)
    try:
        move_candidate(registry_url, version, manifest_sha256, decision.name)
        checks, facts = examine(champion)
        result = "refused" if refused(checks) else "accepted"
        decision.write(**facts, checks=[asdict(check) for check in checks], result=result, decided=round(time.time(), 3))
        if result == "refused":
            return Outcome(decision.name, list(checks), None)
        if _manifest_sha256(registry_url, version) != manifest_sha256:
            raise BundleError(f"{version_url(registry_url, version)} changed while it was examined")
        return Outcome(decision.name, list(checks), _promote(champion, version, manifest_sha256, decision, champion.versions))
    except BaseException as error:
        decision.write(result="broken off", error=f"{type(error).__name__}: {error}")
        raise


def rollback(registry_url: str, to: str | None = None) -> Pointer:
    """Make the champion before, or the given version, champion again, after all of its files were verified.

    The versions that it leaves behind are forgotten by the channel, so that rolling back twice goes back twice.

    Raises:
        DataNotReadyError: there is no champion, or none before it.
        ConfigError: no such version, or it is champion already.
        BundleError: a file of it is missing or changed.
        ChannelMovedError: somebody else moved the channel at the same time.
    """
    champion = read_channel(registry_url, CHAMPION)
    if champion.pointer is None:
        raise DataNotReadyError(f"{registry_url}: has no champion to roll back from; publish a version with jobs/publish.py")
    if to is None and not champion.pointer.previous:
        raise DataNotReadyError(
            f"{registry_url}: {champion.pointer.version} has no champion before it to roll back to; name a version"
        )
    version = to or champion.pointer.previous[0]
    if version == champion.pointer.version:
        raise ConfigError(f"{registry_url}: {version} is champion already")
    manifest_sha256 = _manifest_sha256(registry_url, version)
    storage.read_manifest(version_url(registry_url, version), error=BundleError)
    earlier = champion.versions
    previous = earlier[earlier.index(version) + 1 :] if version in earlier else earlier
    beside = {"version": champion.pointer.version, "generation": champion.generation}
    decision = begin_decision(registry_url, version, "rollback", manifest_sha256=manifest_sha256, champion=beside, checks=[])
    decision.write(result="accepted", decided=round(time.time(), 3))
    return _promote(champion, version, manifest_sha256, decision, previous)


def _promote(champion: Channel, version: str, manifest_sha256: str, decision: Decision, previous: list[str]) -> Pointer:
    return move(champion, version, manifest_sha256, decision.name, [earlier for earlier in previous if earlier != version])


def list_versions(registry_url: str) -> list[Version]:
    """Every whole version, the newest first."""
    named = _uses(registry_url)
    found = []
    for version in storage.list_names(storage.join(registry_url, "versions")):
        url = version_url(registry_url, version)
        if not storage.is_committed(url):
            continue
        manifest, metrics = storage.read_manifest(url, verify=False), storage.join(url, "metrics.json")
        figures = storage.read_json(metrics) if "metrics.json" in manifest["files"] else {}
        found.append(
            Version(
                version=version,
                created=storage.modified(storage.join(url, storage.MANIFEST)),
                items=manifest["num_items"],
                bytes=_bytes(manifest),
                figures=figures.get("model", {}),
                channels=named.get(version, []),
            )
        )
    return sorted(found, key=lambda version: (version.created, version.version), reverse=True)


def describe_version(registry_url: str, version: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The manifest of a version and the records of the decisions about it, the first one first.

    Args:
        version: its name, or that of a channel.

    Raises:
        ConfigError: no such version.
        DataNotReadyError: the channel was never moved.
    """
    if version in (CANDIDATE, CHAMPION):
        pointer = read_channel(registry_url, version).pointer
        if pointer is None:
            raise DataNotReadyError(f"{registry_url}: has no {version}; publish a version with jobs/publish.py")
        version = pointer.version
    _manifest_sha256(registry_url, version)
    manifest = storage.read_manifest(version_url(registry_url, version), verify=False)
    records = [
        {"name": name, **storage.read_json(decision_url(registry_url, name))} for name in decisions_about(registry_url, version)
    ]
    return manifest, records


def collect(registry_url: str, keep: int, *, remove: bool = False) -> list[Removal]:
    """Versions that nothing needs, removed if so wanted.

    Needed are the newest `keep`, those that channels point to or that were champion before (as far back
    as the channel remembers), and those that a decision is being taken about. Leftovers of an
    interrupted upload go a day after their last file was written. Whether a version is needed is asked
    again just before it is removed; its manifest goes first, so that it never looks whole.
    """
    found = [*_outdated(registry_url, keep), *_leftovers(registry_url)]
    removed = []
    for removal in found:
        if remove:
            if _is_needed(registry_url, removal.version):
                continue
            storage.remove_tree(version_url(registry_url, removal.version))
        removed.append(removal)
    return removed


def _outdated(registry_url: str, keep: int) -> list[Removal]:
    reason = f"older than the newest {keep}, in no channel"
    return [
        Removal(version=version.version, bytes=version.bytes, reason=reason)
        for version in list_versions(registry_url)[keep:]
        if not _is_needed(registry_url, version.version)
    ]


def _leftovers(registry_url: str) -> list[Removal]:
    found = []
    for name in storage.list_names(storage.join(registry_url, "versions")):
        url = version_url(registry_url, name)
        if storage.is_committed(url):
            continue
        written = [storage.modified(storage.join(url, file)) for file in storage.list_files(url)]
        if max(written, default=0.0) < time.time() - LEFTOVER_S:
            found.append(Removal(version=name, bytes=0, reason="left by an upload that was interrupted"))
    return found


def _is_needed(registry_url: str, version: str) -> bool:
    if version in _uses(registry_url):
        return True
    names = decisions_about(registry_url, version)
    return any(is_pending(storage.read_json(decision_url(registry_url, name))) for name in names)


def _uses(registry_url: str) -> dict[str, list[str]]:
    """Version to what it is: champion, candidate, previous."""
    champion, candidate = read_channel(registry_url, CHAMPION), read_channel(registry_url, CANDIDATE)
    uses: dict[str, list[str]] = {}
    for name, versions in (
        (CHAMPION, champion.versions[:1]),
        (CANDIDATE, candidate.versions[:1]),
        ("previous", champion.versions[1:]),
    ):
        for version in versions:
            uses.setdefault(version, []).append(name)
    return uses


def _bytes(manifest: dict[str, Any]) -> int:
    return sum(entry["bytes"] for entry in manifest["files"].values())


def _manifest_sha256(registry_url: str, version: str) -> str:
    """SHA-256 of a version's manifest; a ConfigError that names others if there is none."""
    try:
        return storage.file_sha256(storage.join(version_url(registry_url, version), storage.MANIFEST))
    except FileNotFoundError:
        names = storage.list_names(storage.join(registry_url, "versions"))
        near = difflib.get_close_matches(version, names, n=_NAMED, cutoff=0.5) or names[-_NAMED:]
        there = f"there are {', '.join(near)}" if near else "there are none"
        raise ConfigError(f"{registry_url}: has no whole version {version!r}; {there}") from None
