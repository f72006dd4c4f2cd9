"""Sampled softmax: what is drawn, what is corrected, and that it tends to the full softmax."""

import math

import pytest
import torch

from lrurec_dist.errors import LrurecError
from lrurec_dist.model import sampling
from lrurec_dist.model.loss import softmax_loss
from lrurec_dist.model.sampling import NegativeSampler, sampled_softmax_loss

COUNTS = torch.tensor([0, 50, 0, 30, 10, 5, 4, 1])  # of ids 0..7; item 2 never occurs


@pytest.mark.parametrize(
    ("distribution", "weights"),
    [
        ("uniform", [1] * 7),
        ("counts", [50, 1, 30, 10, 5, 4, 1]),
        ("log_uniform", [math.log1p(1 / rank) for rank in (1, 7, 2, 3, 4, 5, 6)]),
    ],
)
def test_items_are_drawn_as_often_as_declared_and_padding_never(distribution: str, weights: list[float]) -> None:
    sampler = NegativeSampler(COUNTS, distribution)
    expected = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    torch.testing.assert_close(sampler.log_probability[1:].double().exp(), expected, rtol=1e-5, atol=1e-8)
    draws = 200_000
    found = torch.bincount(sampler.draw(draws, seed=3), minlength=8)
    assert found[0] == 0
    assert len(found) == 8
    deviation = (found[1:] / draws - expected).abs() / (expected * (1 - expected) / draws).sqrt()
    assert float(deviation.max()) < 5


def test_a_sample_is_a_function_of_the_seed() -> None:
    sampler = NegativeSampler(COUNTS, "counts")
    assert torch.equal(sampler.draw(50, seed=1), sampler.draw(50, seed=1))
    assert not torch.equal(sampler.draw(50, seed=1), sampler.draw(50, seed=2))


def draw(num_targets: int = 12, num_items: int = 7) -> list[torch.Tensor]:
    torch.manual_seed(5)
    tensors = [torch.randn(num_targets, 4), torch.randn(num_items + 1, 4), torch.randn(num_items + 1)]
    return [tensor.double().requires_grad_() for tensor in tensors] + [torch.randint(1, num_items + 1, (num_targets,))]


def by_hand(
    tensors: list[torch.Tensor], targets: torch.Tensor, negatives: torch.Tensor, log_probability: torch.Tensor
) -> torch.Tensor:
    """One target after the other, one negative after the other."""
    vectors, weight, bias = tensors
    total = vectors.new_zeros(())
    for vector, target in zip(vectors, targets.tolist(), strict=True):
        own = vector @ weight[target] + bias[target]
        others = [
            vector @ weight[item] + bias[item] - float(log_probability[item]) - math.log(len(negatives))
            for item in negatives.tolist()
            if item != target
        ]
        total = total + torch.logsumexp(torch.stack([own, *others]), 0) - own
    return total


@pytest.mark.parametrize("tile", [1, 20, 1 << 20])
def test_loss_and_gradients_equal_the_definition(tile: int) -> None:
    *tensors, targets = draw()
    sampler = NegativeSampler(COUNTS, "counts")
    negatives = sampler.draw(9, seed=0)
    assert set(negatives.tolist()) & set(targets.tolist()), "some negative is accidentally a target, or nothing is masked"
    assert len(set(negatives.tolist())) < 9, "some item is drawn twice and counts twice"
    mine, count = sampled_softmax_loss(*tensors, targets, negatives, sampler.log_probability, tile_elements=tile)
    truth = by_hand(tensors, targets, negatives, sampler.log_probability)
    assert count == 12
    torch.testing.assert_close(mine, truth, rtol=1e-6, atol=1e-6)
    for gradient, expected in zip(torch.autograd.grad(mine, tensors), torch.autograd.grad(truth, tensors), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("distribution", ["uniform", "counts", "log_uniform"])
def test_with_many_negatives_the_loss_tends_to_the_full_softmax(distribution: str) -> None:
    # Needs the correction's sign and size: without it each score would be off by the log of its item's chance.
    *tensors, targets = draw()
    sampler = NegativeSampler(COUNTS, distribution)
    full, _ = softmax_loss(*tensors, targets, include_padding_class=False)
    sampled, _ = sampled_softmax_loss(*tensors, targets, sampler.draw(400_000, seed=0), sampler.log_probability)
    assert sampled.item() == pytest.approx(full.item(), rel=0.01)
    mine, truth = (torch.autograd.grad(total, tensors) for total in (sampled, full))
    for gradient, expected in zip(mine, truth, strict=True):
        assert float((gradient - expected).norm()) < 0.02 * float(expected.norm())


def test_target_weights_scale_each_targets_part() -> None:
    *tensors, targets = draw()
    sampler = NegativeSampler(COUNTS, "uniform")
    negatives = sampler.draw(5, seed=0)
    factors = torch.rand(12, dtype=torch.float64)
    whole, _ = sampled_softmax_loss(*tensors, targets, negatives, sampler.log_probability, target_weights=factors)
    parts = [
        sampled_softmax_loss(tensors[0][i : i + 1], *tensors[1:], targets[i : i + 1], negatives, sampler.log_probability)[0]
        for i in range(12)
    ]
    assert whole.item() == pytest.approx(sum(float(f) * part.item() for f, part in zip(factors, parts, strict=True)))


def test_rounded_products_stay_near_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    *tensors, targets = draw()
    tensors = [tensor.detach().float().requires_grad_() for tensor in tensors]
    sampler = NegativeSampler(COUNTS, "counts")
    arguments = (*tensors, targets, sampler.draw(64, seed=0), sampler.log_probability)
    exact, _ = sampled_softmax_loss(*arguments)
    # whether a machine rounds the factors is its choice, so here they are
    monkeypatch.setattr(sampling, "product", lambda left, right, dtype: left.to(dtype).float() @ right.to(dtype).float())
    rounded, _ = sampled_softmax_loss(*arguments, product_dtype=torch.bfloat16)
    assert 0 < abs(rounded.item() - exact.item()) < 0.01 * exact.item()
    for gradient, expected in zip(torch.autograd.grad(rounded, tensors), torch.autograd.grad(exact, tensors), strict=True):
        assert float((gradient - expected).norm()) < 0.02 * float(expected.norm())


def test_no_targets_give_zero_and_no_negatives_are_refused() -> None:
    *tensors, targets = draw(0)
    sampler = NegativeSampler(COUNTS, "uniform")
    total, count = sampled_softmax_loss(*tensors, targets, sampler.draw(3, 0), sampler.log_probability)
    assert (total.item(), count) == (0.0, 0)
    # absent gradients would stop a rank that has no targets
    assert all(gradient.abs().sum() == 0 for gradient in torch.autograd.grad(total, tensors))
    with pytest.raises(LrurecError, match="at least one"):
        sampled_softmax_loss(*tensors, targets, sampler.draw(0, 0), sampler.log_probability)
