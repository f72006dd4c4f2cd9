"""Trackers: what metrics.jsonl holds, in TensorBoard's event files, an MLflow store and Ray's export."""

import sys
import urllib.request
from pathlib import Path

import pytest
import ray
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lrurec_dist.errors import ConfigError
from lrurec_dist.train.trackers import _OPEN as OPEN
from lrurec_dist.train.trackers import Trackers
from tests.clusters import wait_for


def test_tensorboard_holds_every_number_of_a_record_at_its_step(tmp_path: Path) -> None:
    trackers = Trackers(str(tmp_path), ["tensorboard"], {})
    trackers.write("train", {"step": 5, "loss": 2.5, "gradient_norm": None})
    trackers.write("train", {"step": 10, "loss": 1.5})
    trackers.write("validation", {"step": 10, "recall@10": 0.25, "is_best": True})
    trackers.write("note", {"text": "resuming"})
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/loss", "validation/recall@10"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(5, 2.5), (10, 1.5)]
    assert [(event.step, event.value) for event in events.Scalars("validation/recall@10")] == [(10, 0.25)]


def test_mlflow_holds_every_number_of_a_record_and_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database would need sqlalchemy and alembic
    trackers = Trackers("/runs/a", ["mlflow"], {"model": {"dim": 64}})
    trackers.write("train", {"step": 5, "loss": 2.5, "gradient_norm": None})
    trackers.write("train", {"step": 10, "loss": 1.5})
    trackers.write("validation", {"step": 10, "recall@10": 0.25, "is_best": True})
    trackers.close()
    client = MlflowClient(f"file://{tmp_path}/store")
    (run,) = client.search_runs(["0"])
    assert (run.info.run_name, run.info.status) == ("/runs/a", "FINISHED")
    assert run.data.metrics == {"train/loss": 1.5, "validation/recall_at_10": 0.25}
    assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/loss")] == [
        (5, 2.5),
        (10, 1.5),
    ]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["config.json"]


@pytest.mark.usefixtures("ray_session")
def test_under_ray_prometheus_finds_every_number_of_the_last_record(tmp_path: Path) -> None:
    trackers = Trackers(str(tmp_path), ["ray"], {})
    trackers.write("validation", {"step": 10, "recall@10": 0.125})
    trackers.write("validation", {"step": 20, "recall@10": 0.25})
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def found() -> list[str]:
        try:
            text = urllib.request.urlopen(url, timeout=5).read().decode()
        except OSError:
            return []
        ours = (line for line in text.splitlines() if f'run="{tmp_path}"' in line)
        return [line for line in ours if line.startswith("ray_lrurec_validation_recall_at_10{")]

    wait_for("the gauge", found)
    (line,) = found()
    assert line.endswith(" 0.25")
    trackers.close()


def test_a_tracker_that_fails_is_left_out_and_said_to_be_while_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def write(_: dict[str, float], step: int) -> None:
        calls.append(step)
        raise ConnectionError("https://key:secret@host refuses")

    monkeypatch.setitem(OPEN, "wandb", lambda *_: (write, lambda: None))
    notes: list[str] = []
    trackers = Trackers(str(tmp_path), ["wandb", "tensorboard"], {}, notes.append)
    for step in (5, 10):
        trackers.write("train", {"step": step, "loss": 2.5})
    trackers.close()
    assert calls == [5]
    assert notes == ["train.track=wandb: gets no more numbers, since it failed (ConnectionError)"]
    assert "refuses" in capsys.readouterr().err
    assert len(EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")) == 2


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    trackers = Trackers(str(tmp_path), [], {})
    trackers.write("train", {"step": 5, "loss": 2.5})
    trackers.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("tensorboard", "tensorboard"), ("mlflow", r"'lrurec-dist\[mlflow\]'"), ("wandb", r"'lrurec-dist\[wandb\]'")],
)
def test_a_tracker_that_is_not_installed_names_what_to_install(
    name: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # what an import finds that is not there
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ConfigError, match=rf"train\.track={name}: .*pip install {wanted},"):
        Trackers(str(tmp_path), [name], {})


def test_a_package_that_a_tracker_s_store_needs_is_named_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    monkeypatch.setitem(sys.modules, "alembic", None)
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    with pytest.raises(
        ConfigError, match=r"train\.track=mlflow: (alembic|sqlalchemy)\S* is not installed; pip install (alembic|sqlalchemy)"
    ):
        Trackers(str(tmp_path), ["mlflow"], {})
