"""Models every evaluation is printed beside, made of the training part alone and ranked by the same rule as LRURec."""

import numpy as np
import torch
from torch import Tensor, nn

from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.data.splits import Split
from lrurec_dist.model.item_table import ItemTable

RECENT_SHARE = 0.1  # of the time range up to the end of training


class Popularity(nn.Module):
    """Scores every item by how often it occurs in the training part, the same for everyone.

    Args:
        counts: (num_items + 1,) int64, occurrences of each item_id.

    A one-dimensional model of the form LRURec has (vector . row + bias), so that there is one way
    to rank. Float64 keeps counts exact up to 2^53.
    """

    def __init__(self, counts: Tensor) -> None:
        super().__init__()
        self.table = ItemTable(len(counts) - 1, dim=1)
        self.table.weight = nn.Parameter(counts.double().unsqueeze(1), requires_grad=False)
        self.table.bias = nn.Parameter(torch.zeros(len(counts), dtype=torch.float64), requires_grad=False)

    def item_rows(self) -> Tensor:
        """(num_items + 1, 1): the counts."""
        return self.table.weight

    def encode(self, item_ids: Tensor) -> Tensor:
        """(batch, 1) ones: whoever asks gets the same scores."""
        return torch.ones(len(item_ids), 1, dtype=torch.float64, device=item_ids.device)


def recent_since(dataset: SequenceDataset, split: Split) -> int | None:
    """The moment from which training interactions are recent; None for a log of positions, which has no common time.

    Recent is the last tenth of the time range up to the end of training, where leave-last-out takes
    the end of the dataset's range.
    """
    if dataset.manifest["time_unit"] == "position":
        return None
    first, last = dataset.manifest["time_range"]
    end = split.train_until if split.kind == "global_time" else last + 1
    return int(end - np.ceil(RECENT_SHARE * (end - first)))
