"""A run that begins with the parameters of another, whose catalogue its own extends."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrurec_dist import PAD_ID, collectives
from lrurec_dist.config import Config
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.model.item_table import BIAS, normal_values
from lrurec_dist.train.checkpoint import Progress, Subject, moment_names, parameter_names, read_checkpoint_manifest
from lrurec_dist.train.checkpoint_index import fault_of
from lrurec_dist.train.engine import Engine
from lrurec_dist.train.given_rows import read_given_rows
from lrurec_dist.train.pieces import PieceReader
from lrurec_dist.train.sharded_engine import TABLE, ShardedEngine
from lrurec_dist.train.subject import checkpoint_at, refuse_another_catalogue, refuse_another_shape

_ROWS_AT_A_TIME = 1 << 16  # in float64, for the standard deviation


def warm_start(
    config: Config, dataset: SequenceDataset, engine: Engine, subject: Subject, group: Any, note: Callable[[str], None]
) -> Progress:
    """Load the parameters of `train.warm_start`, a run directory (its best checkpoint) or a checkpoint; all ranks call.

    Items known there keep their rows to the bit. New items get rows and biases drawn, by the run's
    seed, from a normal distribution with mean and standard deviation of the known ones in each
    dimension, and moments of zero; `train.new_item_vectors` may give some rows. With a sharded table
    each rank reads and draws its own rows.

    Returns:
        Progress at step 0. With moments it counts the updates they have seen, or Adam would take
        them for sums of a single step and multiply them tenfold.

    Raises:
        DataNotReadyError: there is no checkpoint.
        CheckpointError: it is damaged, or the model has another shape.
        CatalogueError: the dataset's catalogue does not begin with that of the checkpoint.
    """
    setting = f"train.warm_start={config.train.warm_start}"
    url = collectives.on_first_rank(lambda: checkpoint_at(config.train.warm_start), group)
    if fault := fault_of(url, group):
        raise type(fault)(f"{setting}: {fault}")
    manifest = collectives.on_first_rank(lambda: read_checkpoint_manifest(url, verify=False), group)
    refuse_another_shape(setting, manifest, subject)
    collectives.on_first_rank(lambda: refuse_another_catalogue(setting, manifest, dataset), group)
    with_moments = config.train.warm_start_moments
    with PieceReader(url, manifest["tensors"]) as reader:
        parameters = {name: reader.read(name, engine.rows_of(name)) for name in parameter_names(manifest)}
        names = moment_names(manifest) if with_moments else []
        moments = {name: reader.read(name, engine.rows_of(name)) for name in names}
    held = range(dataset.num_items + 1)
    for name, value in moments.items():
        if name.partition("/")[2].startswith(TABLE):
            new_rows = len(held[engine.rows_of(name)]) - len(value)
            moments[name] = torch.cat([value, value.new_zeros(new_rows, *value.shape[1:])])

    def total(values: Tensor) -> Tensor:
        """Over the rows of all ranks, where each has some."""
        if isinstance(engine, ShardedEngine):
            return torch.stack(collectives.together(lambda: values, group)).sum(0)
        return values

    for name, value in parameters.items():
        if name.startswith(TABLE):
            parameters[name] = extended(value, held[engine.rows_of(name)], seed=config.seed, total=total)
    given = _given_rows(config.train.new_item_vectors, dataset, manifest["num_items"], subject.model["dim"], group)
    place = held[engine.rows_of(f"{TABLE}weight")]
    for item_id, row in given.items():
        if item_id in place:
            parameters[f"{TABLE}weight"][place.index(item_id)] = row
    before = Progress(**manifest["progress"])
    updates = before.updates if with_moments else 0
    engine.load(parameters, moments if with_moments else None, updates)
    new = dataset.num_items - manifest["num_items"]
    with_rows = f", {len(given):,} of them with given rows" if given else ""
    note(
        f"warm start from {url}: {manifest['num_items']:,} items keep their rows, {new:,} are new{with_rows}; "
        f"{'with' if with_moments else 'without'} moments"
    )
    return Progress(updates=updates)


def _given_rows(url: str, dataset: SequenceDataset, known: int, dim: int, group: Any) -> dict[int, Tensor]:
    if not url:
        return {}
    return collectives.together(lambda: read_given_rows(url, dataset.catalogue, known=known, dim=dim), group)[0]


def extended(rows: Tensor, item_ids: range, *, seed: int, total: Callable[[Tensor], Tensor]) -> Tensor:
    """A table with rows for new items too, drawn with mean and standard deviation of the known items' in each dimension.

    Args:
        rows: (known, dim) or biases (known,), of the first of `item_ids`; padding has no part in the statistics.
        item_ids: of all rows that there shall be here.
        seed: with item and dimension it decides what is drawn.
        total: brings a sum over these rows to that over all rows.
    """
    new = torch.tensor(item_ids[len(rows) :], dtype=torch.int64)
    items = (rows if rows.dim() > 1 else rows[:, None])[1 if item_ids[0] == PAD_ID else 0 :]
    count = total(torch.tensor(float(len(items)), dtype=torch.float64))
    mean = total(items.sum(0, dtype=torch.float64)) / count
    squares = torch.zeros_like(mean)
    for part in items.split(_ROWS_AT_A_TIME):
        squares += (part.double() - mean).square().sum(0)
    columns = torch.arange(rows.shape[1]) if rows.dim() > 1 else torch.tensor([BIAS])
    drawn = mean + (total(squares) / count).sqrt() * normal_values(new, columns, seed)
    return torch.cat([rows, drawn.to(rows.dtype).view(len(new), *rows.shape[1:])])
