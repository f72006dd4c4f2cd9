"""Users side by side: which windows make a batch when each goes on from the state the one before left.

A batch has one row for each lane. A lane goes through one user after the other, window by window,
so a row of a batch continues the same row of the batch before, or begins a user. Users are spread
over lanes so that all end at about the same batch: the longest first, each to the lane with least
to do, which exceeds the shortest possible end by no more than the last user a lane took. Within a
lane they come in any order, so that batches are alike throughout.
"""

import numpy as np

NO_WINDOW = -1  # in a lane that has run out


def fill_lanes(num_windows: np.ndarray, lanes: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Batches of one window from each lane that has not run out.

    Args:
        num_windows: (users,) of each user; windows are numbered user after user, oldest first.
        lanes: rows of a batch.
        draw: what shuffles.

    Returns:
        (windows,) window numbers, (batches, 2) bounds, and (windows,) the lane of each: batch b holds
        windows[bounds[b, 0]:bounds[b, 1]].
    """
    num_windows = num_windows.astype(np.int64)
    lane_of = _spread(num_windows, lanes, draw)
    users = draw.permutation(len(num_windows))
    users = users[np.argsort(lane_of[users], kind="stable")]
    counts, user_lane = num_windows[users], lane_of[users]
    before = np.cumsum(counts) - counts  # windows of all lanes together
    load = np.bincount(user_lane, weights=counts, minlength=lanes).astype(np.int64)
    begin = before - (np.cumsum(load) - load)[user_lane]  # batch of each user's first window
    nth = np.arange(counts.sum()) - np.repeat(before, counts)
    batch = np.repeat(begin, counts) + nth
    windows = np.repeat((np.cumsum(num_windows) - num_windows)[users], counts) + nth
    in_order = np.argsort(batch, kind="stable")
    ends = np.cumsum(np.bincount(batch))
    bounds = np.stack([np.append(0, ends)[: len(ends)], ends], axis=1)
    return windows[in_order], bounds, np.repeat(user_lane, counts)[in_order]


def count_lane_batches(num_windows: np.ndarray, lanes: int) -> int:
    """How many batches `fill_lanes` makes, which does not depend on what shuffles."""
    return int(_deal(num_windows, lanes)[1].max())


def _spread(num_windows: np.ndarray, lanes: int, draw: np.random.Generator) -> np.ndarray:
    """(users,) the lane of each; which of the users of one size goes where is drawn."""
    users = draw.permutation(len(num_windows))
    longest_first = users[np.argsort(-num_windows[users], kind="stable")]
    name = draw.permutation(lanes)  # or the longest users would all lie in the first lanes, and so on the first rank
    lane_of = np.empty(len(num_windows), dtype=np.int64)
    lane_of[longest_first] = name[np.repeat(*_deal(num_windows, lanes)[0])]
    return lane_of


def _deal(num_windows: np.ndarray, lanes: int) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Users in lanes, longest first, each in the lane with least to do.

    Returns:
        ((runs,) lane, (runs,) how many users of one size go to it), runs of users from the longest on;
        and (lanes,) the windows of each lane.
    """
    load = np.zeros(lanes, dtype=np.int64)
    sizes, users = np.unique(num_windows, return_counts=True)
    taken = np.zeros((len(sizes), lanes), dtype=np.int64)
    for run, size, of_size in zip(taken, sizes[::-1].tolist(), users[::-1].tolist(), strict=True):
        run[:] = _shares(load, size, of_size)
        load += size * run
    return (np.tile(np.arange(lanes), len(sizes)), taken.ravel()), load


def _shares(load: np.ndarray, size: int, users: int) -> np.ndarray:
    """(lanes,) how many users of one size each lane takes, when each user goes to the lane with least to do.

    That is to the `users` earliest of the moments load + size * (0, 1, 2, …) of all lanes.
    """

    def until(moment: int) -> np.ndarray:
        return np.maximum(0, (moment - load) // size + 1)

    low, high = int(load.min()) - 1, int(load.max()) + size * users  # too few, enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if until(middle).sum() >= users else (middle, high)
    taken = until(low)
    at_once = np.flatnonzero(until(high) > taken)
    taken[at_once[: users - taken.sum()]] += 1
    return taken
