"""The baseline: a plain PyTorch implementation of LRURec as the paper describes it.

Complex parameters, Algorithm 1 with a concatenation a pass under autograd, rows padded to a fixed
length (and that to a power of two for the recursion), and the full matrix of scores over every
position, padding included. Parameters carry the names of the public code's state dict, so that the
package's import of such a checkpoint gives the very same model to compare with.
"""

import math

import torch
from torch import Tensor, nn


def recursive_scan(decay: Tensor, inputs: Tensor) -> Tensor:
    """Algorithm 1 as written: split in two, carry the last state over, concatenate.

    decay (hidden,) and inputs (batch, length, hidden), complex; length a power of two.
    """
    batch, length, hidden = inputs.shape
    states, half = inputs, 1
    powers = decay[None]
    while half < length:
        blocks = states.reshape(batch * length // (2 * half), 2 * half, hidden)
        first, second = blocks[:, :half], blocks[:, half:]
        states = torch.cat([first, second + first[:, -1:] * powers], dim=1)
        powers = torch.cat([powers, powers * powers[-1]])
        half *= 2
    return states.reshape(batch, length, hidden)


class _Recurrent(nn.Module):
    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        hidden = 2 * dim
        squared = torch.rand(hidden) * (0.99**2 - 0.8**2) + 0.8**2
        angle = torch.log(torch.rand(hidden) * 2 * math.pi)
        self.params_log = nn.Parameter(torch.stack([torch.log(-0.5 * torch.log(squared)), angle, 0.5 * torch.log1p(-squared)]))
        self.in_proj = nn.Linear(dim, hidden, dtype=torch.cfloat)
        self.out_proj = nn.Linear(hidden, dim, dtype=torch.cfloat)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        nu, theta, gamma = torch.exp(self.params_log)
        length = x.shape[1]
        drive = self.in_proj(x.to(torch.cfloat)) * gamma * valid.unsqueeze(-1)
        padding = (1 << (length - 1).bit_length()) - length
        states = recursive_scan(torch.exp(torch.complex(-nu, theta)), nn.functional.pad(drive, (0, 0, padding, 0)))[:, padding:]
        return self.layer_norm(self.dropout(self.out_proj(states).real) + x)


class _FeedForward(nn.Module):
    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.w_1 = nn.Linear(dim, 4 * dim)
        self.w_2 = nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(self.dropout(self.w_2(self.dropout(nn.functional.gelu(self.w_1(x))))) + x)


class PlainLRURec(nn.Module):
    """item_ids (batch, length) to scores (batch, length, num_items + 1)."""

    def __init__(self, num_items: int, dim: int = 64, blocks: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        self.embedding = nn.ModuleDict({"token": nn.Embedding(num_items + 1, dim), "layer_norm": nn.LayerNorm(dim)})
        self.dropout = nn.Dropout(dropout)
        layers = [
            nn.ModuleDict({"lru_layer": _Recurrent(dim, dropout), "feed_forward": _FeedForward(dim, dropout)})
            for _ in range(blocks)
        ]
        self.model = nn.Module()
        self.model.lru_blocks = nn.ModuleList(layers)
        self.model.bias = nn.Parameter(torch.zeros(num_items + 1))
        for name, parameter in self.named_parameters():
            if "layer_norm" not in name and "params_log" not in name:
                for part in (parameter.data.real, parameter.data.imag) if parameter.is_complex() else (parameter.data,):
                    nn.init.trunc_normal_(part, std=0.02, a=-0.04, b=0.04)

    def forward(self, item_ids: Tensor) -> Tensor:
        """Scores of every item and the padding class after every position."""
        valid = item_ids > 0
        x = self.embedding["layer_norm"](self.dropout(self.embedding["token"](item_ids)))
        for block in self.model.lru_blocks:
            x = block["feed_forward"](block["lru_layer"](x, valid))
        return x @ self.embedding["token"].weight.T + self.model.bias

    def loss(self, item_ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy over the real targets, the padding class among the classes."""
        return nn.functional.cross_entropy(self(item_ids).flatten(0, 1), targets.flatten(), ignore_index=0)
