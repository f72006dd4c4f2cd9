"""LRURec: stacked linear recurrent units with feed-forward blocks over a tied item table.

Zhenrui Yue et al., Linear Recurrent Units for Sequential Recommendation, WSDM 2024,
arXiv 2310.02367. All parameters are real: B and C of the recurrence are real matrices of twice the
width, first the real parts and then the imaginary ones, so that a projection is one real product
and its result is the two planes the scan works on.
"""

import math

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from lrurec_dist import PAD_ID
from lrurec_dist.errors import LrurecError
from lrurec_dist.model.checks import require
from lrurec_dist.model.dropout import Dropout
from lrurec_dist.model.item_table import ItemTable
from lrurec_dist.model.scan import parallel_scan
from lrurec_dist.model.sharded_table import ShardedItemTable

RECURRENCE = ("nu_log", "theta_log", "gamma_log")  # float32 always, no weight decay by default


def _project(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """x W^T + b computed in `dtype`; parameters keep their own."""
    return nn.functional.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))


def _last_states(states: Tensor, spans: Tensor, before: Tensor) -> Tensor:
    """(batch, 2, hidden): the last of each span's rows of `states` (rows, 2, hidden), or `before` where it has none."""
    if not len(states):
        return before
    begin, end = spans.unbind(1)
    return torch.where((begin < end)[:, None, None], states[(end - 1).clamp(min=0)], before)


class RecurrentLayer(nn.Module):
    """out = LayerNorm(dropout(Re(C h)) + x) with h[t] = decay * h[t-1] + gamma * (B x[t] + b)."""

    def __init__(self, dim: int, hidden: int, dropout: float, ring: tuple[float, float]) -> None:
        super().__init__()
        low, high = ring
        squared_modulus = torch.rand(hidden) * (high**2 - low**2) + low**2
        self.nu_log = nn.Parameter(torch.log(-0.5 * torch.log(squared_modulus)))
        self.theta_log = nn.Parameter(torch.log(torch.rand(hidden) * 2 * math.pi))
        self.gamma_log = nn.Parameter(0.5 * torch.log1p(-squared_modulus))
        self.in_proj = nn.Linear(dim, 2 * hidden)
        self.out_proj = nn.Linear(2 * hidden, dim)
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, spans: Tensor, dtype: torch.dtype, before: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        states = parallel_scan(self.decay(), self.drive(x, dtype), spans, before)
        return self.read(states, x, dtype), None if before is None else _last_states(states, spans, before)

    def decay(self) -> Tensor:
        """(2, hidden) real and imaginary part, modulus below 1 by construction."""
        modulus, angle = torch.exp(-torch.exp(self.nu_log)), torch.exp(self.theta_log)
        return torch.stack([modulus * torch.cos(angle), modulus * torch.sin(angle)])

    def drive(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """gamma * (B x + b): (rows, dim) to (rows, 2, hidden)."""
        # gamma goes into the few weights, not over the many rows
        gamma = torch.exp(self.gamma_log).repeat(2)
        weight, bias = self.in_proj.weight * gamma[:, None], self.in_proj.bias * gamma
        return _project(x, weight, bias, dtype).unflatten(-1, (2, -1))

    def read(self, states: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """LayerNorm(dropout(Re(C h)) + x) for states (rows, 2, hidden) and x (rows, dim)."""
        return self.norm(self.dropout(_project(states.flatten(1), self.out_proj.weight, self.out_proj.bias, dtype)) + x)


class FeedForward(nn.Module):
    """out = LayerNorm(dropout(W2 dropout(gelu(W1 x))) + x), four times as wide inside."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.w_1 = nn.Linear(dim, 4 * dim)
        self.w_2 = nn.Linear(4 * dim, dim)
        self.activation = Dropout(dropout, gelu=True)
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        inner = self.activation(_project(x, self.w_1.weight, self.w_1.bias, dtype))
        return self.norm(self.dropout(_project(inner, self.w_2.weight, self.w_2.bias, dtype)) + x)


class LRURec(nn.Module):
    """Sequential recommender whose whole memory of a user is one complex vector per block.

    Args:
        num_items: items in the catalogue; ids run from 1 to num_items.
        dim: width of item rows and of the user vector.
        hidden: recurrent state size per block.
        blocks: recurrent + feed-forward pairs.
        dropout: probability, on embeddings and inside both layers.
        ring: decay moduli start uniformly (in area) between these two.
        temperature: above 0, an item's score is cosine / temperature + bias instead of product + bias.
        table: item rows to use instead of rows of its own; it keeps its values, and is as wide and as long as said here.
        compute_dtype: of projections and feed-forward, the parameters' own when None. Item rows,
            residual path, LayerNorm and the recurrence keep the parameters' type under bfloat16.
        checkpointed: keep only each block's input for the backward pass and compute the block again
            there, dropout masks included: the same gradients, a third more time, less memory.

    Parameters are drawn from torch's global generator: seed it for a repeatable model. As in the
    original, all but LayerNorm and the recurrence are truncated normal, std 0.02 within +-0.04.

    With a `ShardedItemTable` every rank has to run the model equally often, with or without positions to keep.

    Raises:
        LrurecError: `table` is of another size.
    """

    def __init__(
        self,
        *,
        num_items: int,
        dim: int,
        hidden: int,
        blocks: int,
        dropout: float,
        ring: tuple[float, float] = (0.8, 0.99),
        temperature: float = 0.0,
        compute_dtype: torch.dtype | None = None,
        table: ItemTable | ShardedItemTable | None = None,
        checkpointed: bool = False,
    ) -> None:
        super().__init__()
        self.hidden, self.checkpointed = hidden, checkpointed
        self.temperature, self.compute_dtype = temperature, compute_dtype
        if table is not None and (table.num_items, table.weight.shape[1]) != (num_items, dim):
            raise LrurecError(
                f"table: holds {table.num_items:,} items of width {table.weight.shape[1]}, but num_items={num_items:,}, dim={dim}"
            )
        self.table = ItemTable(num_items, dim) if table is None else table
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.recurrent = nn.ModuleList(RecurrentLayer(dim, hidden, dropout, ring) for _ in range(blocks))
        self.feed_forward = nn.ModuleList(FeedForward(dim, dropout) for _ in range(blocks))
        for name, parameter in self.named_parameters():
            given = table is not None and name.startswith("table.")
            if not given and "norm." not in name and not name.endswith(RECURRENCE):
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)

    def forward(
        self, item_ids: Tensor, keep: Tensor, kept: Tensor | None = None, state: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """User vectors at the kept positions, and where a state is given the one that it becomes.

        Args:
            item_ids: (batch, length) int64, `PAD_ID` only on a left prefix.
            keep: (batch, length) bool, False only on a left prefix, True wherever item_ids is not
                `PAD_ID`. A kept padding position gives the vector of a user without history.
            kept: (keep.sum(),) int64, the places of keep in row-major order, from whom knows them;
                when None they are looked up, for which the host waits for a GPU.
            state: (blocks, batch, 2, hidden) as of `init_state`, that before each row's first item,
                however much padding stands on its left; zero when None.

        Returns:
            (keep.sum(), dim): vectors in row-major order of the kept positions, always float32 or
            the parameters' own type. With `state` also the new state, of its shape: that at each
            row's last item, or the given one where a row has none.

        Only kept positions enter projections, recurrence and feed-forward, so padding costs and
        changes nothing. A history in pieces, each from the state that the one before left, gives
        the vectors of the whole history within float32 rounding.

        Raises:
            LrurecError: an id outside the catalogue, or padding that is not a left prefix.
        """
        is_item = item_ids != PAD_ID
        require(
            (item_ids >= PAD_ID) & (item_ids <= self.table.num_items),
            f"item_ids: an id is outside 0..{self.table.num_items}, the catalogue",
        )
        require(is_item[:, :-1] <= is_item[:, 1:], f"item_ids: padding ({PAD_ID}) stands after an item; it belongs on the left")
        require(keep[:, :-1] <= keep[:, 1:], "keep: a dropped position stands after a kept one; rows keep a suffix")
        require(is_item <= keep, "keep: an item is dropped; every item drives the recurrence")
        kept_ids = item_ids.flatten()[keep.flatten().nonzero().squeeze(1) if kept is None else kept]
        end, items = keep.sum(1).cumsum(0), is_item.sum(1)
        spans = torch.stack([end - items, end], dim=1)  # kept padding stays outside, in the state zero

        dtype = self.compute_dtype or self.table.weight.dtype
        x = self.norm(self.dropout(self.table(kept_ids)))
        new_state = []
        for layer, block in enumerate(self.layers()):
            before = None if state is None else state[layer]
            if self.checkpointed and torch.is_grad_enabled():
                x, after = torch.utils.checkpoint.checkpoint(self._block, *block, x, spans, before, dtype, use_reentrant=False)
            else:
                x, after = self._block(*block, x, spans, before, dtype)
            new_state.append(after)
        vectors = self._user_vectors(x)
        return vectors if state is None else (vectors, torch.stack(new_state))

    @staticmethod
    def _block(
        recurrent: RecurrentLayer, feed_forward: FeedForward, x: Tensor, spans: Tensor, before: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        x, after = recurrent(x, spans, dtype, before)
        return feed_forward(x, dtype), after

    def _user_vectors(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=1) / self.temperature if self.temperature else x

    def item_rows(self) -> Tensor:
        """(rows of the table, dim): a user vector times these plus the item biases are the scores."""
        return nn.functional.normalize(self.table.weight, dim=1) if self.temperature else self.table.weight

    def layers(self) -> "list[tuple[RecurrentLayer, FeedForward]]":
        """The blocks, first to last."""
        return list(zip(self.recurrent, self.feed_forward, strict=True))  # type: ignore[arg-type]

    def encode(self, item_ids: Tensor) -> Tensor:
        """(batch, dim): the user vector after the whole history item_ids (batch, length).

        A row of padding alone gives the vector of a user without history.
        """
        keep = item_ids != PAD_ID
        keep[:, -1] = True
        last = keep.sum(1).cumsum(0) - 1
        return self(item_ids, keep)[last]

    def init_state(self, batch: int) -> Tensor:
        """(blocks, batch, 2, hidden) float32: the state before the first event, real and imaginary plane."""
        return self.table.weight.new_zeros(len(self.recurrent), batch, 2, self.hidden)

    def step(self, item_ids: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One more event per user, at a cost that does not depend on the history's length.

        Args:
            item_ids: (batch,) int64 in 1..num_items.
            state: (blocks, batch, 2, hidden) float32.

        Returns:
            User vectors (batch, dim) and the new state. Equals `encode` of the whole history
            within float32 rounding.
        """
        one = item_ids[:, None]
        stepped: tuple[Tensor, Tensor] = self(one, torch.ones_like(one, dtype=torch.bool), state=state)
        return stepped
