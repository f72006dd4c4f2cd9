"""Target ranks of single users on storage, so that another model can be compared on the same users."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from lrurec_dist import storage
from lrurec_dist.data.shards import hash_keys
from lrurec_dist.evaluate.bootstrap import ReplicateSums
from lrurec_dist.evaluate.metrics import metric_values
from lrurec_dist.evaluate.segments import segments_of

MODEL = "model"
RANKS = "ranks"  # directory below an evaluation
# Columns beside user_key and `rank_<name>` of each model: what was asked, and what groups users.
TARGETS = ("target", "history_length", "new_user", "gap_us", "popularity_decile")


class Paired(NamedTuple):
    """Two evaluations on the users of both who were asked for the same item.

    `sums` has the values of `metric_values` as `now/<metric>` and `before/<metric>`, `segments` the
    same by (scheme, segment) as the later evaluation groups its users. `others` are users of both
    with another target, who are not compared.
    """

    sums: ReplicateSums
    segments: dict[tuple[str, str], ReplicateSums]
    others: int


def ranks_file(url: str, shard_name: str) -> str:
    """Where the ranks of the users of a shard lie."""
    return storage.join(url, RANKS, shard_name.rpartition("/")[2])


def rank_column(model: str) -> str:
    """The column with the target ranks of a model."""
    return f"rank_{model}"


def compare_with(
    url: str,
    before_url: str,
    *,
    ks: tuple[int, ...],
    num_items: int,
    num_items_before: int,
    replicates: int,
    seed: int,
) -> Paired:
    """Two evaluations side by side.

    Args:
        url, before_url: evaluations; item ids mean the same where both know them.
        num_items, num_items_before: sizes of their catalogues.

    Shards of the same number hold the same users and are read one by one; otherwise the earlier
    evaluation is held as 24 bytes a user.
    """
    names = list(metric_values(np.empty(0, dtype=np.int64), ks, 1))
    nothing = ReplicateSums([f"{when}/{name}" for when in ("now", "before") for name in names], replicates)
    paired, others = Paired(nothing, {}, 0), 0
    for now, before in _pairs(url, before_url):
        users, place_now, place_before = np.intersect1d(_users(now), before["user"], return_indices=True)
        targets = now["target"].to_numpy()[place_now]
        same = targets == before["target"][place_before]
        others += int((~same).sum())
        users, place_now, place_before = users[same], place_now[same], place_before[same]
        values = {
            **_named("now", metric_values(now[rank_column(MODEL)].to_numpy()[place_now], ks, num_items)),
            **_named("before", metric_values(before["rank"][place_before], ks, num_items_before)),
        }
        paired.sums.add(values, users, seed)
        for scheme, segment, rows in segments_of(now.take(pa.array(place_now))):
            sums = paired.segments.setdefault((scheme, segment), ReplicateSums(nothing.names, replicates))
            sums.add({name: value[rows] for name, value in values.items()}, users[rows], seed)
    return paired._replace(others=others)


def _named(when: str, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{when}/{name}": value for name, value in values.items()}


def _pairs(url: str, before_url: str) -> Iterator[tuple[pa.Table, dict[str, np.ndarray]]]:
    now, before = (storage.list_names(storage.join(place, RANKS)) for place in (url, before_url))
    if now == before:
        for name in now:
            yield _read(url, name, TARGETS), _columns(before_url, name)
    else:
        parts = [_columns(before_url, name) for name in before]
        everybody = {column: np.concatenate([part[column] for part in parts]) for column in ("user", "target", "rank")}
        for name in now:
            yield _read(url, name, TARGETS), everybody


def _read(url: str, name: str, columns: tuple[str, ...]) -> pa.Table:
    return storage.read_table(storage.join(url, RANKS, name), columns=["user_key", *columns, rank_column(MODEL)])


def _columns(url: str, name: str) -> dict[str, np.ndarray]:
    table = _read(url, name, ("target",))
    return {"user": _users(table), "target": table["target"].to_numpy(), "rank": table[rank_column(MODEL)].to_numpy()}


def _users(table: pa.Table) -> np.ndarray:
    return hash_keys(table["user_key"]) if table.num_rows else np.empty(0, dtype=np.uint64)
