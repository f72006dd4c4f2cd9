"""Replicates are a function of users; intervals hold what they should."""

import math

import numpy as np
import pytest

from lrurec_dist.data.shards import mixed
from lrurec_dist.evaluate.bootstrap import ReplicateSums, poisson_weights
from lrurec_dist.evaluate.metrics import metric_values

NAMES = ["recall@10", "ndcg@10", "mean_rank"]


def users(count: int, first: int = 0) -> np.ndarray:
    return mixed(np.arange(first, first + count, dtype=np.uint64))


def sums_of(ranks: np.ndarray, of: np.ndarray, replicates: int = 200, seed: int = 3) -> ReplicateSums:
    sums = ReplicateSums(NAMES, replicates)
    sums.add(metric_values(ranks, [10], 1000), of, seed)
    return sums


def test_weights_have_the_distribution_of_poisson_with_mean_one() -> None:
    weights = poisson_weights(users(2000), 500, seed=1)
    for weight in range(5):
        # a million draws: four standard deviations of a share near 0.37 are 0.002
        assert (weights == weight).mean() == pytest.approx(math.exp(-1) / math.factorial(weight), abs=0.002)
    assert abs(np.corrcoef(weights.T[:20]) - np.eye(20)).max() < 0.1, "replicates are independent of each other"
    assert abs(np.corrcoef(weights[:20]) - np.eye(20)).max() < 0.2, "and so are users"


def test_weights_depend_on_user_replicate_and_seed_alone() -> None:
    weights = poisson_weights(users(300), 101, seed=1)
    assert np.array_equal(poisson_weights(users(100, first=50), 101, seed=1), weights[50:150])
    assert np.array_equal(poisson_weights(users(300), 7, seed=1), weights[:, :7])
    assert (poisson_weights(users(300), 101, seed=2) != weights).mean() > 0.5


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_sums_are_the_same_to_the_last_bit_however_users_are_spread(parts: int) -> None:
    ranks = np.random.default_rng(0).integers(1, 1000, 5000)
    whole = sums_of(ranks, users(5000))
    spread = ReplicateSums(NAMES, 200)
    for part in reversed(range(parts)):
        spread.merge(sums_of(ranks[part::parts], users(5000)[part::parts]))
    assert np.array_equal(spread.sums, whole.sums)


def test_a_replicate_is_the_weighted_mean_of_its_users() -> None:
    ranks = np.random.default_rng(1).integers(1, 40, 3000)
    sums, weights = sums_of(ranks, users(3000)), poisson_weights(users(3000), 200, seed=3)
    for replicate in (0, 1, 199):
        weight = weights[:, replicate].astype(float)
        assert sums.sums[1 + replicate, 0] == weight.sum()
        gain = (1 / np.log2(ranks + 1.0)) * (ranks <= 10)
        # 2^-31 is what rounding to whole multiples of 2^-30 leaves
        assert sums.sums[1 + replicate, 2] / 2**30 / weight.sum() == pytest.approx((weight @ gain) / weight.sum(), abs=2**-31)
        assert sums.sums[1 + replicate, 3] == weight @ ranks


def test_the_interval_of_a_share_is_that_of_the_binomial() -> None:
    ranks = np.where(np.arange(4000) % 5 == 0, 1, 500)
    value, low, high = sums_of(ranks, users(4000), replicates=2000).interval("recall@10")
    assert value == 0.2
    half = 1.96 * math.sqrt(0.2 * 0.8 / 4000)
    # the ends of 2,000 replicates are known to a few per cent
    assert low == pytest.approx(0.2 - half, abs=0.1 * half)
    assert high == pytest.approx(0.2 + half, abs=0.1 * half)


def test_intervals_hold_the_truth_nineteen_times_of_twenty() -> None:
    draw, held = np.random.default_rng(2), 0
    for trial in range(300):
        ranks = np.where(draw.random(400) < 0.3, 1, 99)
        _, low, high = sums_of(ranks, users(400, first=400 * trial), replicates=200).interval("recall@10")
        held += low <= 0.3 <= high
    assert 0.91 < held / 300 < 0.985  # three standard deviations of 300 trials are 0.038


def test_a_paired_difference_knows_that_the_users_are_the_same() -> None:
    draw = np.random.default_rng(4)
    first = draw.integers(1, 21, 2000)
    second = np.where(draw.random(2000) < 0.03, 99, first)  # worse for three users of a hundred
    both = ReplicateSums(["a/recall@10", "b/recall@10"], 500)
    values = {f"{name}/recall@10": (ranks <= 10).astype(float) for name, ranks in (("a", first), ("b", second))}
    both.add(values, users(2000), seed=0)
    difference = both.interval("a/recall@10", minus="b/recall@10")
    assert difference.value == pytest.approx(both.interval("a/recall@10").value - both.interval("b/recall@10").value)
    assert difference.is_zero_outside
    width = both.interval("a/recall@10").high - both.interval("a/recall@10").low
    assert difference.high - difference.low < 0.5 * width
    assert not both.interval("a/recall@10", minus="a/recall@10").is_zero_outside


def test_without_users_or_replicates_there_is_no_interval() -> None:
    assert all(map(math.isnan, ReplicateSums(NAMES, 10).interval("recall@10")))
    value, low, high = sums_of(np.array([1, 99]), users(2), replicates=0).interval("recall@10")
    assert (value, math.isnan(low), math.isnan(high)) == (0.5, True, True)


def test_one_user_has_an_interval_though_many_replicates_leave_them_out() -> None:
    assert sums_of(np.array([2]), users(1)).interval("mean_rank") == (2.0, 2.0, 2.0)
