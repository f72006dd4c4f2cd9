"""Which groups of users figures are given for, beside those for everybody."""

import itertools
from collections.abc import Iterator, Mapping
from typing import TypeVar

import numpy as np
import pyarrow as pa

T = TypeVar("T")

_HISTORY = (1, 5, 10, 20, 50, 100, 200)  # a group's shortest history
_HOUR = 3_600_000_000  # microseconds
_GAPS = {"below 1 hour": _HOUR, "1 hour to 1 day": 24 * _HOUR, "1 to 7 days": 168 * _HOUR, "7 to 30 days": 720 * _HOUR}
_LAST_GAP = "30 days and more"
_NEVER = 10  # the decile of what never trains

SCHEMES = {
    "history length": [
        *(f"{low} to {high - 1}" for low, high in itertools.pairwise(_HISTORY)),
        f"{_HISTORY[-1]} and more",
    ],
    "target's popularity": [*(f"decile {decile}" for decile in range(1, 11)), "never trained"],
    "target": ["trained", "new"],
    "user": ["trained", "new"],
    "time since the last event": [*_GAPS, _LAST_GAP],
}


def popularity_deciles(counts: np.ndarray) -> np.ndarray:
    """(num_items + 1,) int64: 0 for the tenth of the trained items that train most, to 9; 10 for one that never trains.

    Args:
        counts: (num_items + 1,) int64, interactions of each item_id in the training part.

    Of equal counts the smaller item_id is the more popular.
    """
    deciles = np.full(len(counts), _NEVER)
    trained = np.flatnonzero(counts)
    order = trained[np.argsort(-counts[trained], kind="stable")]
    deciles[order] = np.arange(len(order)) * 10 // max(1, len(order))
    return deciles


def segments_of(targets: pa.Table) -> Iterator[tuple[str, str, np.ndarray]]:
    """(scheme, segment, rows) of every segment that has users.

    Args:
        targets: as `ranks.TARGETS`; users whose gap is null are in no segment of "time since the last event".
    """
    places = {
        "history length": np.searchsorted(_HISTORY, targets["history_length"].to_numpy(), side="right") - 1,
        "target's popularity": targets["popularity_decile"].to_numpy(),
        "target": (targets["popularity_decile"].to_numpy() == _NEVER).astype(np.int64),
        "user": targets["new_user"].to_numpy().astype(np.int64),
    }
    if targets["gap_us"].null_count == 0:
        places["time since the last event"] = np.searchsorted(list(_GAPS.values()), targets["gap_us"].to_numpy(), side="right")
    for scheme, place in places.items():
        for index in np.unique(place):
            yield scheme, SCHEMES[scheme][index], np.flatnonzero(place == index)


def in_order(found: Mapping[tuple[str, str], T]) -> list[tuple[tuple[str, str], T]]:
    """What is there of each (scheme, segment), as SCHEMES orders them."""
    keys = [(scheme, segment) for scheme, segments in SCHEMES.items() for segment in segments]
    return [(key, found[key]) for key in keys if key in found]
