"""Publishing a run's bundle: the first champion, one that is no worse than the champion, one that is; with real evaluations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.config_file import load_config
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import ConfigError, DataNotReadyError, GateRefusedError
from lrurec_dist.reporting import Status
from lrurec_dist.serve.channels import CANDIDATE, CHAMPION, Pointer, decision_url, read_channel
from lrurec_dist.serve.registry import offer, rollback
from lrurec_dist.serve.replay import replay_in_fresh_process
from lrurec_dist.stages import run
from tests.datasets import write_dataset
from tests.test_mlflow_registry import mlflow_store as mlflow_store
from tests.test_stage_evaluate import bundle_of

NUM_ITEMS, KNOWN = 40, 25
DATE = "2026-11-20"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    """Users who mostly take the items with small ids."""
    draw = np.random.default_rng(0)
    sequences = [(draw.integers(0, NUM_ITEMS, 6) * draw.random(6) ** 2).astype(int) + 1 for _ in range(240)]
    return write_dataset(str(tmp_path_factory.mktemp("data")), [part.tolist() for part in sequences], NUM_ITEMS)


def preferring(num_items: int, sign: float) -> torch.Tensor:
    """The bias of a model that prefers items with small ids, or with large ones."""
    return -sign * torch.arange(num_items, dtype=torch.float32)


def settings(run_dir: Path, dataset: SequenceDataset, *overrides: str) -> list[str]:
    small = ["evaluate.bootstrap=60", "evaluate.both_splits=false", "evaluate.exclude_history=false", "train.workers=1"]
    limits = ["publish.against_baselines=[]", "publish.segment_users=20", "publish.min_coverage_share=0.1"]
    return [f"run_dir={run_dir}", f"dataset.dir={dataset.url}", "train.device=cpu", *small, *limits, *overrides]


def evaluated_run(dataset: SequenceDataset, place: Path, sign: float) -> tuple[Path, str, torch.Tensor]:
    """A run directory with the evaluation of a model; its URL, which a bundle names as its checkpoint; its bias."""
    bias = preferring(NUM_ITEMS, sign)
    checkpoint = bundle_of(dataset, place / "elsewhere", seed=0, bias=bias)
    run(load_config(None, settings(place / "run", dataset, f"evaluate.model={checkpoint}")), ["evaluate"])
    return place / "run", checkpoint, bias


@pytest.fixture(scope="module")
def good(dataset: SequenceDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, torch.Tensor]:
    return evaluated_run(dataset, tmp_path_factory.mktemp("good"), 1)


@pytest.fixture(scope="module")
def bad(dataset: SequenceDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, torch.Tensor]:
    return evaluated_run(dataset, tmp_path_factory.mktemp("bad"), -1)


def with_bundle(
    registry: Path, dataset: SequenceDataset, evaluated: tuple[Path, str, torch.Tensor], *overrides: str
) -> tuple[Config, str]:
    """The configuration of an evaluated run that has its bundle in a registry, and the bundle's version."""
    run_dir, checkpoint, bias = evaluated
    url = bundle_of(dataset, registry, seed=0, bias=bias, checkpoint=checkpoint)
    version = url.rpartition("/")[2]
    status = Status(str(run_dir))
    status.stages.pop("publish", None)
    status.commit("bundle", version, {"url": url, "version": version})
    return load_config(None, settings(run_dir, dataset, f"bundle.registry={registry}", *overrides)), version


def make_champion(registry: Path, dataset: SequenceDataset, bias: torch.Tensor) -> str:
    """A version that is champion without having been through a gate."""
    version = bundle_of(dataset, registry, seed=1, bias=bias).rpartition("/")[2]
    offer(str(registry), version, lambda _: ([], {}), {})
    return version


def pointer(registry: Path, name: str = CHAMPION) -> Pointer:
    found = read_channel(str(registry), name).pointer
    assert found is not None
    return found


def checks_of(registry: Path, decision: str) -> dict[str, dict[str, Any]]:
    record = storage.read_json(decision_url(str(registry), decision))
    return {check["name"]: check for check in record["checks"]}


@pytest.mark.usefixtures("ray_session")
def test_the_first_champion_needs_no_other_and_is_published_once(
    dataset: SequenceDataset,
    good: tuple[Path, str, torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mlflow_store: MlflowClient,
) -> None:
    config, version = with_bundle(tmp_path, dataset, good, "publish.mlflow_model=shop")
    run(config, ["publish"])
    assert mlflow_store.get_model_version_by_alias("shop", "champion").tags["bundle"] == version
    mlflow_store.delete_registered_model_alias("shop", "champion")
    assert (pointer(tmp_path).version, pointer(tmp_path).generation) == (version, 1)
    checks = checks_of(tmp_path, f"{version}-1")
    assert checks["champion"]["reason"] == "there is none to compare with"
    assert checks["largest difference to a golden score"]["reason"].startswith("1 golden requests answered")
    assert 0 < checks["ms, 95 % of single requests"]["value"] < checks["ms, 95 % of single requests"]["limit"]
    outputs = {"version": version, "decision": f"{version}-1", "generation": 1, "promoted": True}
    assert Status(config.run_dir).stages["publish"]["outputs"] == outputs
    status = Status(config.run_dir)
    del status.stages["publish"]  # killed before it could say so
    status.done()
    for _ in range(2):
        run(config, ["publish"])
        assert f"publish: skipped, {version} is champion, generation 1" in capsys.readouterr().out
        assert Status(config.run_dir).stages["publish"]["outputs"] == outputs
    make_champion(tmp_path, dataset, preferring(NUM_ITEMS, 1))
    rollback(str(tmp_path))
    assert mlflow_store.get_model_version_by_alias("shop", "champion").tags["bundle"] == version, "made up for"
    other = make_champion(tmp_path, dataset, preferring(NUM_ITEMS, 1))
    run(config, ["publish"])
    assert f"{version} was promoted as generation 1; {other} is champion now, generation 4" in capsys.readouterr().out
    assert pointer(tmp_path).version == other, "what was taken back stays so"


@pytest.mark.usefixtures("ray_session")
def test_a_better_model_replaces_a_champion_of_fewer_items_and_a_worse_one_does_not(
    dataset: SequenceDataset,
    good: tuple[Path, str, torch.Tensor],
    bad: tuple[Path, str, torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    smaller = write_dataset(str(tmp_path / "smaller"), [[1, 2, 3]], KNOWN)
    registry = tmp_path / "registry"
    first = make_champion(registry, smaller, 0 * preferring(KNOWN, 1))
    config, version = with_bundle(registry, dataset, good)
    run(config, ["publish"])
    assert (pointer(registry).version, pointer(registry).previous) == (version, [first])
    record = storage.read_json(decision_url(str(registry), f"{version}-1"))
    compared, checks = record["compared"], checks_of(registry, f"{version}-1")
    assert compared["users"] == record["users"] == dataset.manifest["users_evaluable"]
    assert compared["champions_unknown_targets"] > 0 == compared["unknown_targets"]
    against = checks["recall@10 against the champion"]
    assert against["value"] == compared["differences"]["recall@10"]["low"] > 0.1
    assert checks["items of the catalogue"]["value"] == NUM_ITEMS
    assert checks["recall@10, target's popularity: decile 1"]["value"] > 0
    capsys.readouterr()

    worse, poor = with_bundle(registry, dataset, bad)
    for attempt in (1, 2):
        with pytest.raises(
            GateRefusedError, match=rf"^publish: {poor} is refused by \d+ of \d+ checks .*{version} stays champion"
        ):
            run(worse, ["publish"])
        told = capsys.readouterr().out
        assert "REFUSED" in told
        assert ("evaluate: skipped" in told) == (attempt == 2), "the champion is evaluated once"
    assert pointer(registry).version == version
    assert pointer(registry, CANDIDATE).version == poor
    status = storage.read_json(storage.join(worse.run_dir, "status.json"))
    assert (status["result"], status["exit_code"]) == ("failed", 10)
    assert status["stages"]["publish"]["outputs"]["promoted"] is False
    checks = checks_of(registry, f"{poor}-2")
    assert not checks["recall@10 against the champion"]["passed"]
    assert not checks["recall@10, target's popularity: decile 1"]["passed"]
    assert checks["coverage@10"]["passed"]


@pytest.mark.usefixtures("ray_session")
def test_other_ids_than_the_champions_a_floor_and_a_damaged_bundle_refuse(
    dataset: SequenceDataset, good: tuple[Path, str, torch.Tensor], tmp_path: Path
) -> None:
    larger = write_dataset(str(tmp_path / "larger"), [[1, 2, 3]], NUM_ITEMS + 5)
    registry = tmp_path / "registry"
    make_champion(registry, larger, preferring(NUM_ITEMS + 5, 1))
    overrides = ["publish.floors.recall@10=0.999", "publish.against_baselines=[popularity]"]
    config, version = with_bundle(registry, dataset, good, *overrides)
    with pytest.raises(GateRefusedError, match="items of the catalogue"):
        run(config, ["publish"])
    checks = checks_of(registry, f"{version}-1")
    assert {name for name, check in checks.items() if not check["passed"]} == {
        "items of the catalogue",
        "floor of recall@10",
        "recall@10 above popularity",
        "ndcg@10 above popularity",
    }
    assert checks["items of the catalogue"]["limit"] == NUM_ITEMS + 5
    weights = registry / "versions" / version / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x01")
    with pytest.raises(GateRefusedError):
        run(config, ["publish"])
    check = checks_of(registry, f"{version}-2")["largest difference to a golden score"]
    assert not check["passed"]
    assert "changed after the commit" in check["reason"]


def test_a_bundle_that_is_not_loaded_in_time_is_not_answered(dataset: SequenceDataset, tmp_path: Path) -> None:
    found = replay_in_fresh_process(bundle_of(dataset, tmp_path, seed=0), timeout_s=0.01)
    assert found.error == "not loaded and answered within publish.load_timeout_s=0.01"


def test_what_cannot_be_published_is_said_before_anything_is_recorded(
    dataset: SequenceDataset, good: tuple[Path, str, torch.Tensor], tmp_path: Path
) -> None:
    registry = tmp_path / "registry"
    with pytest.raises(DataNotReadyError, match=r"has no bundle; run jobs/train\.py first"):
        run(load_config(None, settings(tmp_path / "run", dataset)), ["publish"])
    config, _ = with_bundle(registry, dataset, good)
    for overrides, error, message in (
        ([f"bundle.registry={tmp_path / 'other'}"], ConfigError, "set the registry that it lies in"),
        ([f"bundle.registry={registry}", "evaluate.bootstrap=0"], ConfigError, "the gate compares intervals"),
        ([f"bundle.registry={registry}", "evaluate.list_k=0"], ConfigError, "evaluate.list_k=0 measures no coverage"),
    ):
        with pytest.raises(error, match=message):
            run(load_config(None, settings(Path(config.run_dir), dataset, *overrides)), ["publish"])
    Status(config.run_dir).commit("bundle", "", {"url": bundle_of(dataset, registry, seed=7), "version": DATE})
    url = bundle_of(dataset, registry, seed=7, checkpoint="another")
    Status(config.run_dir).commit("bundle", "", {"url": url, "version": url.rpartition("/")[2]})
    with pytest.raises(DataNotReadyError, match="the bundle is of another and the dataset"):
        run(config, ["publish"])
    assert storage.list_names(storage.join(str(registry), "decisions")) == []
    assert read_channel(str(registry), CANDIDATE).pointer is None
