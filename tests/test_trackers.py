"""Trackers: what metrics.jsonl holds, in TensorBoard's event files."""

import sys
import urllib.request
from pathlib import Path

import pytest
import ray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lrurec_dist.errors import ConfigError
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
        return [line for line in text.splitlines() if line.startswith("ray_lrurec_validation_recall_at_10{")]

    wait_for("the gauge", found)
    (line,) = found()
    assert f'run="{tmp_path}"' in line
    assert line.endswith(" 0.25")
    trackers.close()


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    trackers = Trackers(str(tmp_path), [], {})
    trackers.write("train", {"step": 5, "loss": 2.5})
    trackers.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_names_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # what an import finds that is not there
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ConfigError, match=rf"train\.track={name}: .*pip install 'lrurec-dist\[{name}\]'"):
        Trackers(str(tmp_path), [name], {})
