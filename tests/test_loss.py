"""The streamed softmax against the full matrix of scores in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec_dist.errors import LrurecError
from lrurec_dist.model import loss, native
from lrurec_dist.model.loss import LINE, MIN_TARGETS, WIDE_TARGETS, softmax_loss, tile_shape
from tests.reference import cross_entropy_sum

# 1: every item its own tile; 997: divides nothing; the last: one tile holds it all
TILES = [1, 997, 1 << 22]
NUM_ITEMS = 203


def draw(num_targets: int, num_items: int = NUM_ITEMS, dim: int = 6, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(num_targets)
    tensors = [torch.randn(num_targets, dim), torch.randn(num_items + 1, dim), torch.randn(num_items + 1)]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors] + [torch.randint(1, num_items + 1, (num_targets,))]


def full_matrix(
    tensors: list[torch.Tensor],
    targets: torch.Tensor,
    include: bool,
    factors: torch.Tensor | None = None,
    unit_rows: bool = False,
) -> torch.Tensor:
    vectors, weight, bias = (tensor.double() for tensor in tensors)
    first = 0 if include else 1
    rows = torch.nn.functional.normalize(weight, dim=1) if unit_rows else weight
    each = torch.nn.functional.cross_entropy(vectors @ rows[first:].T + bias[first:], targets - first, reduction="none")
    return (each if factors is None else each * factors.double()).sum()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("num_targets", [1, MIN_TARGETS, 3 * MIN_TARGETS + 1])
def test_the_sum_equals_the_slow_truth(tile: int, include: bool, num_targets: int) -> None:
    vectors, weight, bias, targets = draw(num_targets)
    total, count = softmax_loss(vectors, weight, bias, targets, include_padding_class=include, tile_elements=tile)
    plain = [tensor.detach().numpy() for tensor in (vectors, weight, bias, targets)]
    assert count == num_targets
    assert total.item() == pytest.approx(cross_entropy_sum(*plain, include), rel=1e-12)


@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@given(num_targets=st.integers(1, 150), num_items=st.integers(1, 90), tile=st.integers(1, 20_000), include=st.booleans())
@settings(max_examples=25, deadline=None)
def test_gradients_equal_those_through_the_full_matrix_for_any_tile(
    unit_rows: bool, weighted: bool, num_targets: int, num_items: int, tile: int, include: bool
) -> None:
    *tensors, targets = draw(num_targets, num_items)
    factors = torch.rand(num_targets, dtype=torch.float64) if weighted else None
    total, _ = softmax_loss(
        *tensors, targets, include_padding_class=include, target_weights=factors, unit_rows=unit_rows, tile_elements=tile
    )
    full = full_matrix(tensors, targets, include, factors, unit_rows)
    torch.testing.assert_close(total, full, rtol=1e-10, atol=1e-10)
    mine = torch.autograd.grad(total * 0.37, tensors)  # the factor stands for a division by the number of targets
    for gradient, truth in zip(mine, torch.autograd.grad(full * 0.37, tensors), strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("tile", [997, 1 << 22])
@pytest.mark.parametrize("compiled", [True, False])
def test_float32_agrees_with_float64_with_and_without_the_compiled_kernel(
    monkeypatch: pytest.MonkeyPatch, tile: int, compiled: bool
) -> None:
    assert native.load() is not None
    if not compiled:
        monkeypatch.setattr(native, "load", lambda: None)
    *tensors, targets = draw(130, dtype=torch.float32)
    total, _ = softmax_loss(*tensors, targets, include_padding_class=False, tile_elements=tile)
    full = full_matrix(tensors, targets, False)
    assert total.item() == pytest.approx(full.item(), rel=2e-6)
    for gradient, truth in zip(torch.autograd.grad(total, tensors), torch.autograd.grad(full, tensors), strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("compiled", [True, False])
def test_bfloat16_products_stay_within_their_rounding(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    if not compiled:
        monkeypatch.setattr(native, "load", lambda: None)
    *tensors, targets = draw(300, dtype=torch.float32)
    total, _ = softmax_loss(*tensors, targets, include_padding_class=False, product_dtype=torch.bfloat16)
    full = full_matrix(tensors, targets, False)
    assert total.item() == pytest.approx(full.item(), rel=2e-3)
    for gradient, truth in zip(torch.autograd.grad(total, tensors), torch.autograd.grad(full, tensors), strict=True):
        assert float((gradient - truth).norm()) < 0.02 * float(truth.norm())


def test_the_precision_of_other_products_is_left_as_it_was() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    *tensors, targets = draw(5, dtype=torch.float32)
    softmax_loss(*tensors, targets, include_padding_class=False, product_dtype=torch.bfloat16)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


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
    with pytest.raises(LrurecError, match="targets: one lies outside the catalogue, which runs from 1 to 203"):
        softmax_loss(vectors, weight, bias, targets, include_padding_class=True)


def test_shapes_that_do_not_fit_are_refused() -> None:
    vectors, weight, bias, targets = draw(4)
    with pytest.raises(LrurecError, match="vectors"):
        softmax_loss(vectors[:3], weight, bias, targets, include_padding_class=True)
    with pytest.raises(LrurecError, match="bias"):
        softmax_loss(vectors, weight, bias[:9], targets, include_padding_class=True)
    with pytest.raises(LrurecError, match="target_weights"):
        softmax_loss(vectors, weight, bias, targets, include_padding_class=True, target_weights=torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_very_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    *tensors, targets = draw(5, dtype=dtype)
    with torch.no_grad():
        tensors[0] *= 1e3
    total, _ = softmax_loss(*tensors, targets, include_padding_class=True, tile_elements=640)
    assert total.item() == pytest.approx(full_matrix(tensors, targets, True).item(), rel=1e-5)


def test_a_nan_in_a_row_is_not_hidden() -> None:
    *tensors, targets = draw(40, dtype=torch.float32)
    with torch.no_grad():
        tensors[1][7, 0] = torch.nan
    total, _ = softmax_loss(*tensors, targets, include_padding_class=True)
    assert total.isnan()


def test_without_gradients_no_gradient_is_computed() -> None:
    vectors, weight, bias, targets = draw(8)
    with torch.no_grad():
        total, _ = softmax_loss(vectors, weight, bias, targets, include_padding_class=True)
    expected = cross_entropy_sum(*(tensor.detach().numpy() for tensor in (vectors, weight, bias, targets)), True)
    assert not total.requires_grad
    assert total.item() == pytest.approx(expected)


@given(num_targets=st.integers(0, 100_000), num_classes=st.integers(1, 5_000_000), tile=st.integers(1, 1 << 23))
def test_tiles_cover_all_targets_in_whole_cache_lines_and_stay_small(num_targets: int, num_classes: int, tile: int) -> None:
    rows, columns = tile_shape(num_targets, num_classes, tile)
    assert rows % LINE == 0
    assert rows > 0
    assert columns > 0
    # a row of tiles is never narrower than one item nor shorter than a cache line, and may be rounded up
    assert rows * columns <= max(2 * tile, WIDE_TARGETS) + max(LINE, MIN_TARGETS) * columns


def test_scores_in_use_at_a_time_stay_within_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = loss.product
    monkeypatch.setattr(loss, "product", lambda *args: sizes.append(args[0].shape[0] * args[1].shape[1]) or plain(*args))
    vectors, weight, bias, targets = draw(500)
    softmax_loss(vectors, weight, bias, targets, include_padding_class=True, tile_elements=6400)
    assert sizes
    assert max(sizes) <= 6400 + LINE * 204
    assert np.prod([500, 204]) > 5 * max(sizes), "the full matrix is far larger, or the test would prove nothing"
