"""Versions change under load: no request fails, none mixes two versions, and a bad bundle changes nothing."""

import threading
from pathlib import Path

import pytest

from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import BundleError, StateVersionError
from lrurec_dist.serve.live import LiveRecommender
from lrurec_dist.serve.recommender import Recommender
from tests.datasets import write_dataset
from tests.test_recommender import HISTORIES, NUM_ITEMS, export

ASKED = [["i001", "i002"], [], ["i004", "i005", "i006"]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return write_dataset(str(tmp_path_factory.mktemp("live")), HISTORIES, NUM_ITEMS)


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory, dataset: SequenceDataset) -> list[str]:
    registry = tmp_path_factory.mktemp("registry")
    return [export(registry, dataset, seed=seed) for seed in (2, 3)]


def answer(recommender: Recommender) -> tuple[object, ...]:
    """A request in three steps, each of which would show another version."""
    states = recommender.encode(ASKED)
    states = [recommender.step(state, "i007") for state in states]
    return recommender.version, recommender.recommend_many(ASKED, k=5), recommender.recommend_from_states(states, k=5)


def test_no_request_fails_or_mixes_versions_while_they_are_swapped(versions: list[str]) -> None:
    expected = [answer(Recommender.load(url)) for url in versions]
    assert expected[0][1] != expected[1][1]
    live, stop, failures, served = LiveRecommender(versions[0]), threading.Event(), [], []

    def ask() -> None:
        while not stop.is_set():
            try:
                found = answer(live.current)
                served.append(found[0])
                if found not in expected:
                    failures.append(found)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for url in [*versions[::-1] * 5]:
            asked = len(served)
            version = live.swap(url)
            assert live.current.version == version == url.rpartition("/")[2]
            while len(served) < asked + 3 and not failures:
                stop.wait(0.001)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert set(served) == {found[0] for found in expected}, "both were asked"


def test_a_bundle_that_cannot_be_loaded_leaves_the_old_one_serving(
    tmp_path: Path, dataset: SequenceDataset, versions: list[str]
) -> None:
    live = LiveRecommender(versions[0])
    before, found = live.current, answer(live.current)
    damaged = Path(export(tmp_path, dataset, seed=5))
    (damaged / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(BundleError, match="changed after the commit"):
        live.swap(str(damaged))
    assert live.current is before
    assert answer(live.current) == found
    live.swap(versions[1])  # and the next good one is taken
    assert live.current.version != before.version


def test_after_a_swap_old_states_are_refused_and_histories_make_new_ones(versions: list[str]) -> None:
    live = LiveRecommender(versions[0])
    state = live.current.encode([ASKED[0]])[0]
    live.swap(versions[1])
    with pytest.raises(StateVersionError):
        live.current.step(state, "i003")
    assert live.current.step(live.current.encode([ASKED[0]])[0], "i003").events == 3
