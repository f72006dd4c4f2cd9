"""The data order that a configuration means."""

from dataclasses import asdict

from lrurec_dist.config import Config
from lrurec_dist.data.batches import DataOrder
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.data.splits import resolve_split


def data_order(config: Config, dataset: SequenceDataset) -> DataOrder:
    """The order that a configuration gives a dataset."""
    options = asdict(config.batch)
    del options["feed"]  # where batches are made does not change them
    return DataOrder(seed=config.seed, split=resolve_split(dataset, **asdict(config.split)), **options)
