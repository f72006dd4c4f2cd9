"""Titles from files to a bundle, and what is refused on the way."""

import gzip
from pathlib import Path

import pyarrow as pa
import pytest

from lrurec_dist import storage
from lrurec_dist.config_file import load_config
from lrurec_dist.data.catalogue import Catalogue
from lrurec_dist.data.titles import LONGEST, read_titles
from lrurec_dist.errors import ConfigError, DataNotReadyError
from lrurec_dist.stages import run


def catalogue(keys: list[str] | list[int]) -> Catalogue:
    kind = pa.int64() if isinstance(keys[0], int) else pa.large_string()
    return Catalogue(pa.table({"item_id": range(1, len(keys) + 1), "item_key": pa.array(keys, kind)}))


def test_later_rows_and_files_win_and_an_item_without_a_title_has_none(tmp_path: Path) -> None:
    first = {"item_key": ["a", "b", None, "elsewhere", "b"], "title": ["A", "B", "of nothing", "E", "B, later"], "price": [1] * 5}
    storage.write_table(f"{tmp_path}/2026-11-20.parquet", pa.table(first))
    (tmp_path / "2026-11-21.csv.gz").write_bytes(gzip.compress(b'title,item_key\n"A, new",a\n"two\nlines",c\n'))
    (tmp_path / "_SUCCESS").touch()
    titles = read_titles(str(tmp_path), catalogue(["c", "b", "a", "d"]))
    assert titles.to_pylist() == ["two\nlines", "B, later", "A, new", None]
    assert read_titles(f"{tmp_path}/*-20.*", catalogue(["c", "b", "a", "d"])).to_pylist() == [None, "B, later", "A", None]


def test_keys_are_those_of_the_catalogue_whatever_a_text_file_makes_of_them(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("item_key,title\n007,Bond\n12,Dozen\n")
    assert read_titles(f"{tmp_path}/items.csv", catalogue(["7", "007"])).to_pylist() == [None, "Bond"]
    assert read_titles(f"{tmp_path}/items.csv", catalogue([7, 12])).to_pylist() == ["Bond", "Dozen"]
    storage.write_table(f"{tmp_path}/items.parquet", pa.table({"item_key": pa.array([12], pa.int32()), "title": ["ы" * 1000]}))
    assert read_titles(f"{tmp_path}/items.parquet", catalogue([7, 12])).to_pylist() == [None, "ы" * LONGEST]


def test_what_are_no_titles_is_refused_with_the_file_and_the_reason(tmp_path: Path) -> None:
    for name, data, reason in (
        ("keys.csv", b"item_key,title\nseven,Bond\n", "'seven'"),
        ("columns.csv", b"item,title\n7,Bond\n", "item_key"),
        ("text.csv", b"item_key,title\n7,\xff\n", "UTF-?8"),
        ("empty.csv", b"", "Empty"),
        ("none.parquet", b"PAR1", "Parquet"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=rf"bundle\.titles=.*{name}: has to be .* item_key and title; .*{reason}"):
            read_titles(f"{tmp_path}/{name}", catalogue([7]))
    storage.write_table(f"{tmp_path}/texts.parquet", pa.table({"item_key": ["7"], "title": ["Bond"]}))
    with pytest.raises(ConfigError, match="item_key is string, the catalogue's keys are int64"):
        read_titles(f"{tmp_path}/texts.parquet", catalogue([7]))
    storage.write_table(f"{tmp_path}/other.parquet", pa.table({"item_key": [7]}))
    with pytest.raises(ConfigError, match="item_key and title"):
        read_titles(f"{tmp_path}/other.parquet", catalogue([7]))
    with pytest.raises(DataNotReadyError, match=r"bundle\.titles=.*nowhere: no file is there"):
        read_titles(f"{tmp_path}/nowhere", catalogue([7]))
    job = [f"run_dir={tmp_path}/run", f"bundle.titles={tmp_path}/nowhere"]
    with pytest.raises(DataNotReadyError, match="no file is there"):
        run(load_config(None, job), ["prepare", "train", "evaluate", "bundle"])
    assert not (tmp_path / "run" / "dataset").exists(), "nothing was begun"
