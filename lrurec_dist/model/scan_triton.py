"""The recurrence as one Triton kernel: decay and state stay in registers, no gates in memory.

A program owns one sequence and a block of hidden units. It loads a tile of positions at a time, so
that the loads of a tile are under way together, scans the tile in registers, adds what the state
carried over contributes, and goes on. Each input is read once and each state written once.
"""

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

TILE = 16  # positions a program loads at a time
BLOCK = 32  # hidden units a program owns: one per lane of a warp


def forward(decay: Tensor, inputs: Tensor, spans: Tensor, initial: Tensor | None) -> Tensor:
    """States (rows, 2, hidden) of `scan.parallel_scan`, in the decay's type."""
    states = torch.zeros(inputs.shape, dtype=decay.dtype, device=inputs.device)
    if len(spans) and len(inputs):
        _launch(decay, inputs.contiguous(), None, spans, initial, states, None)
    return states


def backward(decay: Tensor, grad_states: Tensor, states: Tensor, spans: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """(rows, 2, hidden) gradient of the inputs and (2, hidden) gradient of the decay."""
    adjoint = torch.zeros_like(states)
    grad_decay = decay.new_zeros(len(spans), *decay.shape)  # one sum a sequence: no atomics, the same every time
    if len(spans) and len(states):
        _launch(decay, grad_states.contiguous(), states, spans, initial, adjoint, grad_decay)
    return adjoint, grad_decay.sum(0)


def _launch(
    decay: Tensor,
    inputs: Tensor,
    states: Tensor | None,
    spans: Tensor,
    initial: Tensor | None,
    output: Tensor,
    grad_decay: Tensor | None,
) -> None:
    hidden = decay.shape[1]
    _scan_kernel[(len(spans), triton.cdiv(hidden, BLOCK))](
        decay.contiguous(),
        inputs,
        states if states is not None else inputs,
        spans.contiguous(),
        initial.contiguous() if initial is not None else inputs,
        output,
        grad_decay if grad_decay is not None else output,
        hidden,
        with_initial=initial is not None,
        reverse=grad_decay is not None,
        tile=TILE,
        block=BLOCK,
        num_warps=1,
    )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _combine(left_re, left_im, left_x_re, left_x_im, right_re, right_im, right_x_re, right_x_im):  # type: ignore[no-untyped-def]
    """Apply the earlier step h -> left * h + left_x, then the later one."""
    return (
        left_re * right_re - left_im * right_im,
        left_re * right_im + left_im * right_re,
        right_re * left_x_re - right_im * left_x_im + right_x_re,
        right_re * left_x_im + right_im * left_x_re + right_x_im,
    )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _scan_kernel(  # type: ignore[no-untyped-def]
    decay,
    inputs,
    states,
    spans,
    initial,
    output,
    grad_decay,
    hidden,
    with_initial: tl.constexpr,
    reverse: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * block + tl.arange(0, block)
    here = unit < hidden
    begin = tl.load(spans + 2 * sequence)
    end = tl.load(spans + 2 * sequence + 1)
    decay_re = tl.load(decay + unit, mask=here, other=0.0)
    decay_im = tl.load(decay + hidden + unit, mask=here, other=0.0)
    start_re = tl.zeros_like(decay_re)
    start_im = tl.zeros_like(decay_re)
    if with_initial:
        start_re += tl.load(initial + sequence * 2 * hidden + unit, mask=here, other=0.0)
        start_im += tl.load(initial + sequence * 2 * hidden + hidden + unit, mask=here, other=0.0)
    sum_re = tl.zeros_like(decay_re)
    sum_im = tl.zeros_like(decay_re)
    if reverse:  # backwards in time, with conj(decay), from nothing
        decay_im = -decay_im
        carry_re = tl.zeros_like(decay_re)
        carry_im = tl.zeros_like(decay_re)
    else:
        carry_re = start_re
        carry_im = start_im

    position = tl.arange(0, tile)
    factor_re = tl.zeros((tile, block), decay_re.dtype) + decay_re[None, :]
    factor_im = tl.zeros((tile, block), decay_re.dtype) + decay_im[None, :]
    done = begin * 0
    while done < end - begin:
        if reverse:  # noqa: SIM108
            row = end - 1 - done - position
        else:
            row = begin + done + position
        inside = (done + position < end - begin)[:, None] & here[None, :]
        at = row[:, None] * 2 * hidden + unit[None, :]
        x_re = tl.load(inputs + at, mask=inside, other=0.0).to(decay_re.dtype)
        x_im = tl.load(inputs + at + hidden, mask=inside, other=0.0).to(decay_re.dtype)
        power_re, power_im, local_re, local_im = tl.associative_scan((factor_re, factor_im, x_re, x_im), 0, _combine)
        h_re = local_re + power_re * carry_re[None, :] - power_im * carry_im[None, :]
        h_im = local_im + power_re * carry_im[None, :] + power_im * carry_re[None, :]
        tl.store(output + at, h_re, mask=inside)
        tl.store(output + at + hidden, h_im, mask=inside)
        last = (position == tile - 1)[:, None]
        carry_re = tl.sum(tl.where(last, h_re, 0.0), 0)
        carry_im = tl.sum(tl.where(last, h_im, 0.0), 0)
        if reverse:  # here h is the adjoint; it meets the state before its position
            first = (row == begin)[:, None]
            before_re = tl.load(states + at - 2 * hidden, mask=inside & (row > begin)[:, None], other=0.0)
            before_im = tl.load(states + at - hidden, mask=inside & (row > begin)[:, None], other=0.0)
            before_re += tl.where(first, start_re[None, :], 0.0)
            before_im += tl.where(first, start_im[None, :], 0.0)
            h_re = tl.where(inside, h_re, 0.0)
            h_im = tl.where(inside, h_im, 0.0)
            sum_re += tl.sum(h_re * before_re + h_im * before_im, 0)
            sum_im += tl.sum(h_im * before_re - h_re * before_im, 0)
        done += tile
    if reverse:
        tl.store(grad_decay + sequence * 2 * hidden + unit, sum_re, mask=here)
        tl.store(grad_decay + sequence * 2 * hidden + hidden + unit, sum_im, mask=here)
