"""What a run trains, and the refusal of checkpoints of something else; free of DeepSpeed, so that the driver may ask too."""

from typing import Any

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.config_file import differences, shaping_settings
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import CatalogueError, CheckpointError, DataNotReadyError
from lrurec_dist.train.checkpoint import Subject
from lrurec_dist.train.checkpoint_index import find_checkpoint

_SAME_SHAPE = ("dim", "hidden", "blocks", "temperature")  # of the model; the last one scales what rows mean


def model_arguments(config: Config, num_items: int) -> dict[str, Any]:
    """What `LRURec` takes: the shape of a model, wherever its table lies."""
    model = config.model
    return {
        "num_items": num_items,
        "dim": model.dim,
        "hidden": model.hidden,
        "blocks": model.blocks,
        "dropout": model.dropout,
        "ring": [model.ring_min, model.ring_max],
        "temperature": model.temperature,
    }


def describe_subject(config: Config, dataset: SequenceDataset, model: dict[str, Any]) -> Subject:
    """What a run trains; `model` are the arguments of `LRURec`."""
    return Subject(
        model=model,
        num_items=dataset.num_items,
        catalogue_fingerprint=dataset.manifest["catalogue_fingerprint"],
        dataset_identity=dataset.identity,
        settings=shaping_settings(config),
    )


def refuse_another_subject(url: str, manifest: dict[str, Any], subject: Subject) -> None:
    """Raise unless a checkpoint is of the run that `subject` describes; names what differs.

    A setting that the checkpoint does not know, because it is newer, had its default.
    """
    if manifest["catalogue_fingerprint"] != subject.catalogue_fingerprint:
        raise CatalogueError(
            f"checkpoint {url} expects catalogue {manifest['catalogue_fingerprint']} ({manifest['num_items']:,} items), the dataset has "
            f"{subject.catalogue_fingerprint} ({subject.num_items:,}); set train.resume=never or another run_dir"
        )
    stored = {**shaping_settings(Config()), **manifest["settings"]}
    differing = differences({name: stored.get(name, "unset") for name in subject.settings}, subject.settings)
    if differing:
        raise CheckpointError(
            f"checkpoint {url} was trained with other settings than this run ({'; '.join(differing)}); set them back, or choose another "
            "run_dir, or start over with train.resume=never"
        )
    if manifest["dataset_identity"] != subject.dataset_identity:
        raise CheckpointError(
            f"checkpoint {url} was trained on dataset {manifest['dataset_identity']}, which has other sequences than "
            f"{subject.dataset_identity}: its place in the data means nothing there; set train.resume=never or another run_dir"
        )


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


def refuse_another_shape(setting: str, manifest: dict[str, Any], subject: Subject) -> None:
    """Raise unless the model of a checkpoint has the shape of this run's."""
    for name in _SAME_SHAPE:
        there, here = manifest["model"][name], subject.model[name]
        if there != here:
            raise CheckpointError(
                f"{setting}: was trained with model.{name}={there}, this run has {here}; set model.{name}={there}, or train without train.warm_start"
            )


def checkpoint_at(url: str) -> str:
    """The checkpoint that `train.warm_start` means: itself, or the best one of a run directory.

    Raises:
        DataNotReadyError: there is none.
        CheckpointError: the run's cannot be read, as of an earlier schema.
    """
    if storage.is_committed(url):
        return url
    best = find_checkpoint(url, "best")
    if best is None:
        raise DataNotReadyError(
            f"train.warm_start={url}: is neither a checkpoint nor a run directory with one; train that run first"
        )
    return best
