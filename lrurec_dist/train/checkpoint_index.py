"""Which checkpoints a run has: what is found, kept, deleted, and gone on from.

A checkpoint exists once its manifest does. `index.json` is written after it and is an account for
people and a short way for readers: what it lacks, because the process was killed in between, is
taken from the directories.
"""

import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from lrurec_dist import collectives, storage
from lrurec_dist.errors import CheckpointError, IntegrityError, StorageError, TryAgainError
from lrurec_dist.train.checkpoint import checkpoint_url, read_checkpoint_manifest

_STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Choice:
    """The checkpoint to go on from, and what was found on the way to it.

    `best` is the best whole checkpoint's recall@10 with its step; `damaged` the steps that are not
    whole; `notes` why, one sentence each.
    """

    url: str
    manifest: dict[str, Any]
    best: tuple[float, int] | None
    damaged: frozenset[int]
    notes: list[str] = field(default_factory=list)


def find_checkpoint(run_url: str, which: str) -> str | None:
    """The URL of the `best` or the `last` checkpoint, if there is one.

    Raises:
        CheckpointError: there are checkpoints and no manifest can be read, as of an earlier schema.
    """
    kept = kept_checkpoints(run_url)
    committed = [url for step in sorted(_steps_on_storage(run_url)) if storage.is_committed(url := checkpoint_url(run_url, step))]
    if committed and not kept:
        read_checkpoint_manifest(committed[-1], verify=False)
    if which == "last":
        return checkpoint_url(run_url, max(kept)) if kept else None
    ranked = _best_first(kept)
    return checkpoint_url(run_url, ranked[0]) if ranked else None


def newest_manifest(run_url: str) -> tuple[str, dict[str, Any]] | None:
    """The URL and the manifest of the newest checkpoint whose manifest can be read, its files unseen; None without one.

    Raises:
        CheckpointError: there are checkpoints, all of an earlier schema.
    """
    if find_checkpoint(run_url, "last") is None:
        return None
    for step in sorted(kept_checkpoints(run_url), reverse=True):
        url = checkpoint_url(run_url, step)
        with suppress(CheckpointError):  # whoever loads skips it too, and says why
            return url, read_checkpoint_manifest(url, verify=False)
    return None


def last_step(run_url: str) -> int:
    """The step of the last checkpoint; 0 without one."""
    return max(kept_checkpoints(run_url), default=0)


def kept_checkpoints(run_url: str) -> dict[int, float | None]:
    """The recall@10 of each committed checkpoint by its step; None where the step was not validated.

    One that the index does not name and whose manifest cannot be read is none.
    """
    known = _read_index(run_url)
    kept = {}
    for step in _steps_on_storage(run_url):
        if not storage.is_committed(checkpoint_url(run_url, step)):
            continue
        if step not in known:  # killed before the index was written
            try:
                validation = read_checkpoint_manifest(checkpoint_url(run_url, step), verify=False)["validation"]
            except CheckpointError:
                continue
            known[step] = validation["recall@10"] if validation else None
        kept[step] = known[step]
    return kept


def keep_checkpoints(run_url: str, step: int, recall: float | None, *, latest: int, damaged: frozenset[int]) -> None:
    """Write into the index that `step` was committed, and delete all but the latest few and the best.

    Steps after this one belong to a course of the run that was given up when it resumed from an
    earlier checkpoint; with `damaged` ones and leftovers they are deleted, now that there is a
    newer whole one.
    """
    found = {**kept_checkpoints(run_url), step: recall}
    kept = {other: metric for other, metric in found.items() if other <= step and other not in damaged - {step}}
    keep = {*sorted(kept)[-latest:], *_best_first(kept)[:1]}
    best = next(iter(_best_first(kept)), None)
    entries = [{"step": other, "recall@10": kept[other]} for other in sorted(keep)]
    storage.write_json(_index_url(run_url), {"best": best, "last": step, "checkpoints": entries})
    for other in _steps_on_storage(run_url) - keep:
        storage.remove_tree(checkpoint_url(run_url, other))


def choose_checkpoint(run_url: str, group: Any) -> Choice | None:
    """The newest whole checkpoint; all ranks call, each verifies its share of the files, and all get the same.

    Returns:
        None if nothing was ever committed.

    Raises:
        CheckpointError: there are checkpoints and none is whole.
        TryAgainError: none could be verified, and some only because the store failed in passing.
    """
    indexed, steps = collectives.on_first_rank(lambda: (_read_index(run_url), _steps_on_storage(run_url)), group)
    damaged: dict[int, str] = {}
    notes, passing = [], False
    for step in sorted(indexed.keys() | steps, reverse=True):
        url = checkpoint_url(run_url, step)
        if step not in indexed and not collectives.on_first_rank(lambda url=url: storage.is_committed(url), group):  # type: ignore[misc]
            notes.append(f"{url} was never committed: it is what an interrupted write left")
            continue
        fault = fault_of(url, group)
        if fault is None:
            manifest = collectives.on_first_rank(lambda url=url: read_checkpoint_manifest(url, verify=False), group)  # type: ignore[misc]
            notes += [f"skipping a damaged checkpoint: {why}" for why in damaged.values()]
            best, worse = _best_whole(run_url, step, group)
            notes += [f"the best checkpoint is damaged, the next best stands in: {why}" for why in worse.values()]
            return Choice(url, manifest, best, frozenset(damaged) | worse.keys(), notes)
        damaged[step] = str(fault)
        passing = passing or isinstance(fault, TryAgainError)
    if not damaged:
        return None
    message = f"none of the {len(damaged)} checkpoints of {run_url} is whole: {'; '.join(damaged.values())}"
    if passing:
        raise TryAgainError(f"{message}; try again later")
    raise CheckpointError(f"{message}; restore the files, set train.resume=never to start over, or train in another run_dir")


def fault_of(url: str, group: Any) -> IntegrityError | StorageError | None:
    """Why a checkpoint cannot be used, None if it is whole; all ranks call, and each reads its share of the files."""

    def look() -> IntegrityError | StorageError | None:
        try:
            manifest = read_checkpoint_manifest(url, verify=False)
            for relative in sorted(manifest["files"])[collectives.rank() :: collectives.world_size()]:
                storage.verify_file(url, relative, manifest["files"][relative], error=CheckpointError)
        except (IntegrityError, StorageError) as error:
            return error
        return None

    return next((fault for fault in collectives.together(look, group) if fault is not None), None)


def _best_whole(run_url: str, step: int, group: Any) -> tuple[tuple[float, int] | None, dict[int, str]]:
    """The best validated and whole checkpoint up to a step, and the better ones that are damaged."""

    def look() -> dict[int, float | None]:
        return {other: metric for other, metric in kept_checkpoints(run_url).items() if other <= step}

    kept = collectives.on_first_rank(look, group)
    worse: dict[int, str] = {}
    for other in _best_first(kept):
        metric = kept[other]
        fault = None if other == step else fault_of(checkpoint_url(run_url, other), group)
        if fault is None and metric is not None:
            return (metric, other), worse
        worse[other] = str(fault)
    return None, worse


def _best_first(kept: dict[int, float | None]) -> list[int]:
    """Validated steps by their metric, of equal ones the earlier first."""
    validated = {step: metric for step, metric in kept.items() if metric is not None}
    return sorted(validated, key=lambda step: (-validated[step], step))


def _index_url(run_url: str) -> str:
    return storage.join(run_url, "checkpoints", "index.json")


def _read_index(run_url: str) -> dict[int, float | None]:
    """What the index names; nothing if it is missing, torn or of an earlier schema, as the directories tell the same."""
    url = _index_url(run_url)
    try:
        return (
            {entry["step"]: entry["recall@10"] for entry in storage.read_json(url)["checkpoints"]} if storage.exists(url) else {}
        )
    except (ValueError, KeyError, TypeError):
        return {}


def _steps_on_storage(run_url: str) -> set[int]:
    names = storage.list_names(storage.join(run_url, "checkpoints"))
    return {int(found[1]) for name in names if (found := _STEP.fullmatch(name))}
