"""What is refused before any process trains: settings, dataset and checkpoints that do not go together.

The workers ask the same again of what they load; here it costs no start of them.
"""

import torch

from lrurec_dist.config import Config
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.model.sharded_table import require_an_item_each
from lrurec_dist.train.checkpoint import read_checkpoint_manifest
from lrurec_dist.train.checkpoint_index import newest_manifest
from lrurec_dist.train.deepspeed_config import merge_extras
from lrurec_dist.train.subject import (
    checkpoint_at,
    describe_subject,
    model_arguments,
    refuse_another_catalogue,
    refuse_another_shape,
    refuse_another_subject,
)


def check_settings(config: Config, *, cuda: bool) -> None:
    """Refuse settings of DeepSpeed that contradict others; all of it that can be known without DeepSpeed.

    Args:
        cuda: whether training will compute on GPUs, or may.

    Raises:
        ConfigError: as it says.
    """
    options = config.train
    merge_extras(
        device=torch.device("cuda" if cuda else "cpu"),
        zero_stage=options.zero_stage,
        accumulation=options.accumulation,
        offload_optimizer=options.offload_optimizer,
        offload_parameters=options.offload_parameters,
        extras=options.deepspeed,
    )


def check_start(config: Config) -> None:
    """Refuse workers that the dataset is too small for, and checkpoints to begin with that are of something else.

    Raises:
        ConfigError: there are more workers than items to deal out.
        CatalogueError: the checkpoint was trained on other item ids.
        CheckpointError: it is of another version, other settings, other data or another shape.
        DataNotReadyError: there is no checkpoint at `train.warm_start`.
    """
    dataset = SequenceDataset(config.dataset_url)
    if config.model.table == "sharded":
        require_an_item_each(dataset.num_items, config.train.workers)
    subject = describe_subject(config, dataset, model_arguments(config, dataset.num_items))
    found = newest_manifest(config.run_dir) if config.train.resume == "auto" else None
    if found:
        refuse_another_subject(*found, subject)
    elif config.train.warm_start:
        setting = f"train.warm_start={config.train.warm_start}"
        manifest = read_checkpoint_manifest(checkpoint_at(config.train.warm_start), verify=False)
        refuse_another_shape(setting, manifest, subject)
        refuse_another_catalogue(setting, manifest, dataset)
