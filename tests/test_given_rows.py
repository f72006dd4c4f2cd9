"""Rows that somebody brings along for new items: which are taken, and what is refused."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import ConfigError, DataNotReadyError
from lrurec_dist.train.given_rows import read_given_rows
from tests.datasets import chain_sequences, write_dataset

KNOWN = 4


@pytest.fixture
def dataset(tmp_path: Path) -> SequenceDataset:
    return write_dataset(str(tmp_path / "data"), chain_sequences(10, 6), 6)


def write(tmp_path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    return str(tmp_path / "rows.parquet")


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float16(), 2)])
def test_rows_of_new_items_alone_are_taken(tmp_path: Path, dataset: SequenceDataset, kind: pa.DataType) -> None:
    keys = dataset.catalogue.keys_of([6, 2])  # a new item and a known one
    vectors = pa.array([[0.5, 2.0], [1.0, 1.0], [3.0, 4.0]], kind)
    url = write(tmp_path, item_key=pa.array([*keys, "unheard of"]), vector=vectors)
    found = read_given_rows(url, dataset.catalogue, known=KNOWN, dim=2)
    assert {item_id: row.tolist() for item_id, row in found.items()} == {6: [0.5, 2.0]}


def test_a_file_without_a_new_item_gives_none(tmp_path: Path, dataset: SequenceDataset) -> None:
    url = write(tmp_path, item_key=dataset.catalogue.keys_of([1]), vector=[[1.0]])
    assert read_given_rows(url, dataset.catalogue, known=KNOWN, dim=2) == {}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"key": ["a"], "vector": [[1.0, 2.0]]}, "has no column item_key but key, vector"),
        ({"item_key": [1], "vector": [[1.0, 2.0]]}, "item_key is int64, the catalogue's keys are large_string"),
        ({"item_key": None, "vector": [1.0, 2.0]}, "vector is double; it has to be lists of numbers"),
        ({"item_key": None, "vector": [["a", "b"], ["c", "d"]]}, "has to be lists of numbers"),
        ({"item_key": None, "vector": [[1.0], [2.0, 3.0]]}, r"vectors have widths \[1, 2\], model.dim=2; project"),
        ({"item_key": None, "vector": [[1.0, 2.0], None]}, r"widths \[2, None\]"),
        ({"item_key": None, "vector": [[1.0, 2.0], [1.0, None]]}, "a number that is missing, infinite or nan"),
        ({"item_key": None, "vector": [[1.0, 2.0], [1.0, float("inf")]]}, "missing, infinite or nan"),
    ],
)
def test_a_file_that_is_something_else_is_refused(
    tmp_path: Path, dataset: SequenceDataset, columns: dict[str, Any], message: str
) -> None:
    if columns.get("item_key", "") is None:
        columns = {**columns, "item_key": dataset.catalogue.keys_of([5, 6])}
    with pytest.raises(ConfigError, match=message):
        read_given_rows(write(tmp_path, **columns), dataset.catalogue, known=KNOWN, dim=2)


def test_two_vectors_for_an_item_are_refused(tmp_path: Path, dataset: SequenceDataset) -> None:
    url = write(tmp_path, item_key=dataset.catalogue.keys_of([5, 5]), vector=[[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(ConfigError, match="1 new items have more than one vector"):
        read_given_rows(url, dataset.catalogue, known=KNOWN, dim=2)


def test_a_missing_file_and_one_that_is_no_parquet_are_named(tmp_path: Path, dataset: SequenceDataset) -> None:
    with pytest.raises(DataNotReadyError, match=r"train\.new_item_vectors=.*none: does not exist"):
        read_given_rows(str(tmp_path / "none"), dataset.catalogue, known=KNOWN, dim=2)
    (tmp_path / "text").write_text("item_key,vector\n")
    with pytest.raises(ConfigError, match="is no Parquet file"):
        read_given_rows(str(tmp_path / "text"), dataset.catalogue, known=KNOWN, dim=2)
