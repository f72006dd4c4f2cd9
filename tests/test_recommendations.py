"""Lists for all users: what the recommender answers, the same whoever computes them, each shard done once."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lrurec_dist import storage
from lrurec_dist.data.passes import LocalPasses, RayPasses
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import CatalogueError, ConfigError, IntegrityError
from lrurec_dist.serve import shard_files
from lrurec_dist.serve.recommendations import ListOptions, recommend_dataset
from lrurec_dist.serve.recommender import Recommender
from tests.datasets import chain_sequences, write_dataset
from tests.processes import killed_at
from tests.test_recommender import HISTORIES, NUM_ITEMS, export

USERS, SHARDS, K = 50, 4, 6
OPTIONS = ListOptions(k=K, exclude_history=True, batch_size=5)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    """Users with histories longer than the bundle's window, one that saw nearly all items, and a shard that is empty."""
    sequences = [*chain_sequences(USERS - 1, NUM_ITEMS), HISTORIES[3]]
    url = str(tmp_path_factory.mktemp("lists") / "dataset")
    written = write_dataset(url, sequences, NUM_ITEMS, SHARDS)
    storage.write_table(
        storage.join(url, f"sequences/part-{SHARDS:05d}.parquet"),
        storage.read_table(storage.join(url, written.shard_names[0])).slice(0, 0),
    )
    storage.commit(url, {name: value for name, value in written.manifest.items() if name != "files"})
    return SequenceDataset(url)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, dataset: SequenceDataset) -> str:
    return export(tmp_path_factory.mktemp("registry"), dataset)


def files_below(url: Path) -> dict[str, bytes]:
    return {path.relative_to(url).as_posix(): path.read_bytes() for path in sorted(url.rglob("*")) if path.is_file()}


def read_lists(url: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((url / "lists").iterdir()) for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("exclude_history", [True, False])
def test_every_user_gets_what_the_recommender_answers(tmp_path: Path, dataset: SequenceDataset, exclude_history: bool) -> None:
    url = export(tmp_path / "registry", dataset, exclude_history=exclude_history)
    options = ListOptions(k=K, exclude_history=exclude_history, batch_size=5)
    manifest, was_there = recommend_dataset(str(tmp_path / "lists"), url, dataset, options, LocalPasses(2))
    assert (manifest["users"], was_there) == (USERS, False)
    recommender = Recommender.load(url)
    found = {row["user_key"]: row for row in read_lists(tmp_path / "lists")}
    assert len(found) == USERS
    short = 0
    for name in dataset.shard_names:
        shard = dataset.read_shard(name)
        for user, key in enumerate(shard.user_keys.to_pylist()):
            history = dataset.catalogue.keys_of(shard.item_ids[shard.offsets[user] : shard.offsets[user + 1]])
            answer = recommender.recommend(history, k=K)
            assert found[key]["item_keys"] == [item.item_key for item in answer]
            # the encoder's products of other shapes may round otherwise
            assert found[key]["scores"] == pytest.approx([item.score for item in answer], rel=1e-5, abs=1e-5)
            assert found[key]["bundle_version"] == recommender.version
            assert not exclude_history or not set(history) & set(found[key]["item_keys"])
            short += len(answer) < K
    assert (short > 0) == exclude_history, "candidates run out for those who saw nearly all items"


@pytest.mark.usefixtures("ray_session")
def test_the_files_are_the_same_whoever_computes_them(
    tmp_path: Path, dataset: SequenceDataset, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_files, "ROW_GROUP", 10)  # several tables a file
    places = {"one": LocalPasses(1), "three": LocalPasses(3)}
    for name, passes in places.items():
        recommend_dataset(str(tmp_path / name), bundle, dataset, OPTIONS, passes)
    assert files_below(tmp_path / "one") == files_below(tmp_path / "three")
    monkeypatch.undo()  # workers of Ray have their own modules
    for name, passes in {"here": LocalPasses(1), "ray": RayPasses()}.items():
        recommend_dataset(str(tmp_path / name), bundle, dataset, OPTIONS, passes)
    assert files_below(tmp_path / "here") == files_below(tmp_path / "ray")
    assert read_lists(tmp_path / "here") == read_lists(tmp_path / "one")


def test_a_killed_run_goes_on_with_the_shards_that_are_missing(tmp_path: Path, dataset: SequenceDataset, bundle: str) -> None:
    url = tmp_path / "lists"
    killed_at(
        "at the third shard",
        f"""
import signal
from lrurec_dist.data.passes import LocalPasses
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.serve import recommendations

lists = recommendations._lists

def wait_in_the_third(bundle, shard, schema, options):
    for number, table in enumerate(lists(bundle, shard, schema, options)):
        if "u0002" in shard.user_keys.to_pylist() and number:
            print("at the third shard", flush=True)
            signal.sigwait([signal.SIGTERM])
        yield table

recommendations._lists = wait_in_the_third
options = recommendations.ListOptions(k={K}, exclude_history=True, batch_size=5)
recommendations.recommend_dataset({str(url)!r}, {bundle!r}, SequenceDataset({dataset.url!r}), options, LocalPasses(1))
""",
    )
    assert not storage.is_committed(str(url))
    left = {path.name: path.stat().st_mtime_ns for path in (url / "lists").glob("part-*")}
    assert sorted(left) == ["part-00000.parquet", "part-00001.parquet"]
    told = []
    _, was_there = recommend_dataset(
        str(url), bundle, dataset, OPTIONS, LocalPasses(1), lambda what, done, total, *_: told.append((what, done, total))
    )
    assert not was_there
    assert told == [("ranked", done, SHARDS + 1) for done in range(2, SHARDS + 2)]
    assert all((url / "lists" / name).stat().st_mtime_ns == before for name, before in left.items())
    recommend_dataset(str(tmp_path / "whole"), bundle, dataset, OPTIONS, LocalPasses(1))
    assert {name: data for name, data in files_below(url).items() if not name.endswith(".tmp")} == files_below(tmp_path / "whole")
    again = recommend_dataset(str(url), bundle, dataset, OPTIONS, LocalPasses(1))
    assert again[1], "nothing is left to do"


def test_a_shard_that_is_not_whole_is_made_again(tmp_path: Path, dataset: SequenceDataset, bundle: str) -> None:
    recommend_dataset(str(tmp_path / "lists"), bundle, dataset, OPTIONS, LocalPasses(1))
    whole = files_below(tmp_path / "lists")
    (tmp_path / "lists" / "lists" / "part-00001.parquet").write_bytes(b"cut")
    with pytest.raises(IntegrityError, match="changed after the commit"):
        recommend_dataset(str(tmp_path / "lists"), bundle, dataset, OPTIONS, LocalPasses(1))
    (tmp_path / "lists" / "manifest.json").unlink()
    recommend_dataset(str(tmp_path / "lists"), bundle, dataset, OPTIONS, LocalPasses(1))
    assert files_below(tmp_path / "lists") == whole


def test_only_the_users_asked_for_get_lists_and_unknown_ones_are_named(
    tmp_path: Path, dataset: SequenceDataset, bundle: str
) -> None:
    asked = pa.array(["u0007", "nobody", "u0011", "u0007", "u9999"], pa.large_string())
    options = ListOptions(k=K, exclude_history=True, batch_size=5, users=asked)
    manifest, _ = recommend_dataset(str(tmp_path / "some"), bundle, dataset, options, LocalPasses(1))
    assert (manifest["users"], manifest["unknown_users"]) == (2, 2)
    assert (tmp_path / "some" / "unknown_users.txt").read_text().splitlines() == ["nobody", "u9999"]
    assert sorted(row["user_key"] for row in read_lists(tmp_path / "some")) == ["u0007", "u0011"]
    assert "unknown_users.txt" in manifest["files"]


def test_what_does_not_fit_together_is_refused(tmp_path: Path, dataset: SequenceDataset, bundle: str) -> None:
    url, passes = str(tmp_path / "lists"), LocalPasses(1)
    with pytest.raises(ConfigError, match=r"recommend.k=21: the catalogue has 20 items; set recommend.k=20 or lower"):
        recommend_dataset(url, bundle, dataset, ListOptions(k=21, exclude_history=True, batch_size=5), passes)
    grown = write_dataset(str(tmp_path / "grown"), [[1, 2, 3]], NUM_ITEMS + 1)
    with pytest.raises(CatalogueError, match=r"\(20 items\), .*/grown has .* \(21\); give the dataset"):
        recommend_dataset(url, bundle, grown, OPTIONS, passes)
    assert not Path(url).exists()
    recommend_dataset(url, bundle, dataset, OPTIONS, passes)
    other = ListOptions(k=K + 1, exclude_history=True, batch_size=5)
    with pytest.raises(ConfigError, match=r"made with other k; choose another recommend.dir"):
        recommend_dataset(url, bundle, dataset, other, passes)
    Path(url, "manifest.json").unlink()  # the same of lists that are not finished
    with pytest.raises(ConfigError, match=r"made with other k; choose another recommend.dir"):
        recommend_dataset(url, bundle, dataset, other, passes)
    assert json.loads(Path(url, "parts", "part-00000.json").read_text())["users"] == 13
