"""The linear recurrence h[t] = decay * h[t-1] + inputs[t], sequentially and in log2(length) passes.

The decay does not depend on time, so a pass needs no gates: only powers of the decay. Left padding
needs no mask: its inputs are zero, and a zero state stays zero.
"""

import torch
from torch import Tensor

from lrurec_dist.errors import LrurecError


def sequential_scan(decay: Tensor, inputs: Tensor, initial: Tensor | None = None) -> Tensor:
    """Every hidden state of h[t] = decay * h[t-1] + inputs[t], one step after the other.

    Args:
        decay: (hidden,) complex, modulus below 1.
        inputs: (batch, length, hidden) complex.
        initial: (batch, hidden) complex, the state before the first input; zero when None.

    Returns:
        (batch, length, hidden) complex.

    The truth `parallel_scan` is compared with; gradients come from autograd.
    """
    state = torch.zeros_like(inputs[:, 0]) if initial is None else initial
    states = []
    for step in range(inputs.shape[1]):
        state = decay * state + inputs[:, step]
        states.append(state)
    return torch.stack(states, dim=1)


def parallel_scan(decay: Tensor, inputs: Tensor, initial: Tensor | None = None) -> Tensor:
    """Every hidden state of h[t] = decay * h[t-1] + inputs[t], in log2(length) in-place passes.

    Args:
        decay: (hidden,) complex64 or complex128, modulus below 1.
        inputs: (batch, length, hidden) complex; any length from 1.
        initial: (batch, hidden) complex, the state before the first input; zero when None.

    Returns:
        (batch, length, hidden) complex. The last state is `[:, -1]`.

    Equals `sequential_scan` within rounding; differentiable in all three arguments. Memory: the
    states, which are also all that is kept for the backward pass. Recursion of arXiv 2310.02367,
    Algorithm 1, without its concatenations.
    """
    if inputs.dim() != 3 or inputs.shape[1] == 0 or decay.shape != inputs.shape[2:]:
        raise LrurecError(
            f"parallel_scan: inputs {tuple(inputs.shape)} and decay {tuple(decay.shape)} have to be "
            "(batch, length >= 1, hidden) and (hidden,)"
        )
    states: Tensor = _Scan.apply(decay, inputs, initial)
    return states


class _Scan(torch.autograd.Function):
    """The recurrence with its adjoint: the same recurrence, backwards in time, with conj(decay)."""

    @staticmethod
    def forward(ctx, decay, inputs, initial):  # type: ignore[no-untyped-def]
        states = inputs.clone()
        if initial is not None:
            states[:, 0].addcmul_(decay, initial)
        _scan_in_place(states, decay, reverse=False)
        ctx.save_for_backward(decay, states, initial)
        return states

    @staticmethod
    def backward(ctx, grad_states):  # type: ignore[no-untyped-def]
        decay, states, initial = ctx.saved_tensors
        adjoint = grad_states.clone()
        _scan_in_place(adjoint, decay.conj().resolve_conj(), reverse=True)
        grad_decay = torch.einsum("blh,blh->h", adjoint[:, 1:], states[:, :-1].conj())
        grad_initial = None
        if initial is not None:
            grad_decay = grad_decay + (adjoint[:, 0] * initial.conj()).sum(0)
            grad_initial = adjoint[:, 0] * decay.conj()
        return grad_decay, adjoint, grad_initial


def _scan_in_place(states: Tensor, decay: Tensor, *, reverse: bool) -> None:
    """Overwrite inputs by states, forwards or backwards in time.

    Sklansky's prefix network: after the pass with half-width `half`, every block of 2 * half
    positions holds its own prefix states, because the second half of each block received the last
    state of the first half times decay^1 .. decay^half. Blocks are counted from the start of time
    (from its end when `reverse`), so a last, shorter block needs no padding.
    """
    length = states.shape[1]
    powers = decay[None, :]  # decay^1 .. decay^half
    half = 1
    while half < length:
        width = 2 * half
        blocks, rest = divmod(length, width)
        if reverse:
            whole = states[:, rest:].unflatten(1, (blocks, width)) if blocks else None
            if whole is not None:
                whole[:, :, :half].addcmul_(powers.flip(0), whole[:, :, half : half + 1])
            if rest > half:
                states[:, : rest - half].addcmul_(powers[: rest - half].flip(0), states[:, rest - half : rest - half + 1])
        else:
            start = blocks * width
            whole = states[:, :start].unflatten(1, (blocks, width)) if blocks else None
            if whole is not None:
                whole[:, :, half:].addcmul_(powers, whole[:, :, half - 1 : half])
            if rest > half:
                states[:, start + half :].addcmul_(powers[: rest - half], states[:, start + half - 1 : start + half])
        powers = torch.cat([powers, powers * powers[-1]])
        half = width
