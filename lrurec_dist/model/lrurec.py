"""LRURec: stacked linear recurrent units with feed-forward blocks over a tied item table.

Zhenrui Yue et al., Linear Recurrent Units for Sequential Recommendation, WSDM 2024,
arXiv 2310.02367. All parameters are real: B and C of the recurrence are real matrices of twice the
width, with the real and imaginary part of each hidden unit side by side, so that a projection is
one real product and the complex view costs nothing.
"""

import math

import torch
from torch import Tensor, nn

from lrurec_dist import PAD_ID
from lrurec_dist.model.item_table import ItemTable
from lrurec_dist.model.scan import parallel_scan

RECURRENCE = ("nu_log", "theta_log", "gamma_log")  # float32 always, no weight decay by default


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
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)

    def decay(self) -> Tensor:
        """(hidden,) complex64, modulus below 1 by construction."""
        return torch.exp(torch.complex(-torch.exp(self.nu_log), torch.exp(self.theta_log)))

    def drive(self, x: Tensor) -> Tensor:
        """gamma * (B x + b): (..., dim) to (..., hidden) complex."""
        projected = self.in_proj(x).unflatten(-1, (-1, 2))
        return torch.view_as_complex(projected * torch.exp(self.gamma_log)[:, None])

    def read(self, states: Tensor, x: Tensor) -> Tensor:
        """LayerNorm(dropout(Re(C h)) + x) for states (..., hidden) complex and x (..., dim)."""
        return self.norm(self.dropout(self.out_proj(torch.view_as_real(states).flatten(-2))) + x)


class FeedForward(nn.Module):
    """out = LayerNorm(dropout(W2 dropout(gelu(W1 x))) + x), four times as wide inside."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.w_1 = nn.Linear(dim, 4 * dim)
        self.w_2 = nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.dropout(self.w_2(self.dropout(nn.functional.gelu(self.w_1(x))))) + x)


class LRURec(nn.Module):
    """Sequential recommender whose whole memory of a user is one complex vector per block.

    Args:
        num_items: items in the catalogue; ids run from 1 to num_items.
        dim: width of item rows and of the user vector.
        hidden: recurrent state size per block.
        blocks: recurrent + feed-forward pairs.
        dropout: probability, on embeddings and inside both layers.
        ring: decay moduli start uniformly (in area) between these two.

    Parameters are drawn from torch's global generator: seed it for a repeatable model. As in the
    original, all but LayerNorm and the recurrence are truncated normal, std 0.02 within +-0.04.
    """

    def __init__(
        self, *, num_items: int, dim: int, hidden: int, blocks: int, dropout: float, ring: tuple[float, float] = (0.8, 0.99)
    ) -> None:
        super().__init__()
        self.hidden = hidden
        self.table = ItemTable(num_items, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.recurrent = nn.ModuleList(RecurrentLayer(dim, hidden, dropout, ring) for _ in range(blocks))
        self.feed_forward = nn.ModuleList(FeedForward(dim, dropout) for _ in range(blocks))
        for name, parameter in self.named_parameters():
            if "norm." not in name and not name.endswith(RECURRENCE):
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)

    def forward(self, item_ids: Tensor, keep: Tensor) -> Tensor:
        """User vectors at the kept positions.

        Args:
            item_ids: (batch, length) int64, `PAD_ID` only on a left prefix.
            keep: (batch, length) bool, True wherever item_ids is not `PAD_ID`. A kept padding
                position gives the vector of a user without history.

        Returns:
            (keep.sum(), dim): vectors in row-major order of the kept positions.

        Only kept positions enter projections, so padding costs nothing there; padding never drives
        the recurrence, so more of it changes nothing.
        """
        batch, length = item_ids.shape
        positions = keep.flatten().nonzero().squeeze(1)
        kept_ids = item_ids.flatten()[positions]
        is_item = (kept_ids != PAD_ID).unsqueeze(1)
        x = self.norm(self.dropout(self.table(kept_ids)))
        for recurrent, feed_forward in self.layers():
            drive = recurrent.drive(x) * is_item
            inputs = drive.new_zeros(batch * length, self.hidden).index_copy(0, positions, drive)
            states = parallel_scan(recurrent.decay(), inputs.view(batch, length, self.hidden))
            x = feed_forward(recurrent.read(states.flatten(0, 1).index_select(0, positions), x))
        return x

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
        """(blocks, batch, hidden) complex64: the state before the first event."""
        parameter = self.table.weight
        return torch.zeros(len(self.recurrent), batch, self.hidden, dtype=torch.complex64, device=parameter.device)

    def step(self, item_ids: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One more event per user, at a cost that does not depend on the history's length.

        Args:
            item_ids: (batch,) int64 in 1..num_items.
            state: (blocks, batch, hidden) complex64.

        Returns:
            User vectors (batch, dim) and the new state. Equals `encode` of the whole history
            within float32 rounding.
        """
        x = self.norm(self.dropout(self.table(item_ids)))
        new_state = []
        for layer, (recurrent, feed_forward) in enumerate(self.layers()):
            new_state.append(recurrent.decay() * state[layer] + recurrent.drive(x))
            x = feed_forward(recurrent.read(new_state[-1], x))
        return x, torch.stack(new_state)
