"""The linear recurrence h[t] = decay * h[t-1] + inputs[t] over sequences packed one after the other.

A complex number is two real planes, so projections are real products and nothing has to be viewed
or copied. Sequences of any lengths lie in one array without padding; where one begins, the state
is its own initial state: a reset can stand at any position. The decay does not depend on time, so
no gates are made: powers of the decay do.
"""

from functools import cache

import torch
from torch import Tensor

from lrurec_dist.errors import LrurecError
from lrurec_dist.model import native
from lrurec_dist.model.checks import require

# Radix of the portable form by (sequences x hidden) at least. 2 is the paper's recursion; a radix
# as large as the length is one pass after the other through time, with least memory traffic and
# most calls. Forward and backward, times radix 2, on two cores (benchmarks/scan.py radix, 2026-11-21):
#   sequences x length x hidden      4     16     64    256
#   128 x 256 x 128               1.01   1.06   1.04   0.98
#    16 x 1024 x 128              1.05   0.99   0.85   0.60
#     1 x 8192 x 128              0.98   0.89   0.64   0.47
RADIX = ((1 << 14, 16), (1 << 11, 4), (0, 2))
FORMS = ("native", "triton", "portable")


def sequential_scan(decay: Tensor, inputs: Tensor, spans: Tensor, initial: Tensor | None = None) -> Tensor:
    """The states of `parallel_scan`, one step after the other in complex arithmetic: the truth."""
    factor = torch.complex(decay[0], decay[1])
    drive = torch.complex(inputs[:, 0], inputs[:, 1])
    states = list(torch.zeros_like(drive).unbind(0))
    for sequence, (begin, end) in enumerate(spans.tolist()):
        state = torch.zeros_like(factor) if initial is None else torch.complex(initial[sequence, 0], initial[sequence, 1])
        for row in range(begin, end):
            state = factor * state + drive[row]
            states[row] = state
    whole = torch.stack(states) if states else drive
    return torch.stack([whole.real, whole.imag], dim=1)


def parallel_scan(
    decay: Tensor, inputs: Tensor, spans: Tensor, initial: Tensor | None = None, *, form: str | None = None
) -> Tensor:
    """Every hidden state of h[t] = decay * h[t-1] + inputs[t], for many sequences at once.

    Args:
        decay: (2, hidden) real and imaginary part, float32 or float64, modulus below 1.
        inputs: (rows, 2, hidden), of the decay's type, or bfloat16 or float16 beside a float32 decay.
        spans: (sequences, 2) int64, first row of each sequence and one past its last; ascending,
            not overlapping. A sequence may be empty. Rows outside have the state zero.
        initial: (sequences, 2, hidden), the state before the first row of each; zero when None.
        form: one of `FORMS`, for measuring; None chooses by device and shape.

    Returns:
        (rows, 2, hidden) in the decay's type. The last state of a sequence is at its last row.

    Equals `sequential_scan` within rounding; differentiable in decay, inputs and initial. One
    sequence never touches another, not even with a NaN. Memory: the states, which are also all
    that is kept for the backward pass. Generalises Algorithm 1 of arXiv 2310.02367.

    Raises:
        LrurecError: shapes do not fit, spans overlap or leave the rows, or a modulus is not below 1.
    """
    if inputs.dim() != 3 or decay.shape != inputs.shape[1:] or decay.shape[0] != 2 or spans.dim() != 2 or spans.shape[1] != 2:
        raise LrurecError(
            f"parallel_scan: decay {tuple(decay.shape)}, inputs {tuple(inputs.shape)} and spans {tuple(spans.shape)} have to be "
            "(2, hidden), (rows, 2, hidden) and (sequences, 2)"
        )
    if initial is not None and initial.shape != (len(spans), *decay.shape):
        raise LrurecError(
            f"parallel_scan: initial {tuple(initial.shape)} has to be (sequences, 2, hidden) = {(len(spans), *decay.shape)}"
        )
    require(
        decay.detach().square().sum(0) < 1, "parallel_scan: decay has a modulus of 1 or more, or NaN; states would grow for ever"
    )
    edges = spans.flatten()
    require(edges[1:] >= edges[:-1], "parallel_scan: spans have to be ascending and may not overlap")
    require((edges >= 0) & (edges <= len(inputs)), f"parallel_scan: spans leave the {len(inputs)} rows of inputs")
    if form is None:
        form = best_form(decay.device)
    states: Tensor = _Scan.apply(decay, inputs, spans, initial, form)
    return states


def best_form(device: torch.device) -> str:
    """The fastest form that works here: a kernel for the device, else PyTorch's operations."""
    if device.type == "cpu":
        return "native" if native.load() is not None else "portable"
    return "triton" if device.type == "cuda" and _has_triton() else "portable"


@cache
def _has_triton() -> bool:
    try:
        from lrurec_dist.model import scan_triton  # noqa: F401
    except ImportError:
        return False
    return True


class _Scan(torch.autograd.Function):
    """The recurrence with its adjoint: the same recurrence, backwards in time, with conj(decay)."""

    @staticmethod
    def forward(ctx, decay, inputs, spans, initial, form):  # type: ignore[no-untyped-def]
        if form == "triton":
            from lrurec_dist.model import scan_triton

            states = scan_triton.forward(decay, inputs, spans, initial)
        elif form == "native":
            states = native.scan(decay, inputs.to(decay.dtype), spans, initial)
        else:
            states = _portable(decay, inputs.to(decay.dtype), spans, initial, reverse=False)
        ctx.save_for_backward(decay, states, spans, initial)
        ctx.form, ctx.input_dtype = form, inputs.dtype
        return states

    @staticmethod
    def backward(ctx, grad_states):  # type: ignore[no-untyped-def]
        decay, states, spans, initial = ctx.saved_tensors
        if ctx.form == "triton":
            from lrurec_dist.model import scan_triton

            adjoint, grad_decay = scan_triton.backward(decay, grad_states, states, spans, initial)
        elif ctx.form == "native":
            adjoint, grad_decay = native.scan_backward(decay, grad_states, states, spans, initial)
        else:
            adjoint = _portable(_conjugate(decay), grad_states, spans, None, reverse=True)
            grad_decay = _grad_decay(adjoint, states, spans, initial)
        grad_initial = None
        if initial is not None and ctx.needs_input_grad[3]:
            # an empty sequence passes nothing on; its first row belongs to another one, or to none
            nonempty = (spans[:, 1] > spans[:, 0])[:, None, None]
            first = adjoint[spans[:, 0].clamp(max=max(0, len(adjoint) - 1))] if len(adjoint) else torch.zeros_like(initial)
            grad_initial = torch.zeros_like(initial)
            _advance(grad_initial, _conjugate(decay), first * nonempty)
        return grad_decay, adjoint.to(ctx.input_dtype), None, grad_initial, None


def _conjugate(decay: Tensor) -> Tensor:
    return torch.stack([decay[0], -decay[1]])


def _grad_decay(adjoint: Tensor, states: Tensor, spans: Tensor, initial: Tensor | None) -> Tensor:
    """Sum of adjoint[t] * conj(states[t-1]), (2, hidden)."""
    before = torch.zeros_like(states)
    before[1:] = states[:-1]
    first = spans[:, 0][spans[:, 1] > spans[:, 0]]
    before[first] = 0 if initial is None else initial[spans[:, 1] > spans[:, 0]]
    real = (adjoint * before).sum((0, 1))
    imaginary = (adjoint[:, 1] * before[:, 0]).sum(0) - (adjoint[:, 0] * before[:, 1]).sum(0)
    return torch.stack([real, imaginary])


def _portable(decay: Tensor, inputs: Tensor, spans: Tensor, initial: Tensor | None, *, reverse: bool) -> Tensor:
    """The scan in PyTorch's operations: sequences side by side in a (time, sequences, 2, hidden) array."""
    begins, lengths = spans[:, 0], spans[:, 1] - spans[:, 0]
    longest, sequences = int(lengths.max()) if len(spans) else 0, len(spans)
    states = torch.zeros_like(inputs)
    if longest == 0:
        return states
    sequence = torch.repeat_interleave(torch.arange(sequences, device=spans.device), lengths)
    offset = torch.arange(len(sequence), device=spans.device) - (lengths.cumsum(0) - lengths)[sequence]
    rows = begins[sequence] + offset
    time = lengths[sequence] - 1 - offset if reverse else offset
    place = time * sequences + sequence
    dense = inputs.new_zeros(longest * sequences, *decay.shape).index_copy_(0, place, inputs[rows])
    dense = dense.view(longest, sequences, *decay.shape)
    if initial is not None:
        _advance(dense[0], decay, initial)
    width = sequences * decay.shape[1]
    _scan_in_place(dense, decay, next(radix for least, radix in RADIX if width >= least))
    return states.index_copy_(0, rows, dense.flatten(0, 1)[place])


def _scan_in_place(states: Tensor, decay: Tensor, radix: int) -> None:
    """Turn inputs (time, sequences, 2, hidden) into states: the paper's recursion with any radix.

    Blocks of `radix` positions are scanned one position after the other, all blocks at once; the
    blocks' last states are a shorter scan with decay^radix; and each block receives what the block
    before left, times decay^1, decay^2, ... Two passes over memory whatever the length.
    """
    blocks = len(states) // radix
    whole = states[: blocks * radix].unflatten(0, (blocks, radix)) if blocks > 1 else states[None, :radix]
    for position in range(1, whole.shape[1]):
        _advance(whole[:, position], decay, whole[:, position - 1])
    if blocks > 1:
        powers = [decay]
        for _ in range(radix - 1):
            powers.append(_times(powers[-1], decay))
        _scan_in_place(whole[:, -1], powers[-1], radix)
        _advance(whole[1:, :-1], torch.stack(powers[:-1])[:, None], whole[:-1, -1:])
    for position in range(max(1, blocks) * radix, len(states)):
        _advance(states[position], decay, states[position - 1])


def _times(left: Tensor, right: Tensor) -> Tensor:
    return torch.stack([left[0] * right[0] - left[1] * right[1], left[0] * right[1] + left[1] * right[0]])


def _advance(target: Tensor, decay: Tensor, source: Tensor) -> None:
    """target += decay * source in place; planes in the last dimension but one."""
    real, imaginary = decay[..., 0, :], decay[..., 1, :]
    target.addcmul_(real.unsqueeze(-2), source)
    target[..., 0, :].addcmul_(imaginary, source[..., 1, :], value=-1)
    target[..., 1, :].addcmul_(imaginary, source[..., 0, :])
