"""What settings and dataset only show together, asked before any process trains."""

from lrurec_dist.config import Config
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.model.sharded_table import require_an_item_each


def check_workers(config: Config) -> None:
    """Refuse workers that the dataset is too small for.

    Raises:
        ConfigError: there are more of them than items to deal out.
    """
    if config.model.table == "sharded":
        require_an_item_each(SequenceDataset(config.dataset_url).num_items, config.train.workers)
