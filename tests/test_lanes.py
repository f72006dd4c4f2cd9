"""How users are spread over lanes: against a heap, and by what each batch has to hold."""

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec_dist.data.lanes import _shares, count_lane_batches, fill_lanes

COUNTS = st.lists(st.integers(1, 30), max_size=40)


def filled(counts: list[int], lanes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return fill_lanes(np.array(counts, dtype=np.uint8), lanes, np.random.default_rng(seed))


@settings(deadline=None)  # a loaded machine is slow now and then
@given(counts=COUNTS, lanes=st.integers(1, 9), seed=st.integers(0, 3))
def test_a_users_windows_follow_each_other_in_one_lane_and_every_window_is_in_one_batch(counts, lanes, seed):
    windows, bounds, lane_of = filled(counts, lanes, seed)
    assert sorted(windows.tolist()) == list(range(sum(counts)))
    assert bounds.ravel().tolist() == sorted(bounds.ravel().tolist()), "batches follow each other"
    place = {}
    for batch, (begin, end) in enumerate(bounds.tolist()):
        assert begin < end, "no batch is empty"
        assert len(set(lane_of[begin:end])) == end - begin, "a lane has one window of a batch"
        place |= {window: (batch, lane) for window, lane in zip(windows[begin:end].tolist(), lane_of[begin:end], strict=True)}
    first = 0
    for count in counts:
        batch, lane = place[first]
        assert [place[first + nth] for nth in range(count)] == [(batch + nth, lane) for nth in range(count)]
        first += count
    for lane in range(lanes):
        batches = sorted(batch for batch, of in place.values() if of == lane)
        assert batches == list(range(len(batches))), "a lane has no gap before it runs out"


@settings(deadline=None)  # a loaded machine is slow now and then
@given(counts=COUNTS, lanes=st.integers(1, 9), seed=st.integers(0, 3))
def test_each_user_goes_to_the_lane_with_least_to_do_longest_first(counts, lanes, seed):
    loads = [0] * lanes
    for count in sorted(counts, reverse=True):
        heapq.heapreplace(loads, loads[0] + count)
    _, bounds, lane_of = filled(counts, lanes, seed)
    assert len(bounds) == count_lane_batches(np.array(counts, dtype=np.uint8), lanes) == max(loads)
    assert sorted(np.bincount(lane_of, minlength=lanes).tolist()) == sorted(loads)


@settings(deadline=None)  # a loaded machine is slow now and then
@given(load=st.lists(st.integers(0, 50), min_size=1, max_size=9), size=st.integers(1, 20), users=st.integers(1, 60))
def test_users_of_one_size_are_dealt_out_as_one_after_the_other(load, size, users):
    lanes = [(begin, lane) for lane, begin in enumerate(load)]
    heapq.heapify(lanes)
    expected = [0] * len(load)
    for _ in range(users):
        begin, lane = lanes[0]
        expected[lane] += 1
        heapq.heapreplace(lanes, (begin + size, lane))
    assert _shares(np.array(load), size, users).tolist() == expected


def test_lanes_end_at_about_the_same_batch():
    counts = np.random.default_rng(1).geometric(0.05, 5000)
    _, bounds, lane_of = fill_lanes(counts, 128, np.random.default_rng(0))
    loads = np.bincount(lane_of, minlength=128)
    assert len(bounds) == loads.max() <= loads.min() + 1


def test_batches_are_alike_from_the_first_to_the_last():
    counts = np.random.default_rng(1).geometric(0.05, 5000)
    windows, bounds, _ = fill_lanes(counts, 128, np.random.default_rng(0))
    of_window = np.repeat(counts, counts)
    mean = [of_window[windows[begin:end]].mean() for begin, end in bounds]
    # 80,000 windows or so in each half, of users whose numbers of windows have mean 39 and deviation 28
    assert np.mean(mean[: len(mean) // 2]) == pytest.approx(np.mean(mean[len(mean) // 2 :]), rel=0.1)


def test_the_longest_users_lie_in_any_lane():
    counts = [50, *[1] * 20]
    assert {int(filled(counts, 4, seed)[2][-1]) for seed in range(40)} == {0, 1, 2, 3}


def test_the_order_is_a_function_of_the_draw():
    counts = list(range(1, 30))
    orders = [tuple(filled(counts, 5, seed)[0]) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
