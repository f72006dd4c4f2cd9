"""Bundles and the recommender that reads them: verified, checked, and independent of training."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from lrurec_dist import storage
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import BundleError, LrurecError, StateError, StateVersionError
from lrurec_dist.evaluate.ranking import top_k
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.model.stepping import Stepper
from lrurec_dist.serve.bundle import SCHEMA_VERSION, GoldenAnswers, load_bundle, save_bundle
from lrurec_dist.serve.recommender import Recommendation, Recommender
from lrurec_dist.serve.user_state import UserState
from tests.datasets import write_dataset

NUM_ITEMS, MAX_LENGTH = 20, 5
SHAPE = {"num_items": NUM_ITEMS, "dim": 6, "hidden": 8, "blocks": 2, "dropout": 0.3, "ring": [0.8, 0.99]}
HISTORIES = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], list(range(1, 19))]


def build_model(seed: int = 2) -> LRURec:
    torch.manual_seed(seed)
    model = LRURec(**SHAPE)
    with torch.no_grad():
        model.table.weight.mul_(30)
    return model.eval().requires_grad_(False)


def answers(model: LRURec, exclude_history: bool, k: int = 4, deleted: Sequence[int] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Each history by itself, through the model alone."""
    found = []
    for history in HISTORIES:
        vector = model.encode(torch.tensor([history[-MAX_LENGTH:]]))
        excluded = torch.tensor([*(history if exclude_history else []), *deleted], dtype=torch.int64)
        found.append(top_k(vector, model.table.weight, model.table.bias, k, torch.zeros_like(excluded), excluded))
    return torch.cat([ids for ids, _ in found]), torch.cat([scores for _, scores in found])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return write_dataset(str(tmp_path_factory.mktemp("bundle")), HISTORIES, NUM_ITEMS)


def with_status(dataset: SequenceDataset, deleted: Sequence[int]) -> pa.Table:
    table = dataset.catalogue.table
    status = pa.array(["deleted" if item_id in deleted else "active" for item_id in table["item_id"].to_pylist()])
    return table.set_column(table.column_names.index("status"), "status", status)


def export(
    registry: Path,
    dataset: SequenceDataset,
    *,
    exclude_history: bool = True,
    golden: tuple[torch.Tensor, torch.Tensor] | None = None,
    seed: int = 2,
    deleted: Sequence[int] = (),
) -> str:
    model = build_model(seed)
    metrics = {"model": {"recall@10": 0.5}, "popularity": {"recall@10": 0.1}, "users": 4, "largest_decay_modulus": 0.99}
    return save_bundle(
        str(registry),
        date="2026-01-02",
        model=model,
        model_arguments=SHAPE,
        max_length=MAX_LENGTH,
        exclude_history=exclude_history,
        catalogue=with_status(dataset, deleted),
        catalogue_fingerprint=dataset.catalogue.fingerprint,
        golden=GoldenAnswers(
            [dataset.catalogue.keys_of(history) for history in HISTORIES],
            *(golden or answers(model, exclude_history, deleted=deleted)),
        ),
        metrics=metrics,
        lineage={"interactions": 29, "users": 4, "sources": {"log.parquet": "1 bytes"}, "step": 7},
    )


@pytest.mark.parametrize("exclude_history", [True, False])
def test_a_bundle_answers_as_the_trained_model(tmp_path: Path, dataset: SequenceDataset, exclude_history: bool) -> None:
    recommender = Recommender.load(export(tmp_path, dataset, exclude_history=exclude_history))
    ids, scores = answers(build_model(), exclude_history)
    for history, row_ids, row_scores in zip(HISTORIES, ids, scores, strict=True):
        found = recommender.recommend(dataset.catalogue.keys_of(history), k=4)
        kept = row_ids > 0
        assert [item.item_key for item in found] == dataset.catalogue.keys_of(row_ids[kept].numpy())
        torch.testing.assert_close(torch.tensor([item.score for item in found]), row_scores[kept], rtol=1e-4, atol=1e-5)
    if exclude_history:
        assert [item.item_key for item in recommender.recommend(dataset.catalogue.keys_of(HISTORIES[3]), k=9)] in (
            ["i019", "i020"],
            ["i020", "i019"],
        )


def test_unknown_items_are_skipped_and_counted(tmp_path: Path, dataset: SequenceDataset) -> None:
    recommender = Recommender.load(export(tmp_path, dataset))
    assert recommender.recommend(["i001", "never seen", "i002"]) == recommender.recommend(["i001", "i002"])
    assert recommender.unknown_items == 1


def test_a_deleted_item_stays_known_and_is_never_recommended(tmp_path: Path, dataset: SequenceDataset) -> None:
    whole = Recommender.load(export(tmp_path / "whole", dataset))
    everything = [item.item_key for item in whole.recommend(["i003"], k=NUM_ITEMS)]
    deleted = [int(str(key)[1:]) for key in everything[:2]]
    recommender = Recommender.load(export(tmp_path / "less", dataset, deleted=deleted))
    assert [item.item_key for item in recommender.recommend(["i003"], k=NUM_ITEMS)] == everything[2:]
    assert recommender.recommend(["i003"], k=3, allow=everything[:3])[0].item_key == everything[2]
    (state,) = recommender.encode([["i003"]])
    (from_state,) = recommender.recommend_from_states([state], k=NUM_ITEMS)
    assert [item.item_key for item in from_state] == everything[2:]
    recommender.recommend(everything[:2])
    assert recommender.unknown_items == 0


def test_a_user_without_history_gets_an_answer(tmp_path: Path, dataset: SequenceDataset) -> None:
    recommender = Recommender.load(export(tmp_path, dataset))
    assert len(recommender.recommend([], k=3)) == 3


@pytest.fixture(scope="module", params=[True, False], ids=["excluding", "including"])
def recommender(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, dataset: SequenceDataset
) -> Recommender:
    return Recommender.load(export(tmp_path_factory.mktemp("loaded"), dataset, exclude_history=request.param), recent_items=4)


def keys_of(found: list[Recommendation]) -> list[str | int]:
    return [item.item_key for item in found]


HISTORY = ["i003", "i004", "i005"]


def test_excluded_items_are_left_out_and_the_others_keep_their_order(recommender: Recommender) -> None:
    everything = keys_of(recommender.recommend(HISTORY, k=NUM_ITEMS))
    dropped = {everything[0], everything[3], "unknown"}
    assert keys_of(recommender.recommend(HISTORY, k=NUM_ITEMS, exclude=dropped)) == [
        key for key in everything if key not in dropped
    ]
    # each user's own
    first, second = recommender.recommend_many([HISTORY, HISTORY], k=1, exclude=[[everything[0]], []])
    assert (keys_of(first), keys_of(second)) == ([everything[1]], [everything[0]])
    assert recommender.unknown_items == 0, "only histories and events are counted"


def test_only_allowed_items_are_candidates_in_the_order_of_the_whole_catalogue(recommender: Recommender) -> None:
    everything = recommender.recommend(HISTORY, k=NUM_ITEMS)
    allowed = ["i020", "i003", "i001", "i009", "i009", "unknown", "i015"]
    found = recommender.recommend(HISTORY, k=NUM_ITEMS, allow=allowed)
    assert keys_of(found) == [item.item_key for item in everything if item.item_key in allowed]
    assert [item.score for item in found] == pytest.approx([i.score for i in everything if i.item_key in allowed], rel=1e-5)
    assert keys_of(recommender.recommend(HISTORY, k=2, allow=allowed, exclude=[found[0].item_key])) == keys_of(found[1:3])
    assert recommender.recommend(HISTORY, k=3, allow=[]) == recommender.recommend(HISTORY, k=3, allow=["unknown"]) == []


def test_allowed_items_that_tie_come_by_item_id(tmp_path: Path, dataset: SequenceDataset) -> None:
    bundle = load_bundle(export(tmp_path, dataset))
    bundle.model.table.weight[1:] = 0.25
    bundle.candidate_bias[1:] = 0.5
    found = Recommender(bundle).recommend([], k=3, allow=["i017", "i002", "i019", "i005"])
    assert keys_of(found) == ["i002", "i005", "i017"]


def test_a_state_answers_as_the_history_it_was_made_of(recommender: Recommender, dataset: SequenceDataset) -> None:
    for ids in ([], [4], [1, 2, 3], [7, 7, 9, 2]):  # within the window, and within what a state keeps
        history = dataset.catalogue.keys_of(ids)
        stepped = recommender.init_state()
        for key in history:
            stepped = recommender.step(stepped, key)
        begun, rest = history[:1], history[1:]
        states = [stepped, *recommender.encode([history]), recommender.extend(recommender.encode([begun])[0], rest)]
        expected = recommender.recommend(history, k=6, exclude=["i011"])
        for state, found in zip(states, recommender.recommend_from_states(states, k=6, exclude=[["i011"]] * 3), strict=True):
            assert keys_of(found) == keys_of(expected)
            assert [item.score for item in found] == pytest.approx([item.score for item in expected], rel=1e-4, abs=1e-5)
            assert (state.events, state.recent, state.version) == (len(ids), tuple(ids), recommender.version)
            again = UserState.from_bytes(state.to_bytes())
            assert recommender.recommend_from_states([again], k=6, exclude=[["i011"]]) == [found]
    assert recommender.recommend_from_states([]) == [] == recommender.encode([])


def test_one_more_event_meets_the_same_numbers_after_fifty_events_and_after_five_thousand(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    worked_on = []
    step = Stepper.step
    monkeypatch.setattr(
        Stepper, "step", lambda self, ids, states: worked_on.append((ids.shape, states.shape)) or step(self, ids, states)
    )
    monkeypatch.setattr(LRURec, "forward", lambda *_, **__: pytest.fail("encodes"))
    sizes, state, keys = {}, recommender.init_state(), [f"i{number % NUM_ITEMS + 1:03d}" for number in range(5000)]
    for number, key in enumerate(keys, 1):
        state = recommender.step(state, key)
        sizes[number] = (len(state.to_bytes()), len(state.recent))
    assert set(worked_on) == {((1,), (1, 2, 2, 8))}
    assert sizes[50] == sizes[5000]
    assert state.events == 5000
    assert state.recent == (17, 18, 19, 20), "the last four, as was asked for"


def test_unknown_events_change_nothing_and_are_counted(tmp_path: Path, dataset: SequenceDataset) -> None:
    recommender = Recommender.load(export(tmp_path, dataset))
    state = recommender.step(recommender.init_state(), "i001")
    assert recommender.step(state, "never seen") is state
    assert recommender.extend(state, ["never", "seen"]) is state
    assert recommender.unknown_items == 3


def test_a_state_of_another_version_is_refused_everywhere(recommender: Recommender) -> None:
    stranger = dataclasses.replace(recommender.init_state(), version="2025-12-31-old")
    calls: list[Callable[[], object]] = [
        lambda: recommender.step(stranger, "i001"),
        lambda: recommender.extend(stranger, ["i001"]),
        lambda: recommender.recommend_from_states([recommender.init_state(), stranger]),
    ]
    for call in calls:
        with pytest.raises(StateVersionError, match=rf"version=2025-12-31-old: this is version {recommender.version}.*history"):
            call()


@pytest.mark.parametrize(
    "change", [{"recurrent": torch.zeros(2, 2, 4)}, {"recurrent": torch.zeros(1, 2, 8)}, {"vector": torch.zeros(5)}]
)
def test_a_state_of_another_shape_is_refused_before_a_kernel_reads_beyond_it(
    recommender: Recommender, change: dict[str, torch.Tensor]
) -> None:
    forged = UserState.from_bytes(dataclasses.replace(recommender.init_state(), **change).to_bytes())  # type: ignore[arg-type]
    calls: list[Callable[[], object]] = [
        lambda: recommender.step(forged, "i001"),
        lambda: recommender.extend(forged, ["i001"]),
        lambda: recommender.recommend_from_states([forged]),
    ]
    for call in calls:
        with pytest.raises(StateError, match="make a new one from the user's history"):
            call()


class Yielding(list[str]):
    """Keys that let another thread run whenever they are counted."""

    def __len__(self) -> int:
        time.sleep(0)
        return super().__len__()


def test_unknown_items_of_many_threads_are_all_counted(tmp_path: Path, dataset: SequenceDataset) -> None:
    recommender = Recommender.load(export(tmp_path, dataset))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: recommender.extend(recommender.init_state(), Yielding(["never seen"])), range(400)))
    assert recommender.unknown_items == 400


def test_requests_answered_together_equal_requests_answered_alone(tmp_path: Path, dataset: SequenceDataset) -> None:
    recommender = Recommender.load(export(tmp_path, dataset))
    histories = [["i001"], [], ["i003", "i004", "i005", "i006", "i007", "i008"]]
    for together, history in zip(recommender.recommend_many(histories, k=5), histories, strict=True):
        alone = recommender.recommend(history, k=5)
        assert [item.item_key for item in together] == [item.item_key for item in alone]


@pytest.mark.parametrize(
    ("history", "k", "message"),
    [([1, 2], 3, "item keys have to be large_string"), (["i001"], 0, "k=0"), (["i001"], 21, r"k=21: has to be in 1..20")],
)
def test_an_impossible_request_is_refused(
    tmp_path: Path, dataset: SequenceDataset, history: list[str], k: int, message: str
) -> None:
    with pytest.raises(LrurecError, match=message):
        Recommender.load(export(tmp_path, dataset)).recommend(history, k=k)


def test_the_same_content_gives_the_same_version_and_is_not_written_twice(tmp_path: Path, dataset: SequenceDataset) -> None:
    first = export(tmp_path, dataset)
    before = (Path(first) / storage.MANIFEST).stat().st_mtime_ns
    assert export(tmp_path, dataset) == first
    assert (Path(first) / storage.MANIFEST).stat().st_mtime_ns == before


def test_a_model_that_answers_differently_is_refused_at_load(tmp_path: Path, dataset: SequenceDataset) -> None:
    ids, scores = answers(build_model(), True)
    with pytest.raises(BundleError, match="differs by"):
        Recommender.load(export(tmp_path / "scores", dataset, golden=(ids, scores + 0.01)))
    swapped = ids.clone()
    swapped[0, 0], swapped[0, 1] = ids[0, 1], ids[0, 0]
    assert (scores[0, 0] - scores[0, 1]) > 0.01, "the two are no tie, or the test would prove nothing"
    with pytest.raises(BundleError, match="other items"):
        Recommender.load(export(tmp_path / "items", dataset, golden=(swapped, scores)))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "catalogue/part-00000.parquet", "golden/requests.jsonl", "README.md"]
)
def test_a_changed_byte_or_a_missing_file_is_refused(tmp_path: Path, dataset: SequenceDataset, name: str) -> None:
    file = Path(export(tmp_path, dataset)) / name
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match="changed after the commit"):
        load_bundle(str(file.parents[len(Path(name).parts) - 1]))
    file.unlink()
    with pytest.raises(BundleError, match="is missing"):
        load_bundle(str(file.parents[len(Path(name).parts) - 1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(schema_version=99), "schema_version=99"),
        (lambda manifest: manifest["files"].update({"../../etc/passwd": {"bytes": 1, "sha256": ""}}), "leaves the directory"),
        (lambda manifest: manifest.pop("files"), "lists no files"),
    ],
)
def test_a_strange_manifest_is_refused(tmp_path: Path, dataset: SequenceDataset, change: object, message: str) -> None:
    url = export(tmp_path, dataset)
    manifest = storage.read_json(storage.join(url, storage.MANIFEST))
    change(manifest)  # type: ignore[operator]
    storage.write_json(storage.join(url, storage.MANIFEST), manifest)
    with pytest.raises(BundleError, match=message):
        load_bundle(url)


def test_a_bundle_whose_parts_do_not_fit_together_is_refused(tmp_path: Path, dataset: SequenceDataset) -> None:
    url = export(tmp_path, dataset)
    config = storage.read_json(storage.join(url, "config.json"))
    config["model"]["dim"] = 12
    storage.write_json(storage.join(url, "config.json"), config)
    storage.commit(url, {"schema_version": SCHEMA_VERSION, "version": "forged"})
    with pytest.raises(BundleError, match="do not fit together"):
        load_bundle(url)


def test_the_model_card_states_data_metrics_and_decay(tmp_path: Path, dataset: SequenceDataset) -> None:
    card = (Path(export(tmp_path, dataset)) / "README.md").read_text()
    for fact in ("| recall@10 | 0.50000 |  | 0.10000 |", "29 interactions of 4 users", "0.99000"):
        assert fact in card


def test_requests_in_a_bundle_are_plain_json(tmp_path: Path, dataset: SequenceDataset) -> None:
    lines = (Path(export(tmp_path, dataset)) / "golden" / "requests.jsonl").read_text().splitlines()
    assert [json.loads(line)["history"] for line in lines] == [dataset.catalogue.keys_of(history) for history in HISTORIES]
