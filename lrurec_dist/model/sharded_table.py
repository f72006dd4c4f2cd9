"""The item table of a catalogue that does not fit one device: its rows are spread over the ranks."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lrurec_dist import PAD_ID, collectives
from lrurec_dist.errors import ConfigError
from lrurec_dist.model.checks import require
from lrurec_dist.model.item_table import initial_rows


class ShardedItemTable(nn.Module):
    """This rank's rows of the item catalogue; row `item_id` lives on rank item_id % world_size, at item_id // world_size.

    Args:
        num_items: items of the whole catalogue.
        dim: width of a row.
        seed: of the initial values, which are a function of (seed, item_id) and do not depend on the number of ranks.

    `weight` (local_rows, dim) and `bias` (local_rows,) hold what this rank owns, `PAD_ID` included, and are all that is
    ever allocated. Initial values are those of the replicated table with this seed.

    Lookups are collective: every rank calls them equally often and in the same order, each with as many ids as it
    likes, and carries out the backward pass, in which owners receive the sum of all ranks' gradients. That is a sparse
    gradient of `weight` and `bias` (uncoalesced, as from `nn.Embedding(sparse=True)`), unless a dense one from a full softmax joins it.

    Raises:
        ConfigError: there are more ranks than items.
    """

    def __init__(self, num_items: int, dim: int, *, seed: int) -> None:
        super().__init__()
        self.num_items = num_items
        self.rank, self.world_size = collectives.rank(), collectives.world_size()
        require_an_item_each(num_items, self.world_size)
        weight, bias = initial_rows(self.item_ids(), dim, seed)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def item_ids(self) -> Tensor:
        """(local_rows,) int64: the item of each row of this rank, ascending, on the CPU."""
        return torch.arange(self.rank, self.num_items + 1, self.world_size)

    def forward(self, item_ids: Tensor) -> Tensor:
        """Rows (..., dim) of item_ids (...) int64.

        Raises:
            LrurecError: an id outside the catalogue. The other ranks then fail with the process group.
        """
        rows: Tensor = _Fetch.apply(self.weight, self._route(item_ids.flatten()))
        return rows.view(*item_ids.shape, self.weight.shape[1])

    def rows_and_biases(self, item_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (ids, dim) and biases (ids,) of item_ids (ids,) int64; raises as `forward`."""
        route = self._route(item_ids)
        return _Fetch.apply(self.weight, route), _Fetch.apply(self.bias, route)

    def _route(self, item_ids: Tensor) -> "_Route":
        require(
            (item_ids >= PAD_ID) & (item_ids <= self.num_items),
            f"item_ids: an id is outside 0..{self.num_items}, the catalogue",
        )
        # each row travels once; sorted by (owner, row), so that an owner's part is in one piece
        per_owner = self.num_items // self.world_size + 1
        keys, places = torch.unique(item_ids % self.world_size * per_owner + item_ids // self.world_size, return_inverse=True)
        owners = keys // per_owner
        asked = torch.bincount(owners, minlength=self.world_size).tolist()
        given = collectives.exchange_counts(asked, item_ids.device)
        return _Route(collectives.exchange_rows(keys % per_owner, asked, given), given, asked, places)


def require_an_item_each(num_items: int, world_size: int) -> None:
    """Refuse more ranks than a sharded table has items for.

    Raises:
        ConfigError: as its name says.
    """
    if num_items < world_size:
        raise ConfigError(
            f"world_size={world_size}: a sharded item table needs an item for every rank, the catalogue has {num_items}; "
            f"take at most {num_items} workers, or model.table=replicated"
        )


class _Route(NamedTuple):
    """Which rows a lookup moves between which ranks."""

    rows: Tensor  # local rows the ranks ask this one for, rank by rank
    given: list[int]  # how many of them go to each rank
    asked: list[int]  # distinct rows this rank gets from each
    places: Tensor  # (ids,) where among those each id's row is


class _Fetch(torch.autograd.Function):
    """Rows of a local parameter, by route."""

    @staticmethod
    def forward(ctx, values, route):  # type: ignore[no-untyped-def]
        ctx.route, ctx.shape = route, values.shape
        return collectives.exchange_rows(values[route.rows], route.given, route.asked)[route.places]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        rows, given, asked, places = ctx.route
        sums = grad.new_zeros(sum(asked), *grad.shape[1:]).index_add_(0, places, grad)
        received = collectives.exchange_rows(sums, asked, given)
        return torch.sparse_coo_tensor(rows[None], received, ctx.shape, check_invariants=False), None
