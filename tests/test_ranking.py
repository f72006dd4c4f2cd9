"""Target ranks and top-k lists against sorting every score, by kernels and by tiles of products."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrurec_dist import PAD_ID
from lrurec_dist.errors import LrurecError
from lrurec_dist.evaluate import lists, ranking
from lrurec_dist.evaluate.ranking import ItemRows, count_ahead, target_ranks, top_k
from lrurec_dist.model import native
from tests.reference import rank_of

FORMS = ("kernels", "tiles")


def choose(form: str, patch: pytest.MonkeyPatch) -> None:
    """Rank in this form from now on; both are there."""
    assert native.load() is not None
    if form == "tiles":
        patch.setattr(native, "load", lambda: None)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    choose(request.param, monkeypatch)
    return str(request.param)


def draw(users: int, num_items: int, seed: int, levels: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Small whole numbers, so that float32 products are exact and ties abound."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((users, dim), (num_items + 1, dim), (num_items + 1,))
    vectors, weight, bias = (torch.randint(-levels, levels + 1, size, generator=generator).float() for size in sizes)
    return vectors, weight, bias


def pairs(excluded: list[set[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    flat = [(row, item) for row, items in enumerate(excluded) for item in sorted(items)]
    rows, ids = torch.tensor(flat, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return rows, ids


class Sizes(TorchDispatchMode):
    """Remembers the elements of the largest tensor that any operation gave."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result


@given(
    seed=st.integers(0, 10_000),
    users=st.integers(1, 6) | st.sampled_from([33, 130]),  # one more than the kernels take together, and than a task has
    num_items=st.integers(1, 25) | st.just(700),  # more than stay in a cache together where rows are wide
    dim=st.sampled_from([1, 3, 512]),
    k=st.integers(1, 30) | st.just(120),
    levels=st.integers(0, 3),  # 0: all scores tied
    tile=st.integers(1, 200),
    threads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_ranks_and_lists_equal_a_sort_of_every_score(
    seed: int,
    users: int,
    num_items: int,
    dim: int,
    k: int,
    levels: int,
    tile: int,
    threads: int,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    vectors, weight, bias = draw(users, num_items, seed, levels, dim)
    items = st.integers(1, num_items)
    few = min(users, 6)
    targets = torch.tensor((data.draw(st.lists(items, min_size=few, max_size=few)) * users)[:users])
    excluded = (data.draw(st.lists(st.sets(items), min_size=few, max_size=few)) * users)[:users]
    rows, ids = pairs(excluded)
    scores = (vectors.double() @ weight.double().T + bias.double()).numpy()
    expected_ranks = [rank_of(scores[user].tolist(), int(targets[user]), excluded[user]) for user in range(users)]
    scores[rows.numpy(), ids.numpy()] = scores[:, PAD_ID] = -np.inf
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # ties by item_id
    expected_scores = np.take_along_axis(scores, expected, 1)
    expected = np.where(expected_scores == -np.inf, PAD_ID, expected)
    short = ((0, 0), (0, k - expected.shape[1]))
    expected, expected_scores = np.pad(expected, short), np.pad(expected_scores, short, constant_values=-np.inf)
    for form in FORMS:
        with pytest.MonkeyPatch.context() as patch:
            choose(form, patch)
            patch.setattr(ranking, "TILE_ELEMENTS", tile)
            patch.setattr(ranking, "_WIDENED_ROWS", 10)
            patch.setattr(native, "_PER_THREAD", 1)
            patch.setattr(torch, "get_num_threads", lambda: threads)  # those of the kernels, which torch's are not
            ranks = target_ranks(vectors, weight.to(dtype), bias.to(dtype), targets, rows, ids)
            best, best_scores = top_k(vectors, weight.to(dtype), bias.to(dtype), k, rows, ids)
        assert ranks.tolist() == expected_ranks
        assert np.array_equal(best, expected)
        assert np.array_equal(best_scores, expected_scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("form")
def test_no_more_than_a_tile_of_scores_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    users, num_items, tile = 256, 5000, 70_000  # scores of fourteen users; two threads' rows of 128 KB in the kernels
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for module in (ranking, lists):
        monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    vectors, weight, bias = draw(users, num_items, seed=0, levels=3, dim=2)
    rows, ids = pairs([{1, 2}] * users)
    for rank in (
        lambda: target_ranks(vectors, weight.to(dtype), bias, torch.full((users,), 7), rows, ids),
        lambda: top_k(vectors, weight.to(dtype), bias, 10, rows, ids),
        lambda: lists.top_lists(vectors, weight.to(dtype), bias, 10, rows, ids),
    ):
        with Sizes() as sizes:
            rank()
        assert sizes.largest <= tile
    assert users * num_items > 10 * tile, "the whole matrix is far larger, or the test would prove nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_kernels_a_rank_does_not_depend_on_how_users_and_items_are_divided(dtype: torch.dtype) -> None:
    # scores as a model's, none of which a product of another shape would have to round alike
    generator = torch.Generator().manual_seed(1)
    num_items, users = 3001, 70
    vectors, bias = torch.randn(users, 64, generator=generator), torch.randn(num_items + 1, generator=generator)
    weight = torch.randn(num_items + 1, 64, generator=generator).to(dtype)
    weight[2000:2400] = weight[600:1000]  # ties that are real
    bias[2000:2400] = bias[600:1000]
    targets = torch.randint(1, num_items + 1, (users,), generator=generator)
    targets[:40] = torch.arange(2000, 2400, 10)
    excluded = (torch.rand(users, num_items + 1, generator=generator) < 0.01).nonzero()
    rows, ids = excluded[excluded[:, 1] > 0].unbind(1)
    whole = target_ranks(vectors, weight, bias, targets, rows, ids)
    best, scores = top_k(vectors, weight, bias, 100, rows, ids)
    for user in range(users):
        own = rows == user
        alone = (vectors[user : user + 1], weight, bias), (rows[own] - user, ids[own])
        assert target_ranks(*alone[0], targets[user : user + 1], *alone[1]) == whole[user]
        assert torch.equal(top_k(*alone[0], 100, *alone[1])[0][0], best[user])
    for stride in (2, 3, 5):
        parts = [ItemRows(first, stride, num_items) for first in range(stride)]
        tables = [(weight[first::stride], bias[first::stride]) for first in range(stride)]
        of_targets = []

        def own_scores(own: torch.Tensor, of_targets: list[torch.Tensor] = of_targets) -> torch.Tensor:
            of_targets.append(own)
            return own

        for part, table in zip(parts, tables, strict=True):
            count_ahead(vectors, *table, targets, rows, ids, part, own_scores)
        shared = torch.stack(of_targets).sum(0)
        ahead = []
        for part, table in zip(parts, tables, strict=True):
            counted, excluded = count_ahead(vectors, *table, targets, rows, ids, part, lambda _, shared=shared: shared)
            ahead.append(counted)
        assert torch.equal(torch.where(excluded, num_items + 1, 1 + torch.stack(ahead).sum(0)), whole)
        lists = [top_k(vectors, *table, 100, rows, ids, part) for part, table in zip(parts, tables, strict=True)]
        found_ids, found_scores = (torch.cat(values, dim=1).numpy() for values in zip(*lists, strict=True))
        order = np.lexsort((found_ids, -found_scores))[:, :100]
        assert np.array_equal(np.take_along_axis(found_ids, order, 1), best.numpy())
        assert np.array_equal(np.take_along_axis(found_scores, order, 1), scores.numpy())


@pytest.mark.usefixtures("form")
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


@pytest.mark.usefixtures("form")
def test_padding_is_never_a_candidate() -> None:
    weight, bias = torch.tensor([[9.0], [1.0], [2.0]]), torch.zeros(3)
    none = torch.zeros(0, dtype=torch.int64)
    assert target_ranks(torch.ones(1, 1), weight, bias, torch.tensor([2]), none, none).tolist() == [1]
    assert top_k(torch.ones(1, 1), weight, bias, 5, none, none)[0].tolist() == [[2, 1, 0, 0, 0]]


@pytest.mark.usefixtures("form")
def test_an_excluded_target_cannot_be_found() -> None:
    weight, bias = torch.tensor([[0.0], [3.0], [2.0], [1.0]]), torch.zeros(4)
    rows, ids = pairs([{1}])
    assert target_ranks(torch.ones(1, 1), weight, bias, torch.tensor([1]), rows, ids).tolist() == [4]
    bias[2] = -torch.inf  # no score at all
    assert target_ranks(torch.ones(1, 1), weight, bias, torch.tensor([2]), rows, ids).tolist() == [4]
    assert top_k(torch.ones(1, 1), weight, bias, 3, rows, ids)[0].tolist() == [[3, 0, 0]]


@pytest.mark.usefixtures("form")
def test_pairs_named_twice_and_in_any_order_count_once() -> None:
    vectors, weight, bias = draw(40, 30, seed=3, levels=2, dim=2)
    excluded = (torch.rand(40, 31, generator=torch.Generator().manual_seed(1)) < 0.3).nonzero()
    targets = torch.arange(40) % 30 + 1
    found = []
    for order in (torch.arange(len(excluded)), torch.arange(2 * len(excluded)).flip(0) % len(excluded)):
        rows, ids = excluded[order].unbind(1)  # padding among them, which is no candidate anyway
        found.append((target_ranks(vectors, weight, bias, targets, rows, ids), *top_k(vectors, weight, bias, 5, rows, ids)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.usefixtures("form")
def test_scores_that_are_no_numbers_hide_no_others() -> None:
    weight, bias = torch.ones(40, 1), 40 - torch.arange(40.0)
    bias[6::6] = torch.nan  # among them the last of the rows that a kernel takes together
    none = torch.zeros(0, dtype=torch.int64)
    assert target_ranks(torch.ones(1, 1), weight, bias, torch.tensor([14]), none, none).tolist() == [12]
    candidates = [item for item in range(1, 40) if item % 6]
    assert top_k(torch.ones(1, 1), weight, bias, 39, none, none)[0].tolist() == [candidates + [PAD_ID] * 6]
    assert top_k(torch.ones(1, 1), weight, bias, 4, none, none)[0].tolist() == [candidates[:4]]


@pytest.mark.usefixtures("form")
def test_zero_and_minus_zero_are_one_score() -> None:
    weight, bias = torch.tensor([[0.0], [-0.0], [0.0], [-0.0]]), torch.tensor([0.0, -0.0, 0.0, -0.0])
    none = torch.zeros(0, dtype=torch.int64)
    assert target_ranks(torch.ones(3, 1), weight, bias, torch.tensor([1, 2, 3]), none, none).tolist() == [1, 2, 3]
    assert top_k(torch.ones(1, 1), weight, bias, 2, none, none)[0].tolist() == [[1, 2]]


@pytest.mark.parametrize(("targets", "excluded"), [([0], [1]), ([3], [1]), ([1], [3]), ([1], [-1])])
@pytest.mark.usefixtures("form")
def test_an_id_outside_the_catalogue_is_an_error(targets: list[int], excluded: list[int]) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    rows = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(LrurecError, match="the catalogue"):
        target_ranks(torch.ones(1, 1), torch.ones(3, 1), torch.ones(3), torch.tensor(targets), rows, torch.tensor(excluded))
    if targets == [1]:
        with pytest.raises(LrurecError, match="the catalogue"):
            top_k(torch.ones(1, 1), torch.ones(3, 1), torch.ones(3), 2, rows, torch.tensor(excluded))
    assert top_k(torch.ones(0, 1), torch.ones(3, 1), torch.ones(3), 2, none, none)[0].shape == (0, 2)


@pytest.mark.usefixtures("form")
def test_a_nan_score_is_an_error_and_not_a_rank() -> None:
    weight, bias = torch.full((3, 1), torch.nan), torch.zeros(3)
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(LrurecError, match="nan"):
        target_ranks(torch.ones(1, 1), weight, bias, torch.tensor([1]), none, none)
