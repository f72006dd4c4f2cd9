import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec_dist import storage
from lrurec_dist.data.catalogue import Catalogue, build_catalogue, load_catalogue, save_catalogue
from lrurec_dist.errors import CatalogueError

Row = tuple[str | int, int, int, int]  # item_key, count, first_seen, last_seen


def items_of(rows: list[Row], kind: pa.DataType | None = None) -> pa.Table:
    keys, count, first_seen, last_seen = zip(*rows, strict=True) if rows else ((), (), (), ())
    kind = kind or (pa.int64() if rows and isinstance(rows[0][0], int) else pa.large_string())
    figures = {"count": count, "first_seen": first_seen, "last_seen": last_seen}
    return pa.table(
        {"item_key": pa.array(keys, kind), **{name: pa.array(values, pa.int64()) for name, values in figures.items()}}
    )


def catalogue_of(*keys: str | int) -> Catalogue:
    """Items in this order."""
    return build_catalogue(items_of([(key, 1, position, position) for position, key in enumerate(keys)]))


ROWS: list[Row] = [("late", 1, 30, 30), ("b", 5, 10, 40), ("a", 2, 10, 20), ("é", 3, 10, 10), ("first", 1, -5, -5)]


def test_new_items_are_ordered_by_first_seen_then_key():
    catalogue = build_catalogue(items_of(ROWS))
    assert catalogue.keys.to_pylist() == ["first", "a", "b", "é", "late"]
    assert catalogue.table["item_id"].to_pylist() == [1, 2, 3, 4, 5]
    assert catalogue.table["count"].to_pylist() == [1, 2, 5, 3, 1]
    assert catalogue.table["first_seen"].to_pylist() == [-5, 10, 10, 10, 30]
    assert catalogue.table["last_seen"].to_pylist() == [-5, 20, 40, 10, 30]
    assert catalogue.table["status"].unique().to_pylist() == ["active"]
    assert catalogue.num_items == 5


def test_first_ids_by_count_break_ties_by_first_seen_then_key_and_end_with_the_first_night():
    ties = [*ROWS, ("c", 2, 10, 10), ("z", 2, 5, 5)]
    counted = build_catalogue(items_of(ties), first_ids="count")
    assert counted.keys.to_pylist() == ["b", "é", "z", "a", "c", "first", "late"]
    later = build_catalogue(items_of([("often", 9, 98, 99), ("once", 1, 97, 97)]), counted, "count")
    assert later.keys.to_pylist()[7:] == ["once", "often"]


@pytest.mark.parametrize("seed", range(5))
def test_the_ids_do_not_depend_on_the_order_or_the_chunks_of_the_rows(seed):
    shuffled = [ROWS[row] for row in np.random.default_rng(seed).permutation(len(ROWS))]
    chunked = pa.concat_tables([items_of(shuffled[:2]), items_of(shuffled[2:])])
    assert build_catalogue(chunked).table.equals(build_catalogue(items_of(ROWS)).table)


@pytest.mark.parametrize("keys", [["a", "b", "é", ""], [3, -1, 2**24 + 1, 2**63 - 1]], ids=["strings", "integers"])
def test_ids_and_keys_translate_into_each_other(keys):
    catalogue = catalogue_of(*keys)
    ids = catalogue.ids_of(pa.chunked_array([keys[:1], keys[1:]], catalogue.keys.type))
    assert ids.dtype == np.int64
    assert ids.tolist() == [1, 2, 3, 4]
    assert catalogue.keys_of(ids[::-1]) == keys[::-1]
    assert catalogue.keys_of(np.array([2, 2], dtype=np.int32)) == [keys[1], keys[1]]


def test_an_unknown_key_has_the_id_of_padding():
    catalogue = catalogue_of("a", "b")
    assert catalogue.ids_of(pa.array(["b", "unknown", None, "", "A"], pa.large_string())).tolist() == [2, 0, 0, 0, 0]


def test_no_keys_have_no_ids():
    assert catalogue_of("a").ids_of(pa.array([], pa.large_string())).tolist() == []
    assert catalogue_of("a").keys_of(np.array([], dtype=np.int64)) == []


def test_an_extension_keeps_every_id_and_appends_new_items():
    parent = build_catalogue(items_of(ROWS))
    child = build_catalogue(items_of([("new late", 1, 99, 99), ("a", 7, 5, 50), ("new early", 1, -99, -99)]), parent)
    assert child.keys.to_pylist() == [*parent.keys.to_pylist(), "new early", "new late"]
    assert child.table["item_id"].to_pylist() == list(range(1, 8))
    assert child.table.schema == parent.table.schema


def test_an_extension_leaves_rows_alone_and_new_figures_are_given_with_the_deleted_items():
    parent = build_catalogue(items_of(ROWS))
    child = build_catalogue(items_of([("new", 1, 99, 99), ("a", 7, 5, 50)]), parent)
    assert child.table.slice(0, parent.num_items).equals(parent.table)
    figures = np.arange(child.num_items)
    renewed = child.with_figures(figures, figures - 5, figures + 5, np.array([2]))
    assert renewed.fingerprint == child.fingerprint
    assert [tuple(row.values()) for row in renewed.table.to_pylist()] == [
        (at + 1, key, "deleted" if at == 1 else "active", at, at - 5, at + 5) for at, key in enumerate(child.keys.to_pylist())
    ]


@pytest.mark.parametrize("keys", [["a", "é", "new"], [3, 2**40, -7]])
def test_the_first_items_of_an_extension_have_the_fingerprint_of_the_parent(keys):
    parent = build_catalogue(items_of([(key, 1, at, at) for at, key in enumerate(keys[:2])]))
    child = build_catalogue(items_of([(key, 1, -at, at) for at, key in enumerate(keys)]), parent)
    assert child.num_items == 3
    assert child.first(2).fingerprint == parent.fingerprint
    assert len({child.first(size).fingerprint for size in (1, 2, 3)}) == 3


def test_an_extension_without_items_is_the_parent():
    parent = build_catalogue(items_of(ROWS))
    assert build_catalogue(items_of([]), parent).table.equals(parent.table)


@settings(deadline=None)  # a loaded machine is slow now and then
@given(generations=st.lists(st.dictionaries(st.text("abc", min_size=1, max_size=2), st.integers(-3, 3)), min_size=1, max_size=4))
def test_ids_never_change_over_generations(generations):
    catalogue, ids = None, {}
    for first_seen in generations:
        catalogue = build_catalogue(items_of([(key, 1, time, time) for key, time in first_seen.items()]), catalogue)
        present = dict(zip(catalogue.keys.to_pylist(), catalogue.table["item_id"].to_pylist(), strict=True))
        assert present.keys() == ids.keys() | first_seen.keys()
        assert sorted(present.values()) == list(range(1, len(present) + 1))
        assert {key: present[key] for key in ids} == ids
        ids = present


@pytest.mark.parametrize(("old", "new"), [(["a"], [1]), ([1], ["a"])], ids=["strings, then integers", "integers, then strings"])
def test_a_parent_with_keys_of_another_type_is_an_error_with_the_way_out(old, new):
    with pytest.raises(CatalogueError, match=r"parent catalogue has (large_string|int64) keys.*prepare without dataset\.parent"):
        build_catalogue(items_of([(key, 1, 1, 1) for key in new]), catalogue_of(*old))


key_lists = st.one_of(
    st.lists(st.text("ab:", max_size=3), unique=True, max_size=4), st.lists(st.integers(0, 3), unique=True, max_size=4)
)


@settings(deadline=None)  # a loaded machine is slow now and then
@given(one=key_lists, other=key_lists)
def test_fingerprints_are_equal_exactly_when_the_same_keys_have_the_same_ids(one, other):
    def typed(keys: list[str] | list[int]) -> Catalogue:
        return Catalogue(items_of([(key, 1, 1, 1) for key in keys]))

    same = typed(one).keys.equals(typed(other).keys)
    assert (typed(one).fingerprint == typed(other).fingerprint) is same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["ab", "c"], ["a", "bc"]),
        (["a", "b"], ["b", "a"]),
        (["a"], ["a", ""]),
        (["1"], [1]),
        ([1, 256], [256, 1]),
        (["é"], ["e"]),
    ],
)
def test_a_change_of_the_mapping_changes_the_fingerprint(one, other):
    assert catalogue_of(*one).fingerprint != catalogue_of(*other).fingerprint


def test_counts_and_times_do_not_enter_the_fingerprint():
    parent = build_catalogue(items_of(ROWS))
    assert build_catalogue(items_of([("a", 1_000, 0, 99)]), parent).fingerprint == parent.fingerprint


def test_the_fingerprint_of_the_same_keys_is_the_same_in_every_version():
    # Golden: bundles and checkpoints carry it. It may change only together with SCHEMA_VERSION.
    assert catalogue_of("a", "b").fingerprint == "5c6316596f689a1c"
    assert catalogue_of(1, 2).fingerprint == "a8f0c50597678ae8"


@pytest.mark.parametrize("keys", [["b", "a", "é"], [5, 2**40, -3]], ids=["strings", "integers"])
def test_a_saved_catalogue_is_loaded_equal(tmp_path, keys):
    catalogue = catalogue_of(*keys)
    save_catalogue(catalogue, f"{tmp_path}/catalogue")
    loaded = load_catalogue(f"{tmp_path}/catalogue")
    assert loaded.table.equals(catalogue.table)
    assert loaded.fingerprint == catalogue.fingerprint
    assert build_catalogue(items_of([("new", 1, 1, 1)] if keys[0] == "b" else [(7, 1, 1, 1)]), loaded).num_items == 4


@pytest.mark.parametrize("ids", [[1, 3], [2, 1], [0, 1], [1, 1], [2, 3]])
def test_a_catalogue_whose_ids_have_gaps_or_another_order_is_not_loaded(tmp_path, ids):
    table = catalogue_of("a", "b").table
    table = table.set_column(0, "item_id", pa.array(ids, pa.int64()))
    storage.write_table(f"{tmp_path}/part-00000.parquet", table)
    with pytest.raises(CatalogueError, match=r"item ids are not 1\.\.2 in order"):
        load_catalogue(str(tmp_path))
