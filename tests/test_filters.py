"""Filters against plain Python, and over nights against a rebuild."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec_dist.data.filters import Filters, filter_dataset
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import ConfigError, DataQualityError
from tests.dirty_log import kept_files, prepare, sequences_of, write_parquet

Sequences = dict[int, list[int]]


def by_hand(sequences: Sequences, filters: Filters) -> Sequences:
    """The definition, one step after the other."""
    left = dict(sequences)
    if filters.drop_repeats:
        left = {user: [item for item, _ in itertools.groupby(items)] for user, items in left.items()}
    while True:
        counts = Counter(item for items in left.values() for item in items)
        fewer = {user: [item for item in items if counts[item] >= filters.min_item_count] for user, items in left.items()}
        fewer = {user: items for user, items in fewer.items() if len(items) >= max(1, filters.min_user_events)}
        if filters.k_core == "once" or fewer == left:
            return fewer
        left = fewer


def dataset_of(folder: Path, sequences: Sequences) -> SequenceDataset:
    rows = [(user, item, place) for user, items in sequences.items() for place, item in enumerate(items)]
    return prepare(folder / "base", write_parquet(folder / "log", rows))[0]


@settings(deadline=None, max_examples=60)
@given(
    sequences=st.dictionaries(st.integers(1, 9), st.lists(st.integers(1, 6), min_size=1, max_size=9), min_size=1, max_size=9),
    drop_repeats=st.booleans(),
    min_item_count=st.integers(0, 5),
    min_user_events=st.integers(0, 5),
    k_core=st.sampled_from(["once", "until_stable"]),
)
def test_what_stays_is_what_the_definition_says(
    tmp_path_factory, sequences, drop_repeats, min_item_count, min_user_events, k_core
):
    folder = tmp_path_factory.mktemp("filters")
    base = dataset_of(folder, sequences)
    filters = Filters(drop_repeats=drop_repeats, min_item_count=min_item_count, min_user_events=min_user_events, k_core=k_core)
    expected = by_hand(sequences, filters)
    if not expected:
        with pytest.raises(DataQualityError, match="none of"):
            filter_dataset(str(folder / "filtered"), base, filters, None)
        return
    filtered, _ = filter_dataset(str(folder / "filtered"), base, filters, None)
    assert sequences_of(filtered) == expected
    for name, (lengths, users) in filtered.lengths.items():
        assert sorted(filtered.read_shard(name).lengths) == [
            *itertools.chain(*([n] * k for n, k in zip(lengths, users, strict=True)))
        ]
    facts = filtered.manifest
    assert facts["interactions"] == sum(map(len, expected.values()))
    assert facts["interactions"] + sum(facts["events_dropped"].values()) == base.manifest["interactions"]
    counts = Counter(item for items in expected.values() for item in items)
    assert dict(zip(filtered.catalogue.keys.to_pylist(), filtered.catalogue.table["count"].to_pylist(), strict=True)) == {
        **dict.fromkeys(filtered.catalogue.keys.to_pylist(), 0),
        **counts,
    }


def test_an_item_that_becomes_frequent_brings_its_earlier_interactions_and_keeps_its_id_for_ever(tmp_path):
    nights = [
        {1: [(10, 0), (11, 1)], 2: [(10, 0), (12, 1)], 3: [(10, 5)]},
        {3: [(11, 6), (12, 7)], 4: [(13, 6), (13, 8)]},
        {5: [(13, 9), (12, 9)]},
    ]
    filters = Filters(min_item_count=2)
    logs, parent, catalogue = [], "", None
    known: list[int] = []
    for night, events in enumerate(nights):
        rows = [(user, item, time) for user, pairs in events.items() for item, time in pairs]
        logs.append(write_parquet(tmp_path / f"log-{night}", rows))
        base, _ = prepare(tmp_path / f"base-{night}", ",".join(logs), parent=parent)
        filtered, _ = filter_dataset(str(tmp_path / f"night-{night}"), base, filters, catalogue)
        parent, catalogue = base.url, filtered.catalogue
        assert catalogue.keys.to_pylist()[: len(known)] == known
        known = catalogue.keys.to_pylist()
    assert known == [10, 11, 12, 13]
    assert sequences_of(filtered)[1] == [10, 11], "11 was rare when it came"
    rebuilt, _ = prepare(tmp_path / "base", ",".join(logs))
    again, _ = filter_dataset(str(tmp_path / "again"), rebuilt, filters, catalogue)
    assert kept_files(again) == kept_files(filtered)


def test_a_second_call_finds_it_and_other_filters_are_refused(tmp_path):
    base = dataset_of(tmp_path, {1: [1, 2, 2], 2: [2, 1]})
    url = str(tmp_path / "filtered")
    filter_dataset(url, base, Filters(drop_repeats=True), None)
    assert filter_dataset(url, base, Filters(drop_repeats=True), None)[1]
    with pytest.raises(ConfigError, match="filtered in another way"):
        filter_dataset(url, base, Filters(min_item_count=2), None)


def test_a_filtered_dataset_is_no_ground_to_merge_into(tmp_path):
    base = dataset_of(tmp_path, {1: [1, 2, 2], 2: [2, 1]})
    filtered, _ = filter_dataset(str(tmp_path / "filtered"), base, Filters(drop_repeats=True), None)
    with pytest.raises(ConfigError, match=r"was filtered, so what it lacks is not known"):
        prepare(tmp_path / "night", tmp_path / "log", parent=filtered.url)
