"""Every user is in one segment of each scheme, and in the right one."""

import numpy as np
import pyarrow as pa

from lrurec_dist.evaluate.segments import SCHEMES, popularity_deciles, segments_of

HOUR = 3_600_000_000


def table(**columns: object) -> pa.Table:
    users = 9
    defaults = {
        "history_length": [1] * users,
        "new_user": [False] * users,
        "gap_us": [0] * users,
        "popularity_decile": [0] * users,
    }
    return pa.table({**defaults, **columns})


def rows_by(targets: pa.Table, scheme: str) -> dict[str, list[int]]:
    return {segment: rows.tolist() for of, segment, rows in segments_of(targets) if of == scheme}


def test_bounds_of_history_lengths_and_gaps_belong_to_the_segment_they_begin() -> None:
    lengths = rows_by(table(history_length=[1, 4, 5, 9, 10, 99, 100, 200, 5000]), "history length")
    assert lengths == {
        "1 to 4": [0, 1],
        "5 to 9": [2, 3],
        "10 to 19": [4],
        "50 to 99": [5],
        "100 to 199": [6],
        "200 and more": [7, 8],
    }
    gaps = [0, HOUR - 1, HOUR, 24 * HOUR - 1, 24 * HOUR, 168 * HOUR, 719 * HOUR, 720 * HOUR, 9999 * HOUR]
    assert list(rows_by(table(gap_us=gaps), "time since the last event").values()) == [[0, 1], [2, 3], [4], [5, 6], [7, 8]]


def test_a_log_of_positions_has_no_gaps() -> None:
    found = segments_of(table(gap_us=pa.nulls(9, pa.int64())))
    assert {scheme for scheme, *_ in found} == set(SCHEMES) - {"time since the last event"}


def test_deciles_are_tenths_of_the_trained_items_most_popular_first() -> None:
    counts = np.array([0, 5, 0, *range(100, 119)])  # item 0 is padding, 2 never trains
    deciles = popularity_deciles(counts)
    assert deciles[[21, 20, 3, 1, 2]].tolist() == [0, 0, 9, 9, 10]
    assert np.bincount(deciles[np.flatnonzero(counts)]).tolist() == [2] * 10
    assert popularity_deciles(np.array([0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7]))[1:].tolist() == list(range(10)), "ties by item_id"
    found = rows_by(table(popularity_decile=deciles[[2, 1, 21, 2, 1, 21, 21, 21, 3]]), "target's popularity")
    assert found == {"decile 1": [2, 5, 6, 7], "decile 10": [1, 4, 8], "never trained": [0, 3]}


def test_a_target_is_new_if_it_never_trains_and_old_in_whatever_decile() -> None:
    targets = table(popularity_decile=[0, 10, 9, 10, 5, 1, 0, 0, 0])
    assert rows_by(targets, "target") == {"trained": [0, 2, 4, 5, 6, 7, 8], "new": [1, 3]}


def test_every_user_is_in_one_segment_of_each_scheme() -> None:
    draw = np.random.default_rng(0)
    users = 500
    targets = pa.table(
        {
            "popularity_decile": popularity_deciles(draw.integers(0, 3, 50))[draw.integers(1, 50, users)],
            "history_length": draw.integers(1, 400, users),
            "new_user": draw.random(users) < 0.3,
            "gap_us": draw.integers(0, 2000 * HOUR, users),
        }
    )
    found = list(segments_of(targets))
    assert {scheme for scheme, *_ in found} == set(SCHEMES)
    for scheme in SCHEMES:
        rows = np.concatenate([rows for of, _, rows in found if of == scheme])
        assert sorted(rows.tolist()) == list(range(users))
    assert all(segment in SCHEMES[scheme] for scheme, segment, _ in found)
