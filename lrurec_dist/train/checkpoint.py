"""Checkpoints: everything that decides the future of a run, keyed by name, committed by manifest.

    <run>/checkpoints/index.json          which step is best, which is last
                     /step_000500/        model.safetensors  optimizer.safetensors  manifest.json

Keyed by parameter name, a checkpoint loads at any world size and ZeRO stage.
"""

import functools
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from lrurec_dist import storage
from lrurec_dist.errors import CatalogueError, CheckpointError
from lrurec_dist.model.lrurec import LRURec

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Progress:
    """Where training stands; with the parameters and moments, all that decides what comes next.

    Dropout needs no saved generator: its masks are a function of (seed, step, rank).
    """

    step: int = 0
    epoch: int = 0
    batches_into_epoch: int = 0
    best_recall: float = -1.0
    validations_since_best: int = 0
    seconds: float = 0.0  # spent training, over all attempts
    curve: list[dict[str, float]] = field(default_factory=list)  # metrics of each validation


def checkpoint_url(run_url: str, step: int) -> str:
    """The directory of a step's checkpoint."""
    return storage.join(run_url, "checkpoints", f"step_{step:06d}")


def save_checkpoint(
    run_url: str,
    *,
    progress: Progress,
    parameters: dict[str, Tensor],
    moments: dict[str, Tensor],
    description: dict[str, Any],
    is_best: bool,
) -> None:
    """Commit a checkpoint, point the index at it, and delete what the index no longer names.

    Args:
        description: `model` (the arguments of `LRURec`), `catalogue_fingerprint`, and what else a
            reader should know.
        is_best: whether it becomes the best; it always becomes the last.
    """
    url = checkpoint_url(run_url, progress.step)
    storage.remove_tree(url)
    storage.write_bytes(storage.join(url, "model.safetensors"), save(parameters))
    storage.write_bytes(storage.join(url, "optimizer.safetensors"), save(moments))
    storage.commit(url, {"schema_version": SCHEMA_VERSION, "progress": asdict(progress), **description})
    index = _read_index(run_url)
    before = set(index.values())
    index["last"] = progress.step
    if is_best:
        index["best"] = progress.step
    storage.write_json(storage.join(run_url, "checkpoints", "index.json"), index)
    for step in before - set(index.values()):
        storage.remove_tree(checkpoint_url(run_url, step))


def _read_index(run_url: str) -> dict[str, int]:
    url = storage.join(run_url, "checkpoints", "index.json")
    return dict(storage.read_json(url)) if storage.exists(url) else {}


def find_checkpoint(run_url: str, which: str) -> str | None:
    """The URL of the `best` or the `last` checkpoint, if there is one."""
    step = _read_index(run_url).get(which)
    return None if step is None else checkpoint_url(run_url, step)


def load_checkpoint(url: str, *, catalogue_fingerprint: str) -> tuple[Progress, dict[str, Tensor], dict[str, Tensor]]:
    """Progress, parameters and moments of a checkpoint, verified.

    Raises:
        CheckpointError: files are missing or changed.
        CatalogueError: it was trained on other item ids.
    """
    manifest = read_checkpoint_manifest(url)
    if manifest["catalogue_fingerprint"] != catalogue_fingerprint:
        raise CatalogueError(
            f"checkpoint {url} expects catalogue {manifest['catalogue_fingerprint']}, the dataset has {catalogue_fingerprint}; set train.resume=never or another run_dir"
        )
    return (
        Progress(**manifest["progress"]),
        load(storage.read_bytes(storage.join(url, "model.safetensors"))),
        load(storage.read_bytes(storage.join(url, "optimizer.safetensors"))),
    )


def read_checkpoint_manifest(url: str) -> dict[str, Any]:
    """The verified manifest of a checkpoint."""
    manifest = storage.read_manifest(url, error=CheckpointError)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(f"{url}: schema_version={manifest.get('schema_version')}, this code reads {SCHEMA_VERSION}")
    return manifest


def load_model(url: str, device: str = "cpu") -> LRURec:
    """The model of a checkpoint, ready to score: verified, in evaluation mode, on `device`."""
    manifest = read_checkpoint_manifest(url)
    model = LRURec(**manifest["model"])
    model.load_state_dict(load(storage.read_bytes(storage.join(url, "model.safetensors"))))
    return model.eval().requires_grad_(False).to(torch.device(device))


def model_loader(url: str, device: str) -> "functools.partial[LRURec]":
    """`load_model` with its arguments bound: small enough to send to any worker."""
    return functools.partial(load_model, url, device)
