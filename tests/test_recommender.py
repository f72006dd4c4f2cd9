"""Bundles and the recommender that reads them: verified, checked, and independent of training."""

import json
from pathlib import Path

import pytest
import torch

from lrurec_dist import storage
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import BundleError, LrurecError
from lrurec_dist.evaluate.ranking import top_k
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.serve.bundle import GoldenAnswers, load_bundle, save_bundle
from lrurec_dist.serve.recommender import Recommender
from tests.datasets import write_dataset

NUM_ITEMS, MAX_LENGTH = 20, 5
SHAPE = {"num_items": NUM_ITEMS, "dim": 6, "hidden": 8, "blocks": 2, "dropout": 0.3, "ring": [0.8, 0.99]}
HISTORIES = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], list(range(1, 19))]


def build_model() -> LRURec:
    torch.manual_seed(2)
    model = LRURec(**SHAPE)
    with torch.no_grad():
        model.table.weight.mul_(30)
    return model.eval().requires_grad_(False)


def answers(model: LRURec, exclude_history: bool, k: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Each history by itself, through the model alone."""
    found = []
    for history in HISTORIES:
        vector = model.encode(torch.tensor([history[-MAX_LENGTH:]]))
        excluded = torch.tensor(history if exclude_history else [], dtype=torch.int64)
        found.append(top_k(vector, model.table.weight, model.table.bias, k, torch.zeros_like(excluded), excluded))
    return torch.cat([ids for ids, _ in found]), torch.cat([scores for _, scores in found])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return write_dataset(str(tmp_path_factory.mktemp("bundle")), HISTORIES, NUM_ITEMS)


def export(
    registry: Path,
    dataset: SequenceDataset,
    *,
    exclude_history: bool = True,
    golden: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> str:
    model = build_model()
    metrics = {"model": {"recall@10": 0.5}, "popularity": {"recall@10": 0.1}, "users": 4, "largest_decay_modulus": 0.99}
    return save_bundle(
        str(registry),
        date="2026-01-02",
        model=model,
        model_arguments=SHAPE,
        max_length=MAX_LENGTH,
        exclude_history=exclude_history,
        catalogue=dataset.catalogue.table,
        catalogue_fingerprint=dataset.catalogue.fingerprint,
        golden=GoldenAnswers(
            [dataset.catalogue.keys_of(history) for history in HISTORIES], *(golden or answers(model, exclude_history))
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


def test_a_user_without_history_gets_an_answer(tmp_path: Path, dataset: SequenceDataset) -> None:
    recommender = Recommender.load(export(tmp_path, dataset))
    assert len(recommender.recommend([], k=3)) == 3


def test_requests_answered_together_equal_requests_answered_alone(tmp_path: Path, dataset: SequenceDataset) -> None:
    recommender = Recommender.load(export(tmp_path, dataset))
    histories = [["i001"], [], ["i003", "i004", "i005", "i006", "i007", "i008"]]
    for together, history in zip(recommender.recommend_many(histories, k=5), histories, strict=True):
        alone = recommender.recommend(history, k=5)
        assert [item.item_key for item in together] == [item.item_key for item in alone]


@pytest.mark.parametrize(("history", "k", "message"), [([1, 2], 3, "history keys have to be large_string"), (["i001"], 0, "k=0")])
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
    storage.commit(url, {"schema_version": 1, "version": "forged"})
    with pytest.raises(BundleError, match="do not fit together"):
        load_bundle(url)


def test_the_model_card_states_data_metrics_and_decay(tmp_path: Path, dataset: SequenceDataset) -> None:
    card = (Path(export(tmp_path, dataset)) / "README.md").read_text()
    for fact in ("| recall@10 | 0.50000 | 0.10000 |", "29 interactions of 4 users", "0.99000"):
        assert fact in card


def test_requests_in_a_bundle_are_plain_json(tmp_path: Path, dataset: SequenceDataset) -> None:
    lines = (Path(export(tmp_path, dataset)) / "golden" / "requests.jsonl").read_text().splitlines()
    assert [json.loads(line)["history"] for line in lines] == [dataset.catalogue.keys_of(history) for history in HISTORIES]
