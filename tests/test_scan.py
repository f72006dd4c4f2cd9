"""The parallel scan against the sequential one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec_dist.errors import LrurecError
from lrurec_dist.model.scan import parallel_scan, sequential_scan

LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 64, 200]


def draw(
    batch: int, length: int, hidden: int, dtype: torch.dtype = torch.complex128
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(length)
    decay = torch.polar(torch.rand(hidden, dtype=torch.float64) * 0.99, torch.rand(hidden, dtype=torch.float64) * 6).to(dtype)
    return decay, torch.randn(batch, length, hidden, dtype=dtype), torch.randn(batch, hidden, dtype=dtype)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("with_initial", [False, True])
def test_parallel_scan_equals_sequential_scan(length: int, with_initial: bool) -> None:
    decay, inputs, initial = draw(3, length, 5)
    start = initial if with_initial else None
    torch.testing.assert_close(parallel_scan(decay, inputs, start), sequential_scan(decay, inputs, start), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("with_initial", [False, True])
def test_gradients_equal_those_of_the_sequential_scan(length: int, with_initial: bool) -> None:
    tensors = [tensor.requires_grad_() for tensor in draw(2, length, 4)]
    used = tensors if with_initial else tensors[:2]
    weight = torch.randn(2, length, 4, dtype=torch.complex128)
    gradients = []
    for scan in (parallel_scan, sequential_scan):
        loss = (scan(*used) * weight).real.sum() + scan(*used)[:, -1].abs().square().sum()
        gradients.append(torch.autograd.grad(loss, used))
    for mine, truth in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_gradients_pass_gradcheck(length: int) -> None:
    assert torch.autograd.gradcheck(parallel_scan, [tensor.requires_grad_() for tensor in draw(2, length, 3)])


def test_float32_stays_within_rounding_over_a_long_sequence() -> None:
    decay, inputs, _ = draw(2, 1000, 8)
    single = parallel_scan(decay.to(torch.complex64), inputs.to(torch.complex64))
    torch.testing.assert_close(single.to(torch.complex128), sequential_scan(decay, inputs), rtol=1e-4, atol=1e-4)


@given(cut=st.integers(1, 30), length=st.integers(31, 60))
@settings(max_examples=25, deadline=None)
def test_a_sequence_cut_in_two_carries_its_state_over(cut: int, length: int) -> None:
    decay, inputs, initial = draw(2, length, 3)
    whole = parallel_scan(decay, inputs, initial)
    head = parallel_scan(decay, inputs[:, :cut], initial)
    tail = parallel_scan(decay, inputs[:, cut:], head[:, -1])
    torch.testing.assert_close(torch.cat([head, tail], dim=1), whole, rtol=1e-12, atol=1e-12)


def test_zero_inputs_on_the_left_leave_the_state_at_zero() -> None:
    decay, inputs, _ = draw(2, 9, 3)
    inputs[:, :4] = 0
    assert parallel_scan(decay, inputs)[:, :4].abs().max() == 0


def test_inputs_are_left_untouched() -> None:
    decay, inputs, _ = draw(2, 9, 3)
    before = inputs.clone()
    parallel_scan(decay, inputs)
    assert torch.equal(inputs, before)


@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 3), (2, 4, 5)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(LrurecError, match="parallel_scan"):
        parallel_scan(torch.zeros(3, dtype=torch.complex64), torch.zeros(shape, dtype=torch.complex64))


def test_an_empty_batch_gives_an_empty_result() -> None:
    decay, _, _ = draw(1, 1, 3)
    assert parallel_scan(decay, torch.zeros(0, 4, 3, dtype=torch.complex128)).shape == (0, 4, 3)
