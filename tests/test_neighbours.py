"""Neighbour baselines: counts of the training part alone, and ranks by the rule that the model is ranked by."""

import itertools
from collections import Counter

import numpy as np
import pytest

from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.data.splits import Split
from lrurec_dist.evaluate import neighbours
from lrurec_dist.evaluate.evaluation import training_counts
from lrurec_dist.evaluate.neighbours import (
    KINDS,
    WINDOW,
    Neighbours,
    assembled,
    count_pairs,
    deal_pairs,
    keep_best,
    neighbour_ranks,
)
from tests.datasets import write_dataset
from tests.reference import rank_of

NUM_ITEMS = 12


def random_sequences(users: int = 60) -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(1, NUM_ITEMS + 1, draw.integers(1, 15)).tolist() for _ in range(users)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return write_dataset(str(tmp_path_factory.mktemp("neighbours")), random_sequences(), NUM_ITEMS, shards=4)


def slow_scores(kind: str) -> np.ndarray:
    """(items + 1, items + 1) from the definition: pairs of the training parts, all of them."""
    scores, counts = np.zeros((2, NUM_ITEMS + 1, NUM_ITEMS + 1))
    for sequence in random_sequences():
        training = sequence[:-2] if len(sequence) >= 3 else sequence
        for place, item in enumerate(training):
            counts[item, 0] += 1
            for distance in range(1, 2 if kind == "markov" else WINDOW + 1):
                if place + distance < len(training):
                    other = training[place + distance]
                    if kind == "markov":
                        scores[item, other] += 1
                    elif item != other:
                        scores[item, other] += 1
                        scores[other, item] += 1
    if kind == "neighbours":
        product = counts[:, :1] * counts[:, :1].T
        scores = np.divide(scores, np.sqrt(product), out=np.zeros_like(scores), where=product > 0)
    return scores


def of_scores(scores: np.ndarray) -> Neighbours:
    ids = [sorted(np.flatnonzero(row), key=lambda item, row=row: (-row[item], item)) for row in scores]  # type: ignore[misc]
    flat = np.array([item for row in ids for item in row], dtype=np.int64)
    values = np.array([scores[source, item] for source, row in enumerate(ids) for item in row])
    return Neighbours(np.cumsum([0, *map(len, ids)]), flat, values)


@pytest.mark.parametrize("parts", [1, 3])
def test_neighbours_are_those_of_the_training_part_alone(small: SequenceDataset, parts: int) -> None:
    counts = training_counts([small.read_shard(name) for name in small.shard_names], Split(), NUM_ITEMS)
    dealt = [deal_pairs(name, small, Split(), parts) for name in small.shard_names]
    kept = [keep_best(counts, *[of_shard[part] for of_shard in dealt]) for part in range(parts)]
    for kind in KINDS:
        found, expected = assembled([part[kind] for part in kept], NUM_ITEMS), of_scores(slow_scores(kind))
        assert found.offsets.tolist() == expected.offsets.tolist()
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.scores == pytest.approx(expected.scores, rel=1e-14)  # a root and a quotient


@pytest.mark.parametrize("excludes", [True, False])
def test_ranks_by_sparse_scores_equal_those_of_a_sorted_catalogue(excludes: bool) -> None:
    draw = np.random.default_rng(1)
    scores = draw.integers(0, 4, (NUM_ITEMS + 1, NUM_ITEMS + 1)) * (draw.random((NUM_ITEMS + 1, NUM_ITEMS + 1)) < 0.5)
    scores[:, 0] = scores[3] = 0  # padding follows nothing; nothing follows item 3
    last, targets = draw.integers(1, NUM_ITEMS + 1, (2, 500))
    histories = [set(draw.integers(1, NUM_ITEMS + 1, draw.integers(0, 6)).tolist()) if excludes else set() for _ in range(500)]
    rows = np.repeat(np.arange(500), [len(history) for history in histories])
    ids = np.array([item for history in histories for item in sorted(history)], dtype=np.int64)
    ranks = neighbour_ranks(of_scores(scores.astype(float)), last, targets, rows, ids, NUM_ITEMS)
    expected = [
        rank_of(scores[item].tolist(), target, history)
        for item, target, history in zip(last.tolist(), targets.tolist(), histories, strict=True)
    ]
    assert ranks.tolist() == expected
    assert (max(expected) == NUM_ITEMS + 1) == excludes


def test_of_too_many_neighbours_the_best_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "KEPT", 2)
    pairs = np.array([[1, 2], [1, 3], [1, 4], [2, 1]])
    times = np.array([5, 7, 5, 1])
    part = dict.fromkeys(neighbours.KINDS, (pairs, times))
    best, scores = keep_best(np.ones(5, dtype=np.int64), part, part)["markov"]
    assert best.tolist() == [[1, 3], [1, 2], [2, 1]], "4 ties with 2, whose id is smaller"
    assert scores.tolist() == [14, 10, 2]


def test_no_pair_reaches_over_two_users(small: SequenceDataset) -> None:
    for name in small.shard_names:
        shard = small.read_shard(name)
        pairs, times = count_pairs(shard, Split(), "markov")
        expected: Counter[tuple[int, int]] = Counter()
        for begin, end in zip(shard.offsets[:-1], shard.offsets[1:], strict=True):
            training = shard.item_ids[begin : end - 2 if end - begin >= 3 else end].tolist()
            expected.update(itertools.pairwise(training))
        assert dict(zip(map(tuple, pairs.tolist()), times.tolist(), strict=True)) == dict(expected)
