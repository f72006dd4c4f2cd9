"""The item table: one row and one bias per item, input embedding and output projection at once."""

import torch
from torch import Tensor, nn


class ItemTable(nn.Module):
    """Rows of the item catalogue, replicated on every rank.

    Row `item_id` embeds that item and scores it; row `PAD_ID` embeds padding and is, as an option
    of the loss, one more class that is never the answer.
    """

    def __init__(self, num_items: int, dim: int) -> None:
        super().__init__()
        self.num_items = num_items
        self.weight = nn.Parameter(torch.empty(num_items + 1, dim))
        self.bias = nn.Parameter(torch.empty(num_items + 1))

    def forward(self, item_ids: Tensor) -> Tensor:
        """Rows (..., dim) of item_ids (...) int64."""
        return nn.functional.embedding(item_ids, self.weight)
