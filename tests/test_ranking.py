"""Target ranks and top-k lists against sorting every score."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec_dist import PAD_ID
from lrurec_dist.errors import LrurecError
from lrurec_dist.evaluate import ranking
from lrurec_dist.evaluate.ranking import target_ranks, top_k
from tests.reference import rank_of


def draw(users: int, num_items: int, seed: int, levels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Small whole numbers, so that float32 products are exact and ties abound."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((users, 3), (num_items + 1, 3), (num_items + 1,))
    vectors, weight, bias = (torch.randint(-levels, levels + 1, size, generator=generator).float() for size in sizes)
    return vectors, weight, bias


def pairs(excluded: list[set[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    flat = [(row, item) for row, items in enumerate(excluded) for item in sorted(items)]
    rows, ids = torch.tensor(flat, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return rows, ids


@given(
    seed=st.integers(0, 10_000),
    users=st.integers(1, 6),
    num_items=st.integers(1, 25),
    k=st.integers(1, 30),
    levels=st.integers(0, 3),  # 0: all scores tied
    tile=st.integers(1, 200),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_ranks_and_lists_equal_a_sort_of_every_score(
    seed: int, users: int, num_items: int, k: int, levels: int, tile: int, data: st.DataObject
) -> None:
    vectors, weight, bias = draw(users, num_items, seed, levels)
    items = st.integers(1, num_items)
    targets = torch.tensor(data.draw(st.lists(items, min_size=users, max_size=users)))
    excluded = data.draw(st.lists(st.sets(items), min_size=users, max_size=users))
    rows, ids = pairs(excluded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "TILE_ELEMENTS", tile)
        ranks = target_ranks(vectors, weight, bias, targets, rows, ids)
        best, best_scores = top_k(vectors, weight, bias, k, rows, ids)
    scores = (vectors.double() @ weight.double().T + bias.double()).tolist()
    for user in range(users):
        assert ranks[user] == rank_of(scores[user], int(targets[user]), excluded[user])
        candidates = sorted(set(range(1, num_items + 1)) - excluded[user], key=lambda item: (-scores[user][item], item))
        expected = (candidates + [PAD_ID] * k)[:k]
        assert best[user].tolist() == expected
        assert best_scores[user].tolist() == [scores[user][item] if item else -torch.inf for item in expected]


def test_item_ids_above_float_precision_are_ranked_exactly() -> None:
    # ids beyond 2**24 pass through float32 unharmed only if they never do
    num_items = 2**24 + 3
    weight, bias = torch.zeros(num_items + 1, 1), torch.zeros(num_items + 1)
    weight[num_items] = weight[num_items - 1] = 1.0
    none = torch.zeros(0, dtype=torch.int64)
    ranks = target_ranks(torch.ones(2, 1), weight, bias, torch.tensor([num_items, num_items - 1]), none, none)
    best, _ = top_k(torch.ones(1, 1), weight, bias, 3, none, none)
    assert ranks.tolist() == [2, 1]
    assert best.tolist() == [[num_items - 1, num_items, 1]]


def test_padding_is_never_a_candidate() -> None:
    weight, bias = torch.tensor([[9.0], [1.0], [2.0]]), torch.zeros(3)
    none = torch.zeros(0, dtype=torch.int64)
    assert target_ranks(torch.ones(1, 1), weight, bias, torch.tensor([2]), none, none).tolist() == [1]
    assert top_k(torch.ones(1, 1), weight, bias, 5, none, none)[0].tolist() == [[2, 1, 0, 0, 0]]


def test_an_excluded_target_cannot_be_found() -> None:
    weight, bias = torch.tensor([[0.0], [3.0], [2.0], [1.0]]), torch.zeros(4)
    rows, ids = pairs([{1}])
    assert target_ranks(torch.ones(1, 1), weight, bias, torch.tensor([1]), rows, ids).tolist() == [4]


def test_a_nan_score_is_an_error_and_not_a_rank() -> None:
    weight, bias = torch.full((3, 1), torch.nan), torch.zeros(3)
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(LrurecError, match="nan"):
        target_ranks(torch.ones(1, 1), weight, bias, torch.tensor([1]), none, none)
