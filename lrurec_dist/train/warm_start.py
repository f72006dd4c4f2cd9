"""A run that begins with the parameters of another, whose catalogue its own extends."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrurec_dist import collectives, storage
from lrurec_dist.config import Config
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import CatalogueError, CheckpointError, DataNotReadyError
from lrurec_dist.train.checkpoint import Progress, Subject, moment_names, parameter_names, read_checkpoint_manifest
from lrurec_dist.train.checkpoint_index import fault_of, find_checkpoint
from lrurec_dist.train.engine import Engine
from lrurec_dist.train.pieces import PieceReader

TABLE = "table."  # parameters with a row for padding and one for each item
_SAME_SHAPE = ("dim", "hidden", "blocks", "temperature")  # of the model; the last one scales what rows mean


def warm_start(
    config: Config, dataset: SequenceDataset, engine: Engine, subject: Subject, group: Any, note: Callable[[str], None]
) -> Progress:
    """Load the parameters of `train.warm_start`, a run directory (its best checkpoint) or a checkpoint; all ranks call.

    Items known there keep their rows to the bit. New items get rows and biases drawn, by the run's
    seed, from a normal distribution with mean and standard deviation of the known ones in each
    dimension, and moments of zero.

    Returns:
        Progress at step 0. With moments it counts the updates they have seen, or Adam would take
        them for sums of a single step and multiply them tenfold.

    Raises:
        DataNotReadyError: there is no checkpoint.
        CheckpointError: it is damaged, or the model has another shape.
        CatalogueError: the dataset's catalogue does not begin with that of the checkpoint.
    """
    setting = f"train.warm_start={config.train.warm_start}"
    url = collectives.on_first_rank(lambda: _checkpoint_at(config.train.warm_start), group)
    if fault := fault_of(url, group):
        raise type(fault)(f"{setting}: {fault}")
    manifest = collectives.on_first_rank(lambda: read_checkpoint_manifest(url, verify=False), group)
    _refuse_another_shape(setting, manifest, subject)
    collectives.on_first_rank(lambda: refuse_another_catalogue(setting, manifest, dataset), group)
    names = parameter_names(manifest)
    draw = torch.Generator().manual_seed(config.seed)
    with PieceReader(url, manifest["tensors"]) as reader:
        parameters = {name: reader.read(name) for name in sorted(names)}
        moments = {name: reader.read(name) for name in moment_names(manifest)}
    for name, value in moments.items():
        if not config.train.warm_start_moments:
            value.zero_()
        if name.partition("/")[2].startswith(TABLE):
            moments[name] = torch.cat([value, value.new_zeros(_new_rows(value, dataset), *value.shape[1:])])
    for name, value in parameters.items():
        if name.startswith(TABLE):
            parameters[name] = extended(value, _new_rows(value, dataset), draw)
    before = Progress(**manifest["progress"])
    updates = before.updates if config.train.warm_start_moments else 0
    engine.load(parameters, moments, updates)
    new = dataset.num_items - manifest["num_items"]
    note(
        f"warm start from {url}: {manifest['num_items']:,} items keep their rows, {new:,} are new; "
        f"{'with' if config.train.warm_start_moments else 'without'} moments"
    )
    return Progress(updates=updates)


def extended(rows: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """A table with so many more rows, drawn with mean and standard deviation of the items' rows in each dimension.

    Args:
        rows: (1 + items, …); the first is padding, which has no part in the statistics.
    """
    items = rows[1:].double()
    new = items.mean(0) + items.std(0, correction=0) * torch.randn(count, *rows.shape[1:], generator=draw, dtype=torch.float64)
    return torch.cat([rows, new.to(rows.dtype)])


def refuse_another_catalogue(setting: str, manifest: dict[str, Any], dataset: SequenceDataset) -> None:
    """Raise unless the dataset's catalogue begins with the one a checkpoint was trained on."""
    known, expected = manifest["num_items"], manifest["catalogue_fingerprint"]
    advice = "prepare with dataset.parent=<the dataset of that run>, or train without train.warm_start"
    if dataset.num_items < known:
        raise CatalogueError(
            f"{setting}: knows {known:,} items, {dataset.url} has {dataset.num_items:,}: it does not extend them; {advice}"
        )
    found = dataset.catalogue.first(known).fingerprint
    if found != expected:
        raise CatalogueError(
            f"{setting}: its {known:,} items have fingerprint {expected}, the first {known:,} of the {dataset.num_items:,} in {dataset.url} "
            f"have {found}: ids would change their meaning; {advice}"
        )


def _refuse_another_shape(setting: str, manifest: dict[str, Any], subject: Subject) -> None:
    for name in _SAME_SHAPE:
        there, here = manifest["model"][name], subject.model[name]
        if there != here:
            raise CheckpointError(
                f"{setting}: was trained with model.{name}={there}, this run has {here}; set model.{name}={there}, or train without train.warm_start"
            )


def _new_rows(table: Tensor, dataset: SequenceDataset) -> int:
    return dataset.num_items + 1 - len(table)


def _checkpoint_at(url: str) -> str:
    if storage.is_committed(url):
        return url
    best = find_checkpoint(url, "best")
    if best is None:
        raise DataNotReadyError(
            f"train.warm_start={url}: is neither a checkpoint nor a run directory with one; train that run first"
        )
    return best
