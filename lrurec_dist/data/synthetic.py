"""A synthetic interaction log with something to learn: popularity, transitions, drift."""

import numpy as np
import pyarrow as pa

from lrurec_dist import storage

START_S = 1_735_689_600  # 2025-01-01, arbitrary
DAYS = 30
FOLLOW_PROBABILITY = 0.7  # an event follows its predecessor's transitions, else it is drawn by popularity
SUCCESSORS = (0.6, 0.25, 0.15)  # probabilities of an item's three successors


def build_synthetic_log(*, users: int, items: int, mean_length: int, seed: int) -> pa.Table:
    """A log (user_id string, item_id string, timestamp int64 seconds) sorted by time.

    Popularity is Zipf-like, and drifts: each day the ranks have moved on by one per cent of the
    catalogue. Every item has three successors of its own, followed with probability 0.7. So the
    best next-item guess is the successor, which popularity cannot know: a model that learns
    transitions beats popularity several times over, one that does not stays at its level.
    """
    draw = np.random.default_rng(seed)
    lengths = 1 + draw.poisson(mean_length - 1, users)
    starts = draw.uniform(0, DAYS * 86_400 * 0.8, users)
    popularity = 1.0 / np.arange(1, items + 1) ** 0.9
    cumulative = np.cumsum(popularity / popularity.sum())
    successors = np.stack([draw.permutation(items) for _ in SUCCESSORS], axis=1)
    choice = np.cumsum(SUCCESSORS)

    longest = int(lengths.max())
    gaps = draw.exponential(DAYS * 86_400 * 0.2 / mean_length, (users, longest))
    times = starts[:, None] + np.cumsum(gaps, axis=1)
    days = (times // 86_400).astype(np.int64)
    shift = max(1, items // 100)

    sequence = np.empty((users, longest), dtype=np.int64)
    for step in range(longest):
        rank = np.searchsorted(cumulative, draw.random(users) * cumulative[-1])
        popular = (rank + days[:, step] * shift) % items
        if step == 0:
            sequence[:, 0] = popular
            continue
        which = np.searchsorted(choice, draw.random(users) * choice[-1])
        follows = draw.random(users) < FOLLOW_PROBABILITY
        sequence[:, step] = np.where(follows, successors[sequence[:, step - 1], which], popular)

    present = np.arange(longest)[None, :] < lengths[:, None]
    user = np.repeat(np.arange(users), lengths)
    item, time = sequence[present], times[present].astype(np.int64) + START_S
    order = np.lexsort((item, user, time))
    return pa.table(
        {
            "user_id": pa.array([f"user-{index:06d}" for index in user[order]]),
            "item_id": pa.array([f"item-{index:05d}" for index in item[order]]),
            "timestamp": pa.array(time[order]),
        }
    )


def write_synthetic_log(url: str, *, users: int, items: int, mean_length: int, seed: int) -> str:
    """Write the log below `url` unless it is there, and return the file's URL.

    The file's name carries the parameters, so that other parameters are another log.
    """
    file = storage.join(url, f"synthetic-u{users}-i{items}-l{mean_length}-s{seed}.parquet")
    if not storage.exists(file):
        storage.write_table(file, build_synthetic_log(users=users, items=items, mean_length=mean_length, seed=seed))
    return file
