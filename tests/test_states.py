"""States for all users: those of the recommender, the same whoever computes them, each shard done once, later events on top."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lrurec_dist import storage
from lrurec_dist.data.passes import LocalPasses
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import CatalogueError, ConfigError, IntegrityError, StateError, StateVersionError
from lrurec_dist.serve import shard_files
from lrurec_dist.serve.recommender import Recommender
from lrurec_dist.serve.state_files import apply_events, read_states
from lrurec_dist.serve.states import StateOptions, encode_dataset
from lrurec_dist.serve.user_state import UserState
from tests.datasets import chain_sequences, write_dataset
from tests.test_recommendations import files_below
from tests.test_recommender import NUM_ITEMS, export

USERS, SHARDS, RECENT = 30, 3, 4
OPTIONS = StateOptions(recent_items=RECENT, batch_size=4)
SEQUENCES = [*chain_sequences(USERS - 2, NUM_ITEMS), list(range(1, NUM_ITEMS + 1)) * 3, []]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return write_dataset(str(tmp_path_factory.mktemp("states") / "dataset"), SEQUENCES, NUM_ITEMS, SHARDS)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, dataset: SequenceDataset) -> str:
    return export(tmp_path_factory.mktemp("registry"), dataset)


@pytest.fixture(scope="module")
def recommender(bundle: str) -> Recommender:
    return Recommender.load(bundle, recent_items=RECENT)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, dataset: SequenceDataset, bundle: str) -> Path:
    url = tmp_path_factory.mktemp("written") / "states"
    manifest, was_there = encode_dataset(str(url), bundle, dataset, OPTIONS, LocalPasses(1))
    assert (manifest["users"], was_there) == (USERS, False)
    return url


def assert_same(state: UserState, expected: UserState) -> None:
    assert (state.version, state.recent, state.events) == (expected.version, expected.recent, expected.events)
    # float32 sums of other shapes, or of one step after the other
    torch.testing.assert_close(state.recurrent, expected.recurrent, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.vector, expected.vector, rtol=1e-4, atol=1e-5)


def test_every_user_has_the_state_that_the_recommender_makes_of_the_history(
    written: Path, dataset: SequenceDataset, recommender: Recommender
) -> None:
    found = dict(read_states(str(written), recommender.version))
    assert len(found) == USERS
    for user, sequence in enumerate(SEQUENCES):
        assert_same(found[f"u{user:04d}"], recommender.encode([dataset.catalogue.keys_of(sequence)])[0])
    schema = pq.read_schema(written / "states" / "part-00000.parquet")
    assert [schema.field(name).type for name in ("recurrent", "vector")] == [
        pa.list_(pa.float32(), 32),
        pa.list_(pa.float32(), 6),
    ]


def test_the_files_are_the_same_from_one_thread_and_from_three(
    tmp_path: Path, dataset: SequenceDataset, bundle: str, recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_files, "ROW_GROUP", 5)  # several row groups a file
    for name, threads in {"one": 1, "three": 3}.items():
        encode_dataset(str(tmp_path / name), bundle, dataset, OPTIONS, LocalPasses(threads))
    assert files_below(tmp_path / "one") == files_below(tmp_path / "three")
    assert pq.ParquetFile(tmp_path / "one" / "states" / "part-00000.parquet").num_row_groups == 2
    assert len(dict(read_states(str(tmp_path / "one"), recommender.version))) == USERS


def test_an_interrupted_run_goes_on_with_the_shards_that_are_missing(
    tmp_path: Path, written: Path, dataset: SequenceDataset, bundle: str
) -> None:
    url = tmp_path / "states"
    encode_dataset(str(url), bundle, dataset, OPTIONS, LocalPasses(1))
    (url / "manifest.json").unlink()  # as a run leaves it that is killed in its last shards:
    (url / "parts" / "part-00001.json").unlink()  # one without its record, and one that is cut
    (url / "states" / "part-00002.parquet").write_bytes(b"cut")
    kept = (url / "states" / "part-00000.parquet").stat().st_mtime_ns
    told = []
    _, was_there = encode_dataset(
        str(url), bundle, dataset, OPTIONS, LocalPasses(1), lambda what, done, total, *_: told.append((what, done, total))
    )
    assert not was_there
    assert told == [("encoded", done, SHARDS) for done in (1, 2, 3)]
    assert (url / "states" / "part-00000.parquet").stat().st_mtime_ns == kept
    assert files_below(url) == files_below(written)
    assert encode_dataset(str(url), bundle, dataset, OPTIONS, LocalPasses(1))[1], "nothing is left to do"


def test_later_events_on_top_make_the_states_of_whole_histories(
    written: Path, dataset: SequenceDataset, recommender: Recommender
) -> None:
    later = {
        "u0000": ["i001"],
        "u0028": ["i005", "unknown", "i006"] * 20,
        "u0029": ["i009"],
        "new": ["i002", "i003"],
        "newer": [],
    }
    found = dict(apply_events(str(written), recommender, later))
    assert list(found)[-2:] == ["new", "newer"]
    assert len(found) == USERS + 2
    for user, sequence in [*((f"u{user:04d}", sequence) for user, sequence in enumerate(SEQUENCES)), ("new", []), ("newer", [])]:
        whole = [*dataset.catalogue.keys_of(sequence), *later.get(user, ())]
        assert_same(found[user], recommender.encode([whole])[0])


def test_states_of_another_bundle_are_refused_with_both_versions(
    tmp_path: Path, written: Path, dataset: SequenceDataset, recommender: Recommender
) -> None:
    other = Recommender.load(export(tmp_path, dataset, seed=3))
    message = rf"states of version={recommender.version}, asked for by version {other.version}, .*jobs/states.py"
    with pytest.raises(StateVersionError, match=message):
        read_states(str(written), other.version)
    with pytest.raises(StateVersionError, match=message):
        apply_events(str(written), other, {})


def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, dataset: SequenceDataset, bundle: str, recommender: Recommender
) -> None:
    url, passes = str(tmp_path / "states"), LocalPasses(1)
    grown = write_dataset(str(tmp_path / "grown"), [[1, 2, 3]], NUM_ITEMS + 1)
    with pytest.raises(CatalogueError, match=r"\(20 items\), .*/grown has .* \(21\)"):
        encode_dataset(url, bundle, grown, OPTIONS, passes)
    assert not Path(url).exists()
    with pytest.raises(IntegrityError, match="never committed"):
        read_states(url, recommender.version)
    encode_dataset(url, bundle, dataset, OPTIONS, passes)
    with pytest.raises(ConfigError, match=r"states.dir=.*: holds states made with other recent_items; choose another states.dir"):
        encode_dataset(url, bundle, dataset, StateOptions(recent_items=9, batch_size=4), passes)
    (tmp_path / "states" / "states" / "part-00001.parquet").write_bytes(b"cut")
    with pytest.raises(IntegrityError, match="changed after the commit"):
        list(read_states(url, recommender.version))
    manifest = storage.read_json(storage.join(url, storage.MANIFEST))
    storage.write_json(storage.join(url, storage.MANIFEST), {**manifest, "schema_version": 9})
    with pytest.raises(StateError, match="schema_version=9, this code reads 1"):
        read_states(url, recommender.version)
