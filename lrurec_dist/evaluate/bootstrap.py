"""Intervals by a Poisson bootstrap over users: sums of whole numbers, the same on any number of workers and shards."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lrurec_dist.data.shards import mixed
from lrurec_dist.evaluate.metrics import MEAN_RANK

LEVEL = 0.95  # share of the replicates that an interval holds
_FRACTION = 1 << 30  # values from 0 to 1 are summed as whole multiples of its inverse
_USERS = 2048  # weighed together: products of whole numbers below 2^53, exact in float64 in whatever order


class Interval(NamedTuple):
    """A figure and the ends of its interval; nan where there are no users."""

    value: float
    low: float
    high: float

    @property
    def is_zero_outside(self) -> bool:
        """Whether the figure, a difference, is beyond noise."""
        return self.low > 0 or self.high < 0


@functools.cache
def _poisson() -> np.ndarray:
    """(65536,) uint8: the weight that 16 even bits mean, Poisson with mean 1."""
    ends = np.cumsum([math.exp(-1) / math.factorial(weight) for weight in range(12)])
    return np.searchsorted(np.rint(ends * (1 << 16)), np.arange(1 << 16), side="right").astype(np.uint8)


def poisson_weights(users: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """How often each user counts in each replicate: a function of (user, replicate, seed) and nothing else.

    Args:
        users: (users,) uint64, a hash of each user's key.

    Returns:
        (users, replicates) uint8, Poisson with mean 1.
    """
    streams = mixed(np.arange(-(-replicates // 4), dtype=np.uint64) + mixed(np.array([seed], dtype=np.uint64)))
    bits = mixed(users[:, None] ^ streams)  # 64 bits are four weights
    return _poisson()[np.ascontiguousarray(bits, dtype="<u8").view("<u2")[:, :replicates]]


class ReplicateSums:
    """Sums of named values over users, and over the users of each bootstrap replicate.

    `sums` is int64 (1 + replicates, 1 + names): row 0 counts each user once, row r as often as
    replicate r has it; column 0 is the number of users, the others their values in units of 2^-30
    (`mean_rank` in ones). Whole numbers: the order of users and of additions changes nothing.
    """

    def __init__(self, names: Sequence[str], replicates: int) -> None:
        self.names = tuple(names)
        self.sums = np.zeros((1 + replicates, 1 + len(self.names)), dtype=np.int64)

    def add(self, values: Mapping[str, np.ndarray], users: np.ndarray, seed: int) -> None:
        """Count more users.

        Args:
            values: (users,) for each name; from -1 to 1, but for `mean_rank`.
            users: (users,) uint64, a hash of each user's key.
            seed: of the replicates.
        """
        columns = np.stack([np.ones(len(users)), *(np.rint(values[name] * _unit(name)) for name in self.names)], axis=1)
        for begin in range(0, len(users), _USERS):
            part = slice(begin, begin + _USERS)
            weights = poisson_weights(users[part], len(self.sums) - 1, seed).astype(np.float64)
            self.sums[0] += columns[part].sum(0).astype(np.int64)
            self.sums[1:] += (weights.T @ columns[part]).astype(np.int64)

    def merge(self, other: "ReplicateSums") -> None:
        """Count the users of another."""
        assert self.names == other.names
        self.sums += other.sums

    @property
    def users(self) -> int:
        """How many users were counted."""
        return int(self.sums[0, 0])

    def interval(self, name: str, minus: str | None = None) -> Interval:
        """The mean of a value over users with its percentile interval; of its difference to another one where asked.

        A difference is paired: both values of a user are in the same replicates. A replicate
        without users says nothing and is left out.
        """
        sums = self._column(name) - (self._column(minus) if minus else 0)
        users = self.sums[:, 0]
        if users[0] == 0:
            return Interval(math.nan, math.nan, math.nan)
        means = (sums[1:] / np.maximum(users[1:], 1))[users[1:] > 0]
        value = float(sums[0] / users[0])
        if len(means) == 0:
            return Interval(value, math.nan, math.nan)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(value, float(low), float(high))

    def intervals(self, prefix: str) -> dict[str, Interval]:
        """The interval of each value whose name begins so, by the rest of its name."""
        return {name.removeprefix(prefix): self.interval(name) for name in self.names if name.startswith(prefix)}

    def _column(self, name: str) -> np.ndarray:
        return self.sums[:, 1 + self.names.index(name)] / _unit(name)


def _unit(name: str) -> int:
    return 1 if name.endswith(MEAN_RANK) else _FRACTION
