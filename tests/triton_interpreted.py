"""Run by test_scan.py in a process where Triton interprets: its kernel against the sequential scan."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from lrurec_dist.model.scan import parallel_scan, sequential_scan
from lrurec_dist.model.scan_triton import BLOCK, TILE

CASES = [[1], [TILE], [TILE + 1, 0, 3], [2 * TILE - 1, 5]]
WIDTHS = [3, BLOCK + 2]  # less than a block, and one and a bit

for lengths in CASES:
    for hidden in WIDTHS:
        for with_initial in (False, True):
            torch.manual_seed(hidden)
            polar = torch.polar(torch.rand(hidden).double() * 0.99, torch.rand(hidden).double() * 6)
            decay = torch.stack([polar.real, polar.imag]).requires_grad_()
            gap = int(with_initial)  # rows of nobody before each sequence; without, neighbours' states lie there
            ends = torch.tensor([length + gap for length in lengths]).cumsum(0)
            spans = torch.stack([ends - torch.tensor(lengths), ends], dim=1)
            inputs = torch.randn(int(ends[-1]), 2, hidden).double().requires_grad_()
            initial = torch.randn(len(lengths), 2, hidden).double().requires_grad_() if with_initial else None
            leaves = [leaf for leaf in (decay, inputs, initial) if leaf is not None]
            mine = parallel_scan(decay, inputs, spans, initial, form="triton")
            truth = sequential_scan(decay, inputs, spans, initial)
            torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)
            upstream = torch.randn_like(truth)
            for gradient, expected in zip(
                torch.autograd.grad(mine, leaves, upstream), torch.autograd.grad(truth, leaves, upstream), strict=True
            ):
                torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)
print("states gradients")

decay, inputs = decay.detach().float(), inputs.detach().float().bfloat16()
states = parallel_scan(decay, inputs, spans, form="triton")
assert states.dtype == torch.float32
torch.testing.assert_close(states, parallel_scan(decay, inputs.float(), spans, form="triton"))
print("bfloat16")
