"""Whole-dataset evaluation: every user once, the same figures on any number of workers, every baseline by one rule."""

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lrurec_dist import storage
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.data.splits import Split
from lrurec_dist.errors import DataQualityError
from lrurec_dist.evaluate.bootstrap import ReplicateSums
from lrurec_dist.evaluate.dataset_evaluation import evaluate_dataset
from lrurec_dist.evaluate.evaluation import RankingProtocol
from lrurec_dist.evaluate.ranks import compare_with
from lrurec_dist.evaluate.segments import in_order, popularity_deciles
from lrurec_dist.evaluate.shard_evaluation import Evaluation, Figures, count_shard
from lrurec_dist.evaluate.summary import differences, summarise
from lrurec_dist.model.lrurec import LRURec
from tests.datasets import write_dataset
from tests.reference import rank_of

NUM_ITEMS = 40
DAY = 86_400_000_000
FIGURES = Figures(ks=(1, 10, 50), list_k=5, replicates=50, seed=7)


def small_model(num_items: int = NUM_ITEMS) -> LRURec:
    torch.manual_seed(1)
    torch.set_num_threads(1)
    model = LRURec(num_items=num_items, dim=8, hidden=8, blocks=1, dropout=0.3)
    with torch.no_grad():
        model.table.weight.mul_(30)
    return model.eval()


def protocol(**changes: object) -> RankingProtocol:
    options = {"split": Split(), "part": "test", "max_length": 6, "batch_size": 7, "exclude_history": True, "deepest": 50}
    return RankingProtocol(**{**options, **changes})  # type: ignore[arg-type]


def evaluate(dataset: SequenceDataset, *, workers: int = 2, rules: RankingProtocol | None = None, **options: Any) -> Evaluation:
    load = options.pop("load", small_model)
    return evaluate_dataset(dataset.url, load, rules or protocol(), FIGURES, workers=workers, cpus_per_worker=0.5, **options)


def ranks_below(url: Path) -> list[dict[str, Any]]:
    return [row for file in sorted((url / "ranks").iterdir()) for row in storage.read_table(str(file)).to_pylist()]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    """Random walks with popular items, over forty days; some users are too short to be evaluated."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 14, 90)
    sequences = [(draw.integers(0, NUM_ITEMS, length) * draw.random(length)).astype(int) + 1 for length in lengths]
    times = [np.sort(draw.integers(0, 40 * DAY, length)) for length in lengths]
    url = str(tmp_path_factory.mktemp("evaluation"))
    return write_dataset(
        url, [part.tolist() for part in sequences], NUM_ITEMS, shards=5, timestamps=[part.tolist() for part in times]
    )


@pytest.fixture(scope="module")
def by_one(
    dataset: SequenceDataset, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, Evaluation]:
    """What one worker finds, and where it wrote the ranks."""
    request.getfixturevalue("ray_session")
    url = tmp_path_factory.mktemp("ranks")
    return url, evaluate(dataset, workers=1, ranks_url=str(url))


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_all_figures_are_the_same_to_the_last_bit_on_any_number_of_workers(
    dataset: SequenceDataset, by_one: tuple[Path, Evaluation], tmp_path: Path, workers: int
) -> None:
    url, one = by_one
    other = evaluate(dataset, workers=workers, ranks_url=str(tmp_path))
    assert one.users == dataset.manifest["users_evaluable"]
    assert np.array_equal(other.metrics.sums, one.metrics.sums)
    assert other.segments.keys() == one.segments.keys()
    assert summarise(other, NUM_ITEMS) == summarise(one, NUM_ITEMS)
    assert ranks_below(tmp_path) == ranks_below(url)


def test_each_user_is_ranked_once_by_every_model_and_baselines_are_what_they_say(
    dataset: SequenceDataset, by_one: tuple[Path, Evaluation]
) -> None:
    url, evaluation = by_one
    assert evaluation.models == ("model", "popularity", "recent_popularity", "markov", "neighbours")
    rows = {row["user_key"]: row for row in ranks_below(url)}
    assert len(rows) == len(ranks_below(url)) == evaluation.users
    sequences = {
        key: (shard.item_ids[begin:end], shard.timestamps[begin:end])  # type: ignore[index]
        for shard in (dataset.read_shard(name, timestamps=True) for name in dataset.shard_names)
        for key, begin, end in zip(shard.user_keys.to_pylist(), shard.offsets[:-1], shard.offsets[1:], strict=True)
    }
    first, last = dataset.manifest["time_range"]
    counts, recent = np.zeros((2, NUM_ITEMS + 1))
    follows = np.zeros((NUM_ITEMS + 1, NUM_ITEMS + 1))
    for items, times in sequences.values():
        training = items[:-2] if len(items) >= 3 else items
        np.add.at(counts, training, 1)
        np.add.at(recent, training[times[: len(training)] >= last + 1 - (last + 1 - first) / 10], 1)
        np.add.at(follows, (training[:-1], training[1:]), 1)
    for key, (items, times) in sequences.items():
        if len(items) < 3:
            assert key not in rows
            continue
        *history, target = items.tolist()
        row = rows[key]
        assert (row["target"], row["history_length"], row["new_user"]) == (target, len(history), False)
        assert row["gap_us"] == times[-1] - times[-2]
        assert row["popularity_decile"] == popularity_deciles(counts)[target]
        for baseline, scores in (("popularity", counts), ("recent_popularity", recent), ("markov", follows[history[-1]])):
            assert row[f"rank_{baseline}"] == rank_of(scores.tolist(), target, set(history)), baseline
    assert recent.sum() > 3
    assert (sum(counts), int((counts[[row["target"] for row in rows.values()]] == 0).sum())) == (
        evaluation.interactions,
        evaluation.unseen_targets,
    )


def test_segments_of_a_scheme_add_up_to_everybody(by_one: tuple[Path, Evaluation]) -> None:
    _, evaluation = by_one
    for scheme, segments in itertools.groupby(in_order(evaluation.segments), key=lambda entry: entry[0][0]):
        total = np.sum([sums.sums for _, sums in segments], axis=0)
        assert total[0, 0] == evaluation.users, scheme
        first = evaluation.metrics.names.index("model/recall@10")
        assert np.array_equal(total[:, 1], evaluation.metrics.sums[:, 1 + first]), scheme


def test_two_evaluations_are_compared_on_the_users_of_both_who_were_asked_for_the_same(
    dataset: SequenceDataset, by_one: tuple[Path, Evaluation], tmp_path: Path
) -> None:
    url, now = by_one
    before = write_dataset(str(tmp_path / "data"), [[1, 2, 3], [4, 5, 6]], NUM_ITEMS, timestamps=[[0, 1, 2], [3, 4, DAY]])
    assert before.shard_names != dataset.shard_names
    rows = ranks_below(url)
    # the earlier model ranks everybody one place worse, knows the first user not, and asked the last for another item
    changed = [{**row, "rank_model": row["rank_model"] + 1} for row in rows[1:]]
    changed[-1]["target"] += 1
    table = pa.Table.from_pylist(changed)
    for part in range(2):
        storage.write_table(
            str(tmp_path / "before" / "ranks" / f"part-{part:05d}.parquet"), table.slice(part * 40, 40 + part * 99)
        )
    options = {"ks": (1, 10), "num_items": NUM_ITEMS, "num_items_before": NUM_ITEMS + 5, "replicates": 60, "seed": 1}
    sums, segments, others = compare_with(str(url), str(tmp_path / "before"), **options)  # type: ignore[arg-type]
    assert (sums.users, others) == (now.users - 2, 1)
    found = differences(sums, "now/", "before/")
    assert found["mean_rank"] == {"value": -1, "low": -1, "high": -1, "beyond_noise": True}
    kept = [row["rank_model"] for row in rows[1:-1]]
    assert found["recall@10"]["value"] == pytest.approx(sum(rank == 10 for rank in kept) / len(kept))
    deciles = [row["popularity_decile"] for row in rows[1:-1]]
    head = segments["target's popularity", "decile 1"]
    assert head.users == deciles.count(0) > 0
    assert differences(head, "now/", "before/")["mean_rank"]["value"] == -1
    for _, of_scheme in itertools.groupby(in_order(segments), key=lambda entry: entry[0][0]):
        assert np.array_equal(np.sum([of_segment.sums for _, of_segment in of_scheme], axis=0), sums.sums)
    same, _, nobody = compare_with(str(url), str(url), **{**options, "num_items_before": NUM_ITEMS})  # type: ignore[arg-type]
    assert (same.users, nobody) == (now.users, 0)
    assert not any(figure["beyond_noise"] for figure in differences(same, "now/", "before/").values())


@pytest.mark.usefixtures("ray_session")
def test_a_global_time_split_evaluates_whoever_has_a_history_and_declares_the_others(tmp_path: Path) -> None:
    users = [
        ([1, 2, 3, 4], [1, 2, 12, 25]),  # test: 4 after 1, 2, 3
        ([2, 1], [3, 4]),  # trains alone
        ([5, 2], [15, 22]),  # no training part; test: 2 after 5
        ([6], [21]),  # no history
        ([1, 2], [9, 20]),  # test: 2 after 1
    ]
    sequences, times = map(list, zip(*users, strict=True))
    dataset = write_dataset(str(tmp_path / "data"), sequences, NUM_ITEMS, timestamps=times)
    split = Split(kind="global_time", train_until=10, test_from=20)
    found = evaluate(dataset, rules=protocol(split=split), ranks_url=str(tmp_path))
    assert (found.users, found.unseen_targets, found.new_users, found.without_history) == (3, 1, 1, 1)
    # item 1 trains three times, 2 twice: rank 1 for 4 (without 1, 2, 3) and for 2 after 1, rank 2 for 2 after 5
    assert {row["user_key"]: row["rank_popularity"] for row in ranks_below(tmp_path)} == {"u0000": 1, "u0002": 2, "u0004": 1}
    assert {row["user_key"]: row["new_user"] for row in ranks_below(tmp_path)} == {"u0000": False, "u0002": True, "u0004": False}
    # Of a model that left the last ones out, 4 and 2 of the first and last user are tests; u0004 is too short, so its 2 trained.
    other = evaluate(dataset, rules=protocol(split=split), trained=Split())
    assert (other.users, other.trained_targets, other.new_users) == (1, 2, 0)


@pytest.mark.usefixtures("ray_session")
def test_an_evaluation_of_nobody_is_refused(tmp_path: Path) -> None:
    lonely = write_dataset(str(tmp_path), [[1, 2], [3]], NUM_ITEMS, timestamps=[[1, 2], [30]])
    with pytest.raises(DataQualityError, match="none of 2 users has 3 interactions"):
        evaluate(lonely)
    split = Split(kind="global_time", train_until=10, test_from=20)
    with pytest.raises(DataQualityError, match=r"none of 2 users has an interaction in the test part and one before it"):
        evaluate(lonely, rules=protocol(split=split))
    late = Split(kind="global_time", train_until=1, test_from=2)
    with pytest.raises(DataQualityError, match="targets of all 1 evaluable users trained the model"):
        evaluate(lonely, rules=protocol(split=late), trained=Split(kind="global_time", train_until=28, test_from=29))


@pytest.mark.usefixtures("ray_session")
def test_targets_that_a_smaller_catalogue_lacks_are_misses_and_counted(tmp_path: Path) -> None:
    # the model knows items 1 to 12: 30 is no item of its, neither as a target nor in a history
    dataset = write_dataset(str(tmp_path / "data"), [[1, 2, 3, 30], [1, 30, 2, 5], [7, 8, 9, 4]], NUM_ITEMS)
    found = evaluate(dataset, load=functools.partial(small_model, 12), ranks_url=str(tmp_path))
    assert (found.users, found.unknown_targets) == (3, 1)
    ranks = {row["user_key"]: row["rank_model"] for row in ranks_below(tmp_path)}
    model = small_model(12)
    with torch.inference_mode():
        scores = model.encode(torch.tensor([[1, 2], [7, 8]]))  # what is left of the second history without its target
        scores = (model.encode(torch.tensor([[0, 1, 2], [7, 8, 9]])) @ model.item_rows().T + model.table.bias).tolist()
    assert ranks == {"u0000": NUM_ITEMS + 1, "u0001": rank_of(scores[0], 5, {1, 2}), "u0002": rank_of(scores[1], 4, {7, 8, 9})}
    assert found.metrics.interval("model/recall@50").value == pytest.approx(2 / 3), "no k makes a hit of it"


def test_an_item_outside_the_catalogue_is_refused(tmp_path: Path) -> None:
    dataset = write_dataset(str(tmp_path), [[1, 2, NUM_ITEMS + 1]], NUM_ITEMS, shards=1)
    with pytest.raises(DataQualityError, match="item_id 41 is outside the catalogue, 1 to 40"):
        count_shard(dataset, dataset.shard_names[0], protocol(), Split(), None)


def test_a_difference_of_figures_without_users_says_nothing() -> None:
    nothing = ReplicateSums(["a/recall@10", "b/recall@10"], 5)
    assert differences(nothing, "a/", "b/") == {"recall@10": {"value": None, "low": None, "high": None, "beyond_noise": False}}
