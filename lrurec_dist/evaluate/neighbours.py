"""Items that come after, or near, another one: sparse counts of the training part, and exact ranks by them."""

import functools
from typing import Any, NamedTuple

import numpy as np
import ray

from lrurec_dist.data.sequences import SequenceDataset, SequenceShard
from lrurec_dist.data.splits import Split, places, trains

KINDS = ("markov", "neighbours")
KEPT = 100  # neighbours of an item, the best ones
WINDOW = 5  # interactions between two items that count as neighbours, at most
_PAIRS = 1 << 26  # counted by one task at a time


class Neighbours(NamedTuple):
    """The items with a score above 0 after each item, best first; all others score 0.

    Those after item i are `ids[offsets[i]:offsets[i + 1]]` with `scores` beside them, ordered by
    (-score, item_id), `KEPT` at most. int64, int64, float64.
    """

    offsets: np.ndarray
    ids: np.ndarray
    scores: np.ndarray


def collect_neighbours(
    dataset: SequenceDataset, split: Split, counts: np.ndarray, num_cpus: float, resources: dict[str, float]
) -> dict[str, Neighbours]:
    """Both `KINDS` of neighbours, from the training part alone, by Ray tasks.

    `markov`: how often an item follows directly. `neighbours`: how often two items are within
    `WINDOW` interactions of a user, in either order, over the root of the product of their counts
    (cosine). Pairs are dealt by their first item to as many parts as keep each below `_PAIRS`; they
    lie in Ray's object store, which spills to disk, so no process holds more than a part.

    Args:
        dataset: what it is about.
        split: whose training part counts.
        counts: (num_items + 1,) int64, occurrences of each item in it.
        num_cpus: logical CPUs that a task reserves,
        resources: and how much of the cluster's own resources.
    """
    parts = 2 + int(counts.sum()) * 2 * WINDOW // _PAIRS  # of one alone Ray would return the list that has it
    count = ray.remote(num_cpus=num_cpus, resources=resources, num_returns=parts, max_retries=3)(deal_pairs)
    keep = ray.remote(num_cpus=num_cpus, resources=resources, max_retries=3)(keep_best)
    dealt: list[Any] = [count.remote(name, dataset, split, parts) for name in dataset.shard_names]
    shared = ray.put(counts)
    kept = ray.get([keep.remote(shared, *[refs[part] for refs in dealt]) for part in range(parts)])
    return {kind: assembled([part[kind] for part in kept], dataset.num_items) for kind in KINDS}


def count_pairs(shard: SequenceShard, split: Split, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The ordered pairs of items of the training part of a shard, (pairs, 2) int64, ascending, and how often each is there."""
    items, place = shard.item_ids, places(shard)
    training = trains(shard, split.bounds(shard))
    found = []
    for distance in range(1, 2 if kind == "markov" else WINDOW + 1):
        both = training[distance:] & (place[distance:] >= distance)  # within one user: the training part is a prefix
        pairs = np.stack([items[:-distance][both], items[distance:][both]], axis=1)
        found += [pairs] if kind == "markov" else [pairs[pairs[:, 0] != pairs[:, 1]]] * 2
        if kind != "markov":
            found[-1] = found[-1][:, ::-1]
    return _counted(np.concatenate(found))


def _counted(pairs: np.ndarray, times: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    pairs = pairs[order]
    begins = np.flatnonzero(np.append(True, (pairs[1:] != pairs[:-1]).any(1))[: len(pairs)])
    times = np.ones(len(pairs), dtype=np.int64) if times is None else times[order]
    return pairs[begins], np.add.reduceat(times, begins) if len(begins) else times


def deal_pairs(name: str, dataset: SequenceDataset, split: Split, parts: int) -> list[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """For each part the pairs of one shard, by kind and as of `count_pairs`, whose first item belongs to it."""
    shard = dataset.read_shard(name, timestamps=split.needs_timestamps)
    counted = {kind: count_pairs(shard, split, kind) for kind in KINDS}
    return [
        {kind: (pairs[mine], times[mine]) for kind, (pairs, times) in counted.items() for mine in [pairs[:, 0] % parts == part]}
        for part in range(parts)
    ]


def keep_best(counts: np.ndarray, *shards: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By kind the best pairs of a part, of all shards, ordered by (item, -score, neighbour), with their scores."""
    kept = {}
    for kind in KINDS:
        pairs, times = _counted(*(np.concatenate(column) for column in zip(*(shard[kind] for shard in shards), strict=True)))
        scores = times.astype(np.float64)
        if kind == "neighbours":
            scores /= np.sqrt(counts[pairs[:, 0]].astype(np.float64) * counts[pairs[:, 1]])
        order = np.lexsort((pairs[:, 1], -scores, pairs[:, 0]))
        pairs, scores = pairs[order], scores[order]
        first = np.searchsorted(pairs[:, 0], pairs[:, 0])
        best = np.arange(len(pairs)) - first < KEPT
        kept[kind] = pairs[best], scores[best]
    return kept


def assembled(parts: list[tuple[np.ndarray, np.ndarray]], num_items: int) -> Neighbours:
    """The neighbours of all items from the best pairs of each part."""
    pairs, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(pairs[:, 0], kind="stable")
    offsets = np.searchsorted(pairs[order, 0], np.arange(num_items + 2))
    return Neighbours(offsets, pairs[order, 1], scores[order])


def neighbour_ranks(
    neighbours: Neighbours,
    last_items: np.ndarray,
    targets: np.ndarray,
    excluded_rows: np.ndarray,
    excluded_ids: np.ndarray,
    num_items: int,
) -> np.ndarray:
    """Rank of each target by what comes after the user's last item, as `ranking.target_ranks` defines it.

    Args:
        last_items, targets: (users,) int64 in 1..num_items.
        excluded_rows, excluded_ids: (pairs,) int64, ascending by (row, id), each pair once.

    Returns:
        (users,) int64, counted without visiting the items that score 0, which follow in the order of their ids.
    """
    users = len(targets)
    begins, ends = neighbours.offsets[last_items], neighbours.offsets[last_items + 1]
    row = np.repeat(np.arange(users), ends - begins)
    place = np.arange(len(row)) + np.repeat(begins - np.append(0, np.cumsum(ends - begins)[:-1]), ends - begins)
    ids, scores = neighbours.ids[place], neighbours.scores[place]
    is_in = functools.partial(_is_in, excluded_rows * (num_items + 1) + excluded_ids)
    candidate = ~is_in(row * (num_items + 1) + ids)
    row, ids, scores = row[candidate], ids[candidate], scores[candidate]
    is_target = ids == targets[row]
    score = np.zeros(users)
    score[row[is_target]] = scores[is_target]
    ahead = (scores > score[row]) | ((scores == score[row]) & (ids < targets[row]))
    count = functools.partial(np.bincount, minlength=users)
    # Of the target's own score 0 are all items before it but the excluded and the neighbours.
    smaller = targets - 1 - count(excluded_rows[excluded_ids < targets[excluded_rows]]) - count(row[ids < targets[row]])
    ranks = 1 + count(row[ahead]) + np.where(score > 0, 0, smaller)
    return np.where(is_in(np.arange(users) * (num_items + 1) + targets), num_items + 1, ranks)


def _is_in(ascending: np.ndarray, keys: np.ndarray) -> np.ndarray:
    place = np.searchsorted(ascending, keys)
    place = np.minimum(place, len(ascending) - 1)
    return ascending[place] == keys if len(ascending) else np.zeros(len(keys), dtype=bool)
