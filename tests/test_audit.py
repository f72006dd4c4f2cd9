"""The audit of a split against counting by hand, and against leaks put in by hand."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from lrurec_dist import storage
from lrurec_dist.data.audit import SplitAudit, audit_split, stored_audit
from lrurec_dist.data.passes import LocalPasses, RayPasses
from lrurec_dist.data.sequences import SequenceDataset, SequenceShard
from lrurec_dist.data.splits import Split, SplitBounds
from lrurec_dist.errors import DataQualityError
from lrurec_dist.reporting import silent
from tests.datasets import write_dataset
from tests.dirty_log import prepare

GLOBAL = Split(kind="global_time", train_until=10, test_from=20)


def audit(dataset: SequenceDataset, split: Split) -> dict[str, int]:
    return audit_split(dataset, split, LocalPasses(threads=2), silent).counts


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    """Six users whose every interaction has a reason; cuts at 10 and 20."""
    users = [
        ([1, 2, 3, 4, 5], [1, 9, 10, 19, 20]),  # one interaction exactly at each cut
        ([1, 6], [10, 12]),  # nothing before the cut: new in both parts' sense, but without a test target
        ([7, 2, 8], [15, 20, 21]),  # new: without history in validation, with one in test
        ([2, 2, 9], [5, 6, 30]),  # no validation target; item 9 is trained by nobody
        ([3, 1, 2], [4, 4, 4]),  # trains alone; all at one time
        ([5], [25]),  # without history in test
    ]
    sequences, times = map(list, zip(*users, strict=True))
    return write_dataset(str(tmp_path_factory.mktemp("splits")), sequences, 10, shards=2, timestamps=times)


def test_the_audit_of_a_global_time_split_counts_what_the_hand_counts(by_hand):
    assert audit(by_hand, GLOBAL) == {
        "users": 6,
        "interactions": 17,
        "train_users": 3,  # users 0, 3, 4
        "train_interactions": 7,
        "items_never_trained": 6,  # 4, 5, 6, 7, 8, 9; item 10 occurs nowhere
        "validation_interactions": 5,  # 3 and 4 of user 0, both of user 1, 7 of user 2
        "validation_targets": 1,  # user 0
        "validation_new_users": 0,
        "validation_new_items": 0,  # item 3 is in the training part of user 4
        "validation_without_history": 2,  # users 1, 2
        "validation_ties": 0,
        "test_interactions": 5,
        "test_targets": 3,  # users 0, 2, 3
        "test_new_users": 1,  # user 2
        "test_new_items": 2,  # items 5 and 9; 2 is trained
        "test_without_history": 1,  # user 5
        "test_ties": 0,
        "interactions_at_train_until": 2,
        "interactions_at_test_from": 2,
    }


def test_the_audit_of_leave_last_out_counts_ties_at_the_cut(by_hand):
    assert audit(by_hand, Split()) == {
        "users": 6,
        "interactions": 17,
        "train_users": 6,
        "train_interactions": 9,
        "items_never_trained": 3,  # 4, 8, 9
        "validation_interactions": 4,
        "validation_targets": 4,  # users 0, 2, 3, 4
        "validation_new_users": 0,
        "validation_new_items": 1,  # item 4
        "validation_without_history": 0,
        "validation_ties": 1,  # user 4
        "test_interactions": 4,
        "test_targets": 4,
        "test_new_users": 0,
        "test_new_items": 2,  # items 8, 9
        "test_without_history": 0,
        "test_ties": 1,  # user 4
    }


@pytest.mark.parametrize("shards", [1, 2])
def test_a_new_item_counts_for_every_user_who_is_asked_for_it(tmp_path, shards):
    dataset = write_dataset(str(tmp_path), [[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 3, 2]], 3, shards=shards)
    found = audit(dataset, Split())
    assert (found["validation_new_items"], found["test_new_items"], found["items_never_trained"]) == (4, 4, 2)


def test_an_audit_is_the_same_for_any_number_of_shards_and_fits_a_manifest(tmp_path):
    draw = np.random.default_rng(3)
    times = [sorted(draw.integers(0, 30, draw.integers(1, 12)).tolist()) for _ in range(40)]
    items = [draw.integers(1, 26, len(user)).tolist() for user in times]
    for split in (Split(), GLOBAL):
        found = [
            audit(write_dataset(str(tmp_path / f"{split.kind}-{shards}"), items, 25, shards, times), split)
            for shards in (1, 3, 60)  # 60: some without anybody
        ]
        assert found[0] == found[1] == found[2]
        assert found[0]["test_targets"] > 5
        assert json.loads(json.dumps(found[0])) == found[0]


@pytest.mark.parametrize("split", [Split(), GLOBAL], ids=["leave_last_out", "global_time"])
@pytest.mark.parametrize("bound", ["train_end", "test_begin"])
@pytest.mark.parametrize("shift", [-1, 1])
def test_bounds_that_are_wrong_by_one_do_not_pass_the_audit(monkeypatch, by_hand, split, bound, shift):
    audit(by_hand, split)
    right = Split.bounds

    def leaking(self: Split, shard: SequenceShard) -> SplitBounds:
        bounds = right(self, shard)
        return dataclasses.replace(bounds, **{bound: getattr(bounds, bound) + shift})

    monkeypatch.setattr(Split, "bounds", leaking)
    with pytest.raises(DataQualityError, match=rf"part-0000\d.parquet: split.kind={split.kind}: .*this is a bug"):
        audit(by_hand, split)


@pytest.mark.parametrize(("bound", "user", "shift", "what"), [
    ("train_end", 0, 1, "1 interactions of the validation or test part would train"),
    ("train_end", 0, -1, "1 interactions of the training part would not train"),
    ("test_begin", 0, 1, "1 interactions of the test part would be history or target of validation"),
    ("test_begin", 0, -1, "1 interactions from before the test part would be its target"),
    ("train_end", 0, 9, "the parts of 1 users lie outside their sequences"),
])  # fmt: skip
def test_the_audit_names_a_single_leaking_user(monkeypatch, by_hand, bound, user, shift, what):
    right = Split.bounds

    def leaking(self: Split, shard: SequenceShard) -> SplitBounds:
        bounds = right(self, shard)
        shifts = shift * (np.arange(len(bounds.lengths)) == user)
        return dataclasses.replace(bounds, **{bound: getattr(bounds, bound) + shifts})

    monkeypatch.setattr(Split, "bounds", leaking)
    with pytest.raises(DataQualityError, match=what):
        audit(by_hand, GLOBAL)


def test_sequences_that_are_not_in_time_order_do_not_pass_the_audit(tmp_path):
    dataset = write_dataset(str(tmp_path), [[1, 2, 3], [4, 5]], 5, shards=1, timestamps=[[7, 8, 9], [3, 2]])
    with pytest.raises(DataQualityError, match="1 interactions are older than the one before them"):
        audit(dataset, Split())


def plain(audit: SplitAudit) -> tuple[dict[str, int], list[int], list[int]]:
    return audit.counts, audit.training.lengths.tolist(), audit.training.users.tolist()


def stored(dataset: SequenceDataset, split: Split) -> tuple[SplitAudit, bool]:
    return stored_audit(dataset, split, silent, connect=lambda: pytest.fail("so little needs no cluster"))


@pytest.mark.parametrize("split", [Split(), GLOBAL], ids=["leave_last_out", "global_time"])
def test_the_audit_knows_how_long_training_parts_are(by_hand, split):
    shards = [by_hand.read_shard(name, timestamps=True) for name in by_hand.shard_names]
    lengths = np.concatenate([split.bounds(shard).train_end for shard in shards])
    found = audit_split(by_hand, split, LocalPasses(threads=2), silent).training
    assert np.repeat(found.lengths, found.users).tolist() == sorted(lengths)


@pytest.mark.usefixtures("ray_session")
def test_tasks_find_what_threads_find(tmp_path):
    draw = np.random.default_rng(5)
    times = [sorted(draw.integers(0, 30, draw.integers(1, 12)).tolist()) for _ in range(40)]
    items = [draw.integers(1, 26, len(user)).tolist() for user in times]
    dataset = write_dataset(str(tmp_path / "sound"), items, 25, 5, times)
    told: list[tuple[int, int]] = []
    found = audit_split(dataset, GLOBAL, RayPasses(), lambda _, done, total, *__: told.append((done, total)))
    assert plain(found) == plain(audit_split(dataset, GLOBAL, LocalPasses(threads=2), silent))
    assert told == [(done, 5) for done in range(6)]
    backwards = write_dataset(str(tmp_path / "backwards"), [[1, 2], [3, 4]], 5, shards=2, timestamps=[[1, 2], [2, 1]])
    with pytest.raises(DataQualityError, match=r"part-00001.parquet: 1 interactions are older"):
        audit_split(backwards, GLOBAL, RayPasses(), silent)


def test_an_audit_is_kept_and_made_again_for_another_split_or_where_it_is_damaged(copy):
    dataset = SequenceDataset(str(copy))
    splits = [Split(), Split(kind="global_time", train_until=5_000_000, test_from=8_000_000)]
    made = [stored(dataset, split) for split in splits]
    assert [was_there for _, was_there in made] == [False, False]
    assert SequenceDataset(str(copy), verify=True).identity == dataset.identity
    for damaged in (copy / "audits").iterdir():
        damaged.write_bytes(b"{")
    assert [stored(dataset, split)[1] for split in splits] == [False, False]
    shutil.rmtree(copy / "sequences")  # who reads a shard now fails
    for split, (audit, _) in zip(splits, made, strict=True):
        again, was_there = stored(SequenceDataset(str(copy)), split)
        assert was_there
        assert plain(again) == plain(audit)
    with pytest.raises(FileNotFoundError):
        stored(dataset, dataclasses.replace(splits[1], test_from=9_000_000))


def test_an_audit_of_other_bytes_or_of_another_version_is_not_taken(monkeypatch, tmp_path):
    one, other = (
        write_dataset(str(tmp_path / name), [items], 9, shards=1, timestamps=[[1, 2, 3, 4]])
        for name, items in (("one", [1, 2, 3, 4]), ("other", [4, 4, 4, 4]))
    )
    first, _ = stored(one, Split())
    shutil.copytree(tmp_path / "one" / "audits", tmp_path / "other" / "audits")
    found, was_there = stored(other, Split())
    assert not was_there
    assert found.counts["test_new_items"] == 0 != first.counts["test_new_items"]
    assert stored(other, Split())[1]
    monkeypatch.setattr("lrurec_dist.data.audit.__version__", "0.0.1")
    assert not stored(other, Split())[1]


def test_a_night_without_news_takes_the_audit_of_the_dataset_that_has_its_files(copy, log, tmp_path):
    stored(SequenceDataset(str(copy)), Split())
    quiet, _ = prepare(tmp_path / "quiet", log, parent=str(copy))
    assert stored(quiet, Split())[1]
    assert storage.list_files(quiet.url) == [storage.MANIFEST]
    assert not stored(quiet, GLOBAL)[1]
    assert stored(quiet, GLOBAL)[1], "its own, beside its own manifest"
    assert len(storage.list_files(f"{copy}/audits")) == 1


def test_an_audit_is_no_part_of_the_dataset_and_goes_with_it(copy, log):
    stored(SequenceDataset(str(copy)), Split())
    assert prepare(copy, log)[1], "found unchanged"
    (copy / storage.MANIFEST).unlink()
    redone, was_there = prepare(copy, log)
    assert not was_there
    assert not any(name.startswith("audits/") for name in [*redone.manifest["files"], *storage.list_files(str(copy))])
