"""A checkpoint: everything that decides the future of a run, keyed by tensor name and rows, committed by manifest.

    <run>/checkpoints/index.json                which are kept, with their metric
                     /step_000500/rank-00000-of-00003.safetensors …  manifest.json

Each rank writes one file with its rows of every parameter and optimizer moment. The manifest says
where each row lies, so that a checkpoint loads at any world size and ZeRO stage, with the item table
on every rank or dealt out to them.
"""

import functools
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from lrurec_dist import storage
from lrurec_dist.errors import CheckpointError
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.train.pieces import PieceReader

SCHEMA_VERSION = 2
_REQUIRED = {"progress", "model", "num_items", "catalogue_fingerprint", "dataset_identity", "settings", "validation", "tensors"}


@dataclass(frozen=True)
class Progress:
    """Where training stands; with the parameters and moments, all that decides what comes next.

    Dropout needs no saved generator: its masks are a function of (seed, step, rank).
    """

    step: int = 0
    epoch: int = 0
    batches_into_epoch: int = 0
    updates: int = 0  # that the moments have seen: those of a warm start's run count, skipped steps do not
    best_recall: float = -1.0
    validations_since_best: int = 0
    skipped: int = 0  # steps that changed nothing, as a gradient was not finite
    seconds: float = 0.0  # spent training, over all attempts
    curve: list[dict[str, float]] = field(default_factory=list)  # metrics of each validation


@dataclass(frozen=True)
class Subject:
    """What a run trains, the same in all its checkpoints.

    `model` are the arguments of `LRURec`; `settings` the dotted settings that shape the future.
    """

    model: dict[str, Any]
    num_items: int
    catalogue_fingerprint: str
    dataset_identity: str
    settings: dict[str, Any]


def checkpoint_url(run_url: str, step: int) -> str:
    """The directory of a step's checkpoint."""
    return storage.join(run_url, "checkpoints", f"step_{step:06d}")


def rank_file(rank: int, world_size: int) -> str:
    """The name of what one rank writes."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def write_manifest(
    url: str,
    *,
    subject: Subject,
    progress: Progress,
    validation: dict[str, float] | None,
    tensors: dict[str, Any],
    files: dict[str, dict[str, Any]],
) -> None:
    """Make the checkpoint exist, once every file is there.

    Args:
        validation: metrics at this step, if it was validated.
        tensors: as `PieceReader` takes them.
        files: each file with its size and SHA-256.
    """
    description = {"schema_version": SCHEMA_VERSION, **asdict(subject), "progress": asdict(progress)}
    storage.commit(url, {**description, "validation": validation, "tensors": tensors}, known=files)


def read_checkpoint_manifest(url: str, *, verify: bool = True) -> dict[str, Any]:
    """The manifest of a checkpoint, whose files were compared with it unless `verify` is False.

    Raises:
        CheckpointError: files are missing or changed, or it is no checkpoint of this schema.
    """
    manifest = storage.read_manifest(url, verify=False, error=CheckpointError)
    version = manifest.get("schema_version")
    if version == 1:
        raise CheckpointError(
            f"{url}: schema_version=1, this code reads {SCHEMA_VERSION}; finish this run with the version that began it, or train in another run_dir"
        )
    missing = _REQUIRED - manifest.keys()
    if version != SCHEMA_VERSION or missing:
        raise CheckpointError(
            f"{url}: is no checkpoint of schema_version={SCHEMA_VERSION} (it has {version}; {', '.join(sorted(missing)) or 'nothing'} is missing)"
        )
    unlisted = {piece["file"] for tensor in manifest["tensors"].values() for piece in tensor["pieces"]} - manifest["files"].keys()
    if unlisted:
        raise CheckpointError(f"{url}: tensors lie in {sorted(unlisted)[0]}, which is not among the files of the manifest")
    for relative, entry in manifest["files"].items() if verify else ():
        storage.verify_file(url, relative, entry, error=CheckpointError)
    return manifest


def parameter_names(manifest: dict[str, Any]) -> list[str]:
    """The tensors that are parameters."""
    return [name for name in manifest["tensors"] if "/" not in name]


def moment_names(manifest: dict[str, Any]) -> list[str]:
    """The tensors that are state of the optimizers, named `<moment>/<parameter>`."""
    return [name for name in manifest["tensors"] if name.startswith(("exp_avg/", "exp_avg_sq/", "sum_sq/"))]


def load_model(url: str, device: str = "cpu") -> LRURec:
    """The model of a checkpoint, ready to score: verified, in evaluation mode, on `device`."""
    manifest = read_checkpoint_manifest(url)
    model = LRURec(**manifest["model"])
    with PieceReader(url, manifest["tensors"]) as reader:
        model.load_state_dict({name: reader.read(name) for name in parameter_names(manifest)})
    return model.eval().requires_grad_(False).to(torch.device(device))


def model_loader(url: str, device: str) -> "functools.partial[LRURec]":
    """`load_model` with its arguments bound: small enough to send to any worker."""
    return functools.partial(load_model, url, device)
