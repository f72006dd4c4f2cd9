"""A model whose catalogue is the first part of the one it is evaluated on, as last night's is of today's."""

import torch
from torch import Tensor, nn

from lrurec_dist import PAD_ID
from lrurec_dist.evaluate.evaluation import Encoder
from lrurec_dist.model.item_table import ItemTable


class KnownItems(nn.Module):
    """A model in front of a catalogue that extends its own: it does not see, and never recommends, what it does not know.

    Args:
        model: an encoder of fewer items.
        num_items: size of the larger catalogue, whose first ids are the model's.

    An item that it does not know has the score -inf, so a target among them has the rank
    num_items + 1. In a history it is left out, as the recommender does.
    """

    def __init__(self, model: Encoder, num_items: int) -> None:
        super().__init__()
        rows, bias = model.item_rows(), model.table.bias
        self._model, self._known = model, len(rows) - 1
        self.table = ItemTable(num_items, dim=rows.shape[1]).to(rows.device)
        new = num_items - self._known
        self.table.weight = nn.Parameter(torch.cat([rows, rows.new_zeros(new, rows.shape[1])]), requires_grad=False)
        self.table.bias = nn.Parameter(torch.cat([bias, bias.new_full((new,), -torch.inf)]), requires_grad=False)

    def item_rows(self) -> Tensor:
        """(num_items + 1, dim)."""
        return self.table.weight

    def encode(self, item_ids: Tensor) -> Tensor:
        """(batch, dim): as the model, after the items that it knows."""
        known = torch.where(item_ids <= self._known, item_ids, 0)
        order = torch.argsort((known != PAD_ID).long(), dim=1, stable=True)  # padding to the left
        return self._model.encode(known.gather(1, order))
