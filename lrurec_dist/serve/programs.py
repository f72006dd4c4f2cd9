"""The model as three programs of plain real arithmetic, for runtimes that have neither our kernels nor Python.

`Encode`  (batch, length) item ids, padded on the left     → (batch, dim) vectors, (blocks, batch, 2, hidden) state
`Step`    (batch,) item ids, (blocks, batch, 2, hidden)    → the same two after one more event
`TopK`    (batch, dim) vectors, (batch, any) ids left out  → (batch, k) item ids, best first, and their scores

They are what `LRURec.encode`, `LRURec.step` and `evaluate.ranking.top_k` compute, within float32 rounding, and states may
be handed from one to the other. Users stay padded, so that every operation has a shape that an exporter can follow.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrurec_dist import PAD_ID
from lrurec_dist.model.lrurec import FeedForward, LRURec, RecurrentLayer


class _Norm(nn.Module):
    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.shape, self.eps = norm.weight, norm.bias, norm.normalized_shape, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class _Block(nn.Module):
    """One block with what depends on parameters alone computed beforehand, in float64."""

    in_weight: Tensor
    in_bias: Tensor
    powers: Tensor

    def __init__(self, recurrent: RecurrentLayer, feed_forward: FeedForward, doublings: int) -> None:
        super().__init__()
        modulus, angle = torch.exp(-torch.exp(recurrent.nu_log.double())), torch.exp(recurrent.theta_log.double())
        exponents = 2 ** torch.arange(max(1, doublings))[:, None]
        planes = [modulus**exponents * function(angle * exponents) for function in (torch.cos, torch.sin)]
        gamma = torch.exp(recurrent.gamma_log).repeat(2)
        self.register_buffer("powers", torch.stack(planes, 1).float())  # (doublings, 2, hidden): decay to the 1, 2, 4, …
        self.register_buffer("in_weight", recurrent.in_proj.weight * gamma[:, None])
        self.register_buffer("in_bias", recurrent.in_proj.bias * gamma)
        self.out_proj, self.norm = recurrent.out_proj, _Norm(recurrent.norm)
        self.w_1, self.w_2, self.after = feed_forward.w_1, feed_forward.w_2, _Norm(feed_forward.norm)

    def drive(self, x: Tensor) -> tuple[Tensor, Tensor]:
        real, imaginary = functional.linear(x, self.in_weight, self.in_bias).chunk(2, dim=-1)
        return real, imaginary

    def times_power(self, place: int, real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
        power_real, power_imaginary = self.powers[place, 0], self.powers[place, 1]
        return power_real * real - power_imaginary * imaginary, power_real * imaginary + power_imaginary * real

    def read(self, real: Tensor, imaginary: Tensor, x: Tensor) -> Tensor:
        x = self.norm(self.out_proj(torch.cat([real, imaginary], -1)) + x)
        return self.after(self.w_2(functional.gelu(self.w_1(x))) + x)


class _Program(nn.Module):
    def __init__(self, model: LRURec, doublings: int) -> None:
        super().__init__()
        self.rows, self.norm, self.temperature = model.table.weight, _Norm(model.norm), model.temperature
        self.blocks = nn.ModuleList(_Block(*layers, doublings) for layers in model.layers())

    def embed(self, item_ids: Tensor) -> Tensor:
        return self.norm(functional.embedding(item_ids, self.rows))

    def user_vectors(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=1) / self.temperature if self.temperature else x


class Encode(_Program):
    """Vectors and states after the last `max_length` positions of each row; what stands before them is as padding.

    A row of padding alone gives the vector of a user without history and the state zero.
    """

    def __init__(self, model: LRURec, max_length: int) -> None:
        self.max_length, self.doublings = max_length, math.ceil(math.log2(max_length))
        super().__init__(model, self.doublings)

    def forward(self, item_ids: Tensor) -> tuple[Tensor, Tensor]:
        """As the module says."""
        length = item_ids.shape[1]
        recent = torch.arange(length, device=item_ids.device) >= length - self.max_length
        drives = ((item_ids != PAD_ID) & recent)[:, :, None]  # padding leaves the state zero
        x, states = self.embed(torch.where(drives[:, :, 0], item_ids, PAD_ID)), []
        for place, block in enumerate(self.blocks):
            real, imaginary = (plane * drives for plane in block.drive(x))  # type: ignore[operator]
            for doubling in range(self.doublings):
                # after it, each state holds what the last 2^(doubling + 1) positions left
                earlier = (functional.pad(plane, (0, 0, 2**doubling, 0))[:, :length] for plane in (real, imaginary))
                more_real, more_imaginary = block.times_power(doubling, *earlier)  # type: ignore[operator]
                real, imaginary = real + more_real, imaginary + more_imaginary
            states.append(torch.stack([real[:, -1], imaginary[:, -1]], dim=1))
            if place == len(self.blocks) - 1:
                real, imaginary, x = real[:, -1], imaginary[:, -1], x[:, -1]
            x = block.read(real, imaginary, x)  # type: ignore[operator]
        return self.user_vectors(x), torch.stack(states)


class Step(_Program):
    """Vectors and states after one more event of each user, of an item with an id from 1."""

    def __init__(self, model: LRURec) -> None:
        super().__init__(model, doublings=1)

    def forward(self, item_ids: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """As the module says."""
        x, states = self.embed(item_ids), []
        for place, block in enumerate(self.blocks):
            carried = block.times_power(0, state[place, :, 0], state[place, :, 1])  # type: ignore[operator]
            real, imaginary = (new + old for new, old in zip(block.drive(x), carried, strict=True))  # type: ignore[operator]
            states.append(torch.stack([real, imaginary], dim=1))
            x = block.read(real, imaginary, x)  # type: ignore[operator]
        return self.user_vectors(x), torch.stack(states)


class TopK(nn.Module):
    """The k best items of each user outside of those excluded; `PAD_ID` and -inf where candidates run out.

    Ids to exclude are padded by `PAD_ID`. Ties fall as the runtime likes.
    """

    def __init__(self, model: LRURec, k: int) -> None:
        super().__init__()
        rows, bias = model.item_rows(), model.table.bias.clone()
        bias[PAD_ID] = -torch.inf
        self.k = k
        self.register_buffer("rows", rows.clone())
        self.register_buffer("bias", bias)

    rows: Tensor
    bias: Tensor

    def forward(self, vectors: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
        """As the module says."""
        scores = functional.linear(vectors, self.rows, self.bias)
        left_out = torch.full_like(excluded, -torch.inf, dtype=scores.dtype)
        best, item_ids = scores.scatter(1, excluded, left_out).topk(self.k, dim=1)
        return torch.where(best > -torch.inf, item_ids, PAD_ID), best
