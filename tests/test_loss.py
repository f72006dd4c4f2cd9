"""The streamed softmax against the full matrix of scores in float64."""

import numpy as np
import pytest
import torch

from lrurec_dist.errors import LrurecError
from lrurec_dist.model.loss import MIN_ROWS, softmax_loss
from tests.reference import cross_entropy_sum

# 1: every item its own tile; 997: divides nothing; the last: one tile holds it all
TILES = [1, 997, 1 << 22]


def draw(num_targets: int, num_items: int = 203, dim: int = 6) -> list[torch.Tensor]:
    torch.manual_seed(num_targets)
    tensors = [torch.randn(num_targets, dim), torch.randn(num_items + 1, dim), torch.randn(num_items + 1)]
    return [tensor.double().requires_grad_() for tensor in tensors] + [torch.randint(1, num_items + 1, (num_targets,))]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("num_targets", [1, MIN_ROWS, 3 * MIN_ROWS + 1])
def test_the_sum_equals_the_full_matrix(tile: int, include: bool, num_targets: int) -> None:
    vectors, weight, bias, targets = draw(num_targets)
    total, count = softmax_loss(vectors, weight, bias, targets, include_padding_class=include, tile_elements=tile)
    plain = [tensor.detach().numpy() for tensor in (vectors, weight, bias, targets)]
    assert count == num_targets
    assert total.item() == pytest.approx(cross_entropy_sum(*plain, include), rel=1e-12)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("include", [True, False])
def test_gradients_equal_those_of_autograd_through_the_full_matrix(tile: int, include: bool) -> None:
    *tensors, targets = draw(2 * MIN_ROWS + 3)
    total, _ = softmax_loss(*tensors, targets, include_padding_class=include, tile_elements=tile)
    mine = torch.autograd.grad(total * 0.37, tensors)  # the factor stands for a division by the number of targets
    vectors, weight, bias = tensors
    first = 0 if include else 1
    full = torch.nn.functional.cross_entropy(vectors @ weight[first:].T + bias[first:], targets - first, reduction="sum")
    for gradient, truth in zip(mine, torch.autograd.grad(full * 0.37, tensors), strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-11)


def test_without_targets_the_sum_is_zero_and_gradients_are_zero() -> None:
    *tensors, targets = draw(0)
    total, count = softmax_loss(*tensors, targets, include_padding_class=True)
    gradients = torch.autograd.grad(total, tensors)
    assert (total.item(), count) == (0.0, 0)
    assert all(gradient.abs().sum() == 0 for gradient in gradients)


@pytest.mark.parametrize("bad", [0, 204, -1])
def test_a_target_outside_the_catalogue_is_refused(bad: int) -> None:
    vectors, weight, bias, targets = draw(4)
    targets[2] = bad
    with pytest.raises(LrurecError, match="the catalogue from 1 to 203"):
        softmax_loss(vectors, weight, bias, targets, include_padding_class=True)


def test_very_large_scores_do_not_overflow() -> None:
    vectors, weight, bias, targets = draw(5)
    total, _ = softmax_loss(vectors * 1e3, weight, bias, targets, include_padding_class=True, tile_elements=640)
    assert bool(torch.isfinite(total))


def test_without_gradients_no_gradient_is_computed() -> None:
    vectors, weight, bias, targets = draw(8)
    with torch.no_grad():
        total, _ = softmax_loss(vectors, weight, bias, targets, include_padding_class=True)
    expected = cross_entropy_sum(*(tensor.detach().numpy() for tensor in (vectors, weight, bias, targets)), True)
    assert not total.requires_grad
    assert total.item() == pytest.approx(expected)


def test_scores_in_use_at_a_time_stay_within_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args: sizes.append(args[1].shape[0] * args[2].shape[1]) or plain(*args))
    vectors, weight, bias, targets = draw(500)
    softmax_loss(vectors, weight, bias, targets, include_padding_class=True, tile_elements=6400)
    assert sizes
    assert max(sizes) <= 6400
    assert np.prod([500, 204]) > 10 * max(sizes), "the full matrix is far larger, or the test would prove nothing"
