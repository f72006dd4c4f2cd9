"""The best items for a few users: those of the ranking of all items, to the bit, whatever rounding to half bytes loses."""

import pytest
import torch
from torch import Tensor

from lrurec_dist.evaluate.ranking import top_k
from lrurec_dist.model.shortlist import MOST_ITEMS, MOST_USERS, Shortlist

pytestmark = pytest.mark.skipif(
    not Shortlist.usable(torch.zeros(2, 1)), reason="no C compiler, or a processor that multiplies no bytes (AVX-512 VNNI)"
)


def compare(vectors: Tensor, weight: Tensor, bias: Tensor, k: int, excluded: list[list[int]] | None = None) -> int:
    """How many items are found, by both."""
    excluded = excluded or [[] for _ in vectors]
    rows = torch.tensor([user for user, ids in enumerate(excluded) for _ in ids], dtype=torch.int64)
    ids = torch.tensor([item for each in excluded for item in each], dtype=torch.int64)
    expected, expected_scores = top_k(vectors, weight, bias, k, rows, ids)
    found = Shortlist(weight, bias).top_k(vectors, k, excluded)
    assert found is not None
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1].view(torch.int32), expected_scores.view(torch.int32)), "to the bit"
    return int((expected > 0).sum())


@pytest.mark.parametrize("dim", [1, 3, 64, 70])
@pytest.mark.parametrize("items", [1, 15, 63, 64, 1000, 20_000])
def test_lists_are_those_of_the_whole_ranking(items: int, dim: int) -> None:
    torch.manual_seed(items + dim)
    weight, bias = torch.randn(items + 1, dim), 0.3 * torch.randn(items + 1)
    bias[torch.rand(items + 1) < 0.05] = -torch.inf
    vectors = torch.randn(3, dim) * torch.tensor([1.0, 1e-4, 100.0])[:, None]
    for k in {1, min(10, items), min(MOST_ITEMS, items)}:
        seen = [torch.randint(1, items + 1, (size,)).tolist() for size in (0, 1, 40)]
        compare(vectors, weight, bias, k, seen)


def test_scores_that_differ_by_less_than_half_bytes_can_tell_keep_their_order() -> None:
    torch.manual_seed(1)
    weight = torch.randn(1, 64) + 1e-6 * torch.randn(5000, 64)
    assert compare(torch.randn(4, 64), weight, torch.zeros(5000), 100) == 400
    assert compare(torch.randn(1, 64), weight[:1].repeat(5000, 1), torch.zeros(5000), 100) == 100, "ties, by item_id"
    rising = torch.linspace(0, 1, 5000)[:, None] * torch.ones(1, 8)
    assert compare(torch.ones(1, 8), rising, torch.zeros(5000), 20) == 20, "each better than all before it"


def test_each_kind_of_rounding_alone_is_allowed_for() -> None:
    torch.manual_seed(4)
    better, rising = torch.arange(3000) % 100 == 7, torch.linspace(0, 1, 3000)
    signs, close = torch.randn(6, 64).sign(), torch.randn(1, 64) + 1e-3 * torch.randn(3000, 64)
    compare(signs, close, torch.zeros(3000), 50)  # of the rows: a vector of signs is itself in bytes
    rows = 127 * torch.where(better, 1.0, -1.0)[:, None].repeat(1, 64)
    rows[:, 0] = torch.where(better, 117 + rising, 127.0)
    compare(torch.tensor([[1.0] + [0.49 / 127] * 63]), rows, torch.zeros(3000), 10)  # of the vector: nothing is left of it but 1
    last_place = 0.0625  # of float32, beside a million: sums go up by a place for each 0.51 of it, and stay for 0.49
    more = torch.arange(64) < (torch.arange(3000) // 100 - 19)[:, None]
    rows = last_place * torch.where(better[:, None], torch.where(more, 1.51, 0.51), torch.tensor(0.49))
    compare(torch.ones(1, 64), rows, torch.full((3000,), 1e6), 10)


def test_rows_and_vectors_of_nothing_or_of_one_large_element_are_ranked_alike() -> None:
    torch.manual_seed(2)
    weight, bias = torch.randn(300, 16), torch.randn(300)
    weight[::3] = 0
    weight[1::3, 5] = 1e6
    weight[2::9] *= 1e-35
    weight[4] = -0.0
    for vector in (torch.zeros(16), torch.eye(16)[5], 1e-30 * torch.randn(16), 1e10 * torch.randn(16)):
        compare(vector[None], weight, bias, 50)
        compare(vector[None], weight, torch.zeros(300), 200)


def test_what_it_is_not_made_for_is_left_to_the_ranking() -> None:
    shortlist = Shortlist(torch.randn(500, 8), torch.zeros(500))
    assert shortlist.top_k(torch.randn(MOST_USERS + 1, 8), 5, [[]] * (MOST_USERS + 1)) is None
    assert shortlist.top_k(torch.randn(1, 8), MOST_ITEMS + 1, [[]]) is None
    for wrong in (torch.nan, torch.inf, 1e20):
        assert shortlist.top_k(torch.tensor([[1.0] * 7 + [wrong]]), 5, [[]]) is None
    for unusable in (torch.full((3, 4), 1e16), torch.full((3, 4), torch.nan), torch.zeros(3, 4, dtype=torch.float64)):
        assert not Shortlist.usable(unusable)


def test_few_items_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that no half byte can bring among the best are never read: here they would be found at once."""
    torch.manual_seed(3)
    weight, vector = torch.randn(20_001, 64), torch.randn(1, 64)
    weight = weight[
        (weight @ vector[0]).argsort(descending=True)
    ]  # the best come first, so that it is known what can be left out
    shortlist = Shortlist(weight, torch.zeros(20_001))
    ids, scores = top_k(vector, weight, torch.zeros(20_001), 10, *torch.empty(2, 0, dtype=torch.int64))
    weight = weight.clone()
    weight[2000:] = 1e3 * vector
    monkeypatch.setattr(shortlist, "_weight", weight)
    found = shortlist.top_k(vector, 10, [[]])
    assert found is not None
    assert torch.equal(found[0], ids)
    assert torch.equal(found[1], scores)
