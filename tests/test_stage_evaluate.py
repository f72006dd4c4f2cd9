"""The evaluation stage on models from elsewhere: bundles, other splits, the run before beside them, what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.config_file import load_config
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.data.splits import Split
from lrurec_dist.errors import CatalogueError, ConfigError, DataNotReadyError
from lrurec_dist.evaluate.ranking import top_k
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.ray_session import RaySession
from lrurec_dist.reporting import Status
from lrurec_dist.serve.bundle import GoldenAnswers, save_bundle
from lrurec_dist.stage_evaluate import evaluate, find_model, read_figures
from lrurec_dist.stages import run
from tests.datasets import chain_sequences, write_dataset
from tests.test_report import Page

NUM_ITEMS = 40
DAY = 86_400_000_000
SHAPE = {"num_items": NUM_ITEMS, "dim": 8, "hidden": 8, "blocks": 1, "dropout": 0.1}


def bundle_of(dataset: SequenceDataset, url: Path, seed: int, bias: torch.Tensor | None = None, checkpoint: str = "") -> str:
    """A bundle of an untrained model that says it left the last ones out; `bias` is added to the scores of all items."""
    torch.manual_seed(seed)
    shape = {**SHAPE, "num_items": dataset.num_items}
    model = LRURec(**shape).eval().requires_grad_(False)
    if bias is not None:
        model.table.bias[1:] += bias
    nothing = torch.empty(0, dtype=torch.int64)
    golden = top_k(model.encode(torch.tensor([[1]])), model.item_rows(), model.table.bias, 10, nothing, nothing)
    figures = {name: {f"{metric}@10": 0.0 for metric in ("recall", "ndcg")} for name in ("model", "popularity")}
    return save_bundle(
        str(url),
        date="2026-11-20",
        model=model,
        model_arguments=shape,
        max_length=7,
        exclude_history=False,
        catalogue=dataset.catalogue.table,
        catalogue_fingerprint=dataset.catalogue.fingerprint,
        golden=GoldenAnswers([dataset.catalogue.keys_of(np.array([1]))], *golden),
        metrics={**figures, "users": 1, "largest_decay_modulus": 0.9, "step": 77, "split": {"kind": "leave_last_out"}},
        lineage={"interactions": 1, "users": 1, "sources": {}, "step": 77, "checkpoint": checkpoint},
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    sequences = chain_sequences(60, NUM_ITEMS)
    draw = np.random.default_rng(0)
    times = [np.sort(draw.integers(0, 20 * DAY, len(sequence))).tolist() for sequence in sequences]
    return write_dataset(str(tmp_path_factory.mktemp("data")), sequences, NUM_ITEMS, timestamps=times)


def settings(run_dir: Path, dataset: SequenceDataset, *overrides: str) -> Config:
    small = ["evaluate.bootstrap=40", "evaluate.ks=[1,10,50]", "train.device=cpu", "train.workers=1"]
    return load_config(None, [f"run_dir={run_dir}", f"dataset.dir={dataset.url}", *small, *overrides])


@pytest.fixture(scope="module")
def first(dataset: SequenceDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The run of a bundle's evaluation, by both splits."""
    place = tmp_path_factory.mktemp("first")
    config = settings(place / "run", dataset, f"evaluate.model={bundle_of(dataset, place, seed=0)}")
    status = Status(config.run_dir)
    evaluate(config, status, RaySession(config))
    return place / "run", status.stages["evaluate"]["outputs"]


@pytest.mark.usefixtures("ray_session")
def test_a_bundle_is_evaluated_by_both_splits_and_leaves_figures_ranks_and_a_report(
    first: tuple[Path, dict[str, Any]], dataset: SequenceDataset
) -> None:
    run_dir, outputs = first
    assert (outputs["evaluated"], outputs["step"]) == (["leave_last_out", "global_time"], 77)
    for kind in outputs["evaluated"]:
        figures = read_figures(str(run_dir), kind)
        manifest = storage.read_manifest(str(run_dir / "evaluation" / kind))  # verifies every file
        ranked = [name for name in manifest["files"] if name.startswith("ranks/")]
        assert len(ranked) == len(dataset.shard_names)
        users = [
            key
            for name in ranked
            for key in storage.read_table(str(run_dir / "evaluation" / kind / name))["user_key"].to_pylist()
        ]
        assert len(users) == len(set(users)) == figures["users"] > 5
        assert set(figures["metrics"]) == {"model", "popularity", "recent_popularity", "markov", "neighbours"}
        value, low, high = (figures["metrics"]["model"]["recall@10"][end] for end in ("value", "low", "high"))
        assert low <= value <= high
        assert figures["trained"]["kind"] == "leave_last_out"
        assert figures["audit"]["users"] == 60
    last_out, cut = (read_figures(str(run_dir), kind) for kind in outputs["evaluated"])
    assert (last_out["trained_targets"], last_out["users"]) == (0, dataset.manifest["users_evaluable"])
    assert cut["trained_targets"] > 0, "targets before a user's last two trained a model that leaves the last ones out"
    page = Page((run_dir / "report.html").read_text())
    assert ["users", "60"] in page.rows
    assert "Test, global time cut" in page.text


@pytest.mark.usefixtures("ray_session")
def test_another_model_is_compared_on_the_same_users(
    first: tuple[Path, dict[str, Any]], dataset: SequenceDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    previous, _ = first
    model = bundle_of(dataset, tmp_path, seed=1)
    options = [
        f"evaluate.model={model}",
        f"evaluate.previous={previous}",
        "evaluate.both_splits=false",
        "evaluate.precision=bfloat16",
    ]
    config = settings(tmp_path / "run", dataset, *options)
    run(config, ["evaluate"])
    beside = read_figures(config.run_dir, "leave_last_out")["previous"]
    before = read_figures(str(previous), "leave_last_out")
    assert beside["users"] == before["users"]
    assert [read_figures(run_dir, "leave_last_out")["precision"] for run_dir in (str(previous), config.run_dir)] == [
        "float32",
        "bfloat16",
    ]
    assert beside["before"]["ndcg@10"]["value"] == pytest.approx(before["metrics"]["model"]["ndcg@10"]["value"])
    now = read_figures(config.run_dir, "leave_last_out")["metrics"]["model"]["ndcg@10"]["value"]
    difference = beside["differences"]["ndcg@10"]
    assert difference["value"] == pytest.approx(now - before["metrics"]["model"]["ndcg@10"]["value"])
    links = [attributes["href"] for tag, attributes in Page((tmp_path / "run" / "report.html").read_text()).tags if tag == "a"]
    assert [(tmp_path / "run" / str(link)).resolve() for link in links] == [previous / "report.html"]
    said = capsys.readouterr().out
    assert "k=[50] exceeds the catalogue" in said
    assert f"beside {previous}" in said
    assert "nothing of a later part trains" in said
    run(config, ["evaluate"])
    assert "evaluate: skipped" in capsys.readouterr().out


def test_a_model_of_another_catalogue_is_refused(dataset: SequenceDataset, tmp_path: Path) -> None:
    smaller = write_dataset(str(tmp_path / "smaller"), [[1, 2, 3]], NUM_ITEMS - 5)
    url = bundle_of(dataset, tmp_path, seed=0)
    with pytest.raises(CatalogueError, match=r"has catalogue \w+ of 40 items, .* has 35, which neither are nor begin with those"):
        find_model(settings(tmp_path / "run", smaller, f"evaluate.model={url}"), smaller)
    extended = write_dataset(str(tmp_path / "extended"), [[1, 2, 3]], NUM_ITEMS + 5)
    found = find_model(settings(tmp_path / "run", extended, f"evaluate.model={url}"), extended)
    assert (found.max_length, found.trained, found.name[:7]) == (7, Split(), "bundle ")


def test_what_is_no_model_is_not_ready(dataset: SequenceDataset, tmp_path: Path) -> None:
    with pytest.raises(DataNotReadyError, match=r"has no checkpoint; run jobs/train\.py first"):
        find_model(settings(tmp_path, dataset), dataset)
    with pytest.raises(DataNotReadyError, match="is neither a checkpoint nor a bundle"):
        find_model(settings(tmp_path, dataset, f"evaluate.model={tmp_path / 'nothing'}"), dataset)
    with pytest.raises(DataNotReadyError, match="is neither a checkpoint nor a bundle"):
        find_model(settings(tmp_path, dataset, f"evaluate.model={dataset.url}"), dataset)


def test_a_bundle_does_not_get_the_figures_of_another_model(dataset: SequenceDataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"use jobs/evaluate\.py"):
        run(settings(tmp_path, dataset, "evaluate.model=/elsewhere"), ["bundle"])
