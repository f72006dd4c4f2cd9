import itertools
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pytest

from lrurec_dist import storage
from lrurec_dist.data.synthetic import DAYS, START_S, build_synthetic_log, write_synthetic_log

SMALL = {"users": 50, "items": 20, "mean_length": 6, "seed": 0}


@pytest.fixture(scope="module")
def log() -> pa.Table:
    """Large enough for shares to be stable: 12,000 events over 100 items."""
    return build_synthetic_log(users=600, items=100, mean_length=20, seed=3)


def sequences_of(log: pa.Table) -> dict[str, list[str]]:
    sequences: dict[str, list[str]] = defaultdict(list)
    for user, item in zip(log["user_id"].to_pylist(), log["item_id"].to_pylist(), strict=True):
        sequences[user].append(item)
    return sequences


def test_the_same_parameters_give_the_same_log():
    assert build_synthetic_log(**SMALL).equals(build_synthetic_log(**SMALL))


@pytest.mark.parametrize("change", [{"seed": 1}, {"users": 51}, {"items": 21}, {"mean_length": 7}], ids=str)
def test_another_parameter_gives_another_log(change):
    assert not build_synthetic_log(**SMALL | change).equals(build_synthetic_log(**SMALL))


def test_the_log_has_string_keys_and_seconds_in_the_order_of_time(log):
    assert log.schema == pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())])
    times = log["timestamp"].to_numpy()
    assert np.all(np.diff(times) >= 0)
    assert times[0] >= START_S
    assert np.median(times) < START_S + DAYS * 86_400  # the last users run past the last day


def test_every_user_has_events_and_their_mean_number_is_the_one_asked_for(log):
    lengths = Counter(log["user_id"].to_pylist())
    assert len(lengths) == 600
    assert abs(np.mean(list(lengths.values())) - 20) < 1  # 5 standard errors of a Poisson mean over 600 users


def test_items_stay_inside_the_catalogue_and_nearly_all_occur(log):
    items = set(log["item_id"].to_pylist())
    assert items <= {f"item-{index:05d}" for index in range(100)}
    assert len(items) > 95


@pytest.mark.parametrize("sizes", [(1, 16, 4), (3, 16, 4), (2000, 16, 4)], ids=str)
def test_extreme_sizes_give_a_log(sizes):
    users, items, mean_length = sizes
    log = build_synthetic_log(users=users, items=items, mean_length=mean_length, seed=0)
    assert len(set(log["user_id"].to_pylist())) == users
    assert sum(column.null_count for column in log.columns) == 0


def test_transitions_predict_the_next_item_and_popularity_does_not(log):
    sequences = list(sequences_of(log).values())
    learnt: dict[str, Counter[str]] = defaultdict(Counter)
    popularity: Counter[str] = Counter()
    for sequence in sequences[:300]:
        popularity.update(sequence)
        for item, following in itertools.pairwise(sequence):
            learnt[item][following] += 1
    steps = [pair for sequence in sequences[300:] for pair in itertools.pairwise(sequence)]
    by_transition = np.mean([bool(learnt[item]) and learnt[item].most_common(1)[0][0] == following for item, following in steps])
    by_popularity = np.mean([popularity.most_common(1)[0][0] == following for _, following in steps])
    assert by_transition > 0.35  # 0.7 * 0.6 = 0.42, less what 300 users do not show
    assert by_transition > 3 * by_popularity


def test_popularity_drifts(log):
    half = log.num_rows // 2
    (early, _), (late, _) = (
        Counter(part["item_id"].to_pylist()).most_common(1)[0]
        for part in (log.slice(0, half // 4), log.slice(log.num_rows - half // 4))
    )
    assert early != late


def test_the_written_log_is_the_built_log(tmp_path):
    file = write_synthetic_log(str(tmp_path), **SMALL)
    assert storage.read_table(file).equals(build_synthetic_log(**SMALL))


def test_a_log_that_is_there_is_not_written_again(tmp_path):
    file = write_synthetic_log(str(tmp_path), **SMALL)
    storage.write_bytes(file, b"touched")
    assert write_synthetic_log(str(tmp_path), **SMALL) == file
    assert storage.read_bytes(file) == b"touched"


def test_other_parameters_are_another_file(tmp_path):
    changes = [{}, {"seed": 1}, {"users": 51}, {"items": 21}, {"mean_length": 7}]
    assert len({write_synthetic_log(str(tmp_path), **SMALL | change) for change in changes}) == len(changes)
    assert len(storage.expand(str(tmp_path))) == len(changes)
