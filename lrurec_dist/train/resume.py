"""Where training begins: at the newest whole checkpoint of its run, at another run's parameters, or at nothing."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lrurec_dist.config import Config
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.train.carried import NAME as CARRIED
from lrurec_dist.train.carried import CarriedState
from lrurec_dist.train.checkpoint import Progress, Subject, moment_names, parameter_names
from lrurec_dist.train.checkpoint_index import Choice, choose_checkpoint
from lrurec_dist.train.engine import Engine
from lrurec_dist.train.pieces import PieceReader
from lrurec_dist.train.subject import refuse_another_subject
from lrurec_dist.train.warm_start import warm_start


def begin(
    config: Config,
    dataset: SequenceDataset,
    engine: Engine,
    carried: CarriedState | None,
    subject: Subject,
    group: Any,
    note: Callable[[str], None],
) -> tuple[Progress, frozenset[int]]:
    """Bring the engine, and the state that is carried if one is, to where training begins; all ranks call.

    Args:
        subject: of this run; a checkpoint of another is refused.
        group: of `collectives.new_group`.
        note: gets a line about what was chosen and what was skipped.

    Returns:
        The progress there, and the steps of the run's checkpoints that are damaged.

    Raises:
        CatalogueError: the checkpoint was trained on other item ids.
        CheckpointError: no checkpoint is whole, or the newest is of other settings or data.
        DataNotReadyError: there is no checkpoint at `train.warm_start`.
    """
    choice = choose_checkpoint(config.run_dir, group) if config.train.resume == "auto" else None
    if choice is None:
        if config.train.warm_start:
            return warm_start(config, dataset, engine, subject, group, note), frozenset()
        return Progress(), frozenset()
    refuse_another_subject(choice.url, choice.manifest, subject)
    progress = standing(choice)
    names = parameter_names(choice.manifest)
    with PieceReader(choice.url, choice.manifest["tensors"]) as reader:
        parameters = {name: reader.read(name, engine.rows_of(name)) for name in names}
        moments = {name: reader.read(name, engine.rows_of(name)) for name in moment_names(choice.manifest)}
        if carried is not None:
            mine = slice(carried.lanes.start, carried.lanes.stop)
            carried.load({CARRIED: reader.read(CARRIED, mine)})
    engine.load(parameters, moments, progress.updates)
    for line in choice.notes:
        note(line)
    note(f"resuming from {choice.url}")
    return progress, choice.damaged


def standing(choice: Choice) -> Progress:
    """The checkpoint's progress, with the best taken from what is whole."""
    progress = Progress(**choice.manifest["progress"])
    if choice.best is None:
        return replace(progress, best_recall=Progress.best_recall, validations_since_best=0)
    recall, step = choice.best
    return replace(
        progress, best_recall=recall, validations_since_best=sum(validation["step"] > step for validation in progress.curve)
    )
