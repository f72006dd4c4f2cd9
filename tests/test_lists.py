"""List metrics against their definitions, written out."""

import math

import numpy as np
import pytest
import torch

from lrurec_dist.evaluate.lists import ListSums, top_lists
from lrurec_dist.evaluate.ranking import top_k

COUNTS = np.array([0, 8, 4, 2, 1, 1, 0])  # 16 training interactions of six items


def sums_of(lists: list[list[int]], probabilities: list[float], hits: list[bool], consumed: float = 0.25) -> ListSums:
    sums = ListSums(k=2)
    sums.add(np.array(lists), np.full(len(lists), consumed), np.array(probabilities), np.array(hits), COUNTS)
    return sums


def test_list_metrics_equal_their_definitions() -> None:
    found = sums_of([[1, 2], [1, 6], [3, 0]], [0.9, 0.9, 0.2], [True, False, False]).metrics(6, 16)
    assert found["coverage@2"] == 4 / 6
    assert found["arp@2"] == pytest.approx((6 + 4 + 2) / 3)  # of the short list its one item counts
    assert found["popularity_lift@2"] == pytest.approx(4 / 4 - 1)
    bits = [-math.log2(8 / 16), -math.log2(4 / 16), -math.log2(1 / 16), -math.log2(2 / 16)]
    assert found["novelty@2"] == pytest.approx(((bits[0] + bits[1]) / 2 + (bits[0] + bits[2]) / 2 + bits[3]) / 3)
    assert (found["confidence"], found["hit_rate"]) == pytest.approx((2 / 3, 1 / 3))
    assert found["ece"] == pytest.approx((abs(1 - 1.8) + abs(0 - 0.2)) / 3)


def test_a_model_that_knows_what_it_knows_is_calibrated() -> None:
    draw = np.random.default_rng(0)
    probabilities = draw.random(20_000)
    sums = sums_of([[1, 2]] * 20_000, probabilities.tolist(), (draw.random(20_000) < probabilities).tolist())
    assert sums.metrics(6, 16)["ece"] < 0.02
    overconfident = sums_of([[1, 2]] * 20_000, np.sqrt(probabilities).tolist(), (draw.random(20_000) < probabilities).tolist())
    assert overconfident.metrics(6, 16)["ece"] == pytest.approx(2 / 3 - 1 / 2, abs=0.02)


@pytest.mark.parametrize("parts", [2, 3])
def test_lists_of_parts_give_the_same_metrics_to_the_last_bit(parts: int) -> None:
    draw = np.random.default_rng(1)
    lists, probabilities, hits = draw.integers(1, 7, (500, 2)), draw.random(500), draw.random(500) < 0.5
    whole, merged = ListSums(k=2), ListSums(k=2)
    whole.add(lists, probabilities / 3, probabilities, hits, COUNTS)
    for part in reversed(range(parts)):
        sums, mine = ListSums(k=2), slice(part, None, parts)
        sums.add(lists[mine], probabilities[mine] / 3, probabilities[mine], hits[mine], COUNTS)
        merged.merge(sums)
    assert merged.metrics(6, 16) == whole.metrics(6, 16)
    assert merged.reliability() == whole.reliability()


def test_without_users_list_metrics_are_zero() -> None:
    assert set(ListSums(k=2).metrics(6, 16).values()) == {0.0}
    assert ListSums(k=2).reliability() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [1 << 23, 20])  # all users at once, and three
def test_the_probability_is_that_of_the_softmax_over_the_candidates(
    monkeypatch: pytest.MonkeyPatch, tile: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("lrurec_dist.evaluate.lists.TILE_ELEMENTS", tile)
    torch.manual_seed(0)
    vectors, weight, bias = torch.randn(10, 4), torch.randn(7, 4).to(dtype), torch.randn(7)
    rows, ids = torch.tensor([0, 0, *[9] * 6]), torch.tensor([2, 5, 1, 2, 3, 4, 5, 6])
    items, probabilities = top_lists(vectors, weight, bias, 3, rows, ids)
    assert torch.equal(items, top_k(vectors, weight, bias, 3, rows, ids)[0])
    scores = (vectors.to(dtype).float() @ weight.float().T + bias).double()
    scores[:, 0] = scores[0, 2] = scores[0, 5] = -torch.inf
    expected = torch.softmax(scores, 1).max(1).values
    expected[9] = 0  # all items are excluded
    # scores are float32 on both sides; sums of exponentials are not in the same order
    assert torch.allclose(probabilities, expected, atol=1e-6)
