"""Dropout, alone and behind GELU, without a stored mask on the CPU.

Drawing masks one random number after the other was a quarter of a training step on the CPU. There
the mask is a hash of a seed and the element's place; the seed comes from torch's generator, so
`torch.manual_seed` repeats it. Elsewhere PyTorch's own operations serve.
"""

import torch
from torch import Tensor, nn

from lrurec_dist.model import native


class Dropout(nn.Module):
    """Zero a fraction of the elements in training and scale the others, so that the mean stays.

    Args:
        probability: of an element to be zero, in [0, 1).
        gelu: apply GELU first, in the same pass.
    """

    def __init__(self, probability: float, *, gelu: bool = False) -> None:
        super().__init__()
        self.probability, self.gelu = probability, gelu

    def forward(self, x: Tensor) -> Tensor:
        probability = self.probability if self.training else 0.0
        if not self.gelu and not probability:
            return x
        if x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and native.load() is not None:
            seed = int(torch.randint(2**63 - 1, ())) if probability else 0
            result: Tensor = _NativeDropout.apply(x, seed, probability, self.gelu)
            return result
        return nn.functional.dropout(nn.functional.gelu(x) if self.gelu else x, probability)


class _NativeDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seed, probability, gelu):  # type: ignore[no-untyped-def]
        ctx.seed, ctx.probability, ctx.gelu = seed, probability, gelu
        ctx.save_for_backward(x if gelu else None)
        return native.dropout(x.contiguous(), seed, probability, gelu=gelu)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        grad = grad.contiguous()
        return native.dropout_backward(grad if x is None else x, grad, ctx.seed, ctx.probability, gelu=ctx.gelu), None, None, None
