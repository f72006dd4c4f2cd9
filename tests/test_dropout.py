"""Dropout and GELU of the compiled kernels against their definition."""

import math

import pytest
import torch
from torch import nn

from lrurec_dist.model import native
from lrurec_dist.model.dropout import Dropout


@pytest.fixture(autouse=True)
def _compiler() -> None:
    assert native.load() is not None, "install a C compiler: the kernels would go untested"


@pytest.mark.parametrize("probability", [0.05, 0.2, 0.5, 0.9])
def test_a_share_of_the_elements_is_zero_and_the_others_are_scaled_so_that_the_mean_stays(probability: float) -> None:
    torch.manual_seed(0)
    y = Dropout(probability)(torch.ones(1 << 20))
    assert y.unique().tolist() == [0.0, pytest.approx(1 / (1 - probability))]
    spread = math.sqrt(probability * (1 - probability) / y.numel())
    assert float((y == 0).double().mean()) == pytest.approx(probability, abs=5 * spread)


def test_masks_are_independent_along_rows_columns_and_calls() -> None:
    torch.manual_seed(0)
    layer, x = Dropout(0.5), torch.ones(1 << 14, 64)
    masks = [(layer(x) == 0).double() for _ in range(2)]
    pairs = {
        "calls": (masks[0], masks[1]),
        "neighbours": (masks[0][:, :-1], masks[0][:, 1:]),
        "rows": (masks[0][:-1], masks[0][1:]),
        "stretches of 8,192": (masks[0].flatten()[:-8192], masks[0].flatten()[8192:]),
    }
    for name, pair in pairs.items():
        correlation = float(torch.corrcoef(torch.stack([each.flatten() for each in pair]))[0, 1])
        assert abs(correlation) < 5 / math.sqrt(x.numel()), name
    per_column = masks[0].mean(0)
    assert float((per_column - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(1 << 14)


def test_a_seed_repeats_the_mask_whatever_the_number_of_threads() -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(7)
            results.append(Dropout(0.3)(torch.ones(300_001)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_pass_meets_the_same_mask(gelu: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(40_000) * 2).to(dtype).requires_grad_()
    y = Dropout(0.4, gelu=gelu)(x)
    upstream = torch.randn(40_000).to(dtype)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    kept = y != 0
    wide = x.detach().double().requires_grad_()
    (slope,) = torch.autograd.grad(nn.functional.gelu(wide).sum() if gelu else wide.sum(), wide)
    expected = upstream.double() * slope * kept / 0.6
    tolerance = 1e-5 if dtype == torch.float32 else 0.04
    # where GELU itself rounds to zero, y does not tell whether the element was kept
    tells = kept | (gradient == 0)
    torch.testing.assert_close(gradient.double()[tells], expected[tells], rtol=tolerance, atol=tolerance)
    assert 0.55 < float(kept.double().mean()) < 0.65


def test_gelu_equals_its_definition_within_float32_rounding() -> None:
    x = torch.linspace(-12, 12, 200_001)
    exact = nn.functional.gelu(x.double())
    assert float((native.dropout(x, 0, 0.0, gelu=True) - exact).abs().max()) < 1e-6
    wide = x.double().requires_grad_()
    (slope,) = torch.autograd.grad(nn.functional.gelu(wide).sum(), wide)
    found = native.dropout_backward(x, torch.ones_like(x), 0, 0.0, gelu=True)
    assert float((found - slope).abs().max()) < 1e-6


def test_evaluation_drops_nothing() -> None:
    x = torch.randn(1000)
    assert Dropout(0.5).eval()(x) is x
    torch.testing.assert_close(Dropout(0.5, gelu=True).eval()(x), nn.functional.gelu(x), rtol=1e-5, atol=1e-6)


def test_without_a_compiler_pytorch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: None)
    x = torch.randn(100_000)
    torch.testing.assert_close(Dropout(0.5, gelu=True).eval()(x), nn.functional.gelu(x))
    assert 0.49 < float((Dropout(0.5)(x) == 0).double().mean()) < 0.51
