"""What is refused before any process is started."""

from pathlib import Path

import pytest
import ray

from lrurec_dist.config_file import load_config
from lrurec_dist.errors import CatalogueError, CheckpointError, ConfigError, LrurecError
from lrurec_dist.stages import run
from lrurec_dist.train.standalone import train_standalone
from tests.datasets import write_dataset
from tests.test_checkpoint import save_step, write_first_schema


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray is started"))
    url = write_dataset(str(tmp_path / "data"), [[1, 2, 3, 1]] * 4, 3, shards=1).url
    return [f"run_dir={tmp_path / 'run'}", f"dataset.dir={url}", "train.device=cpu"]


def refusal(settings: list[str], *stages: str) -> tuple[type[LrurecError], str]:
    """What a job ends with, without Ray."""
    with pytest.raises(LrurecError) as raised:
        run(load_config(None, settings), stages)  # type: ignore[arg-type]
    return raised.type, str(raised.value)


def test_more_workers_than_items_to_deal_out_are_refused_before_anything_starts(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "world_size=4: a sharded item table needs an item for every rank, the catalogue has 3; take at most 3 workers"
    found = refusal([*settings, "train.workers=4", "model.table=sharded"], "train")
    assert found[0] is ConfigError
    assert found[1].startswith(message)
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "4")  # what torchrun started is what counts
    with pytest.raises(ConfigError, match=message):
        train_standalone(load_config(None, [*settings, "model.table=sharded"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.deepspeed={zero_optimization: {stage: 2}}", "train.deepspeed.zero_optimization.stage=2: contradicts 1"),
        (
            "train.deepspeed={optimizer: {type: Lamb}}",
            "train.deepspeed.optimizer={'type': 'Lamb'}: is said by train.learning_rate",
        ),
        ("train.offload_optimizer=cpu", "train.offload_optimizer=cpu: this run computes on the CPU"),
    ],
)
def test_what_contradicts_the_settings_is_refused_before_the_log_is_read(
    settings: list[str], tmp_path: Path, override: str, message: str
) -> None:
    found = refusal([*settings, override], "prepare", "train")
    assert found[0] is ConfigError
    assert found[1].startswith(message)
    assert not (tmp_path / "run").exists()


def test_checkpoints_of_another_version_or_another_run_are_refused_before_anything_starts(
    settings: list[str], tmp_path: Path
) -> None:
    write_first_schema(tmp_path / "old")
    save_step(str(tmp_path / "another"), 1, recall=0.1)
    others = settings[1:]
    of_old_version = "schema_version=1, this code reads 2; finish this run"
    for overrides, kind, message in (
        ([f"run_dir={tmp_path / 'old'}"], CheckpointError, of_old_version),
        ([f"run_dir={tmp_path / 'a'}", f"train.warm_start={tmp_path / 'old'}"], CheckpointError, of_old_version),
        ([f"run_dir={tmp_path / 'another'}"], CatalogueError, "expects catalogue"),
        (
            [f"run_dir={tmp_path / 'b'}", f"train.warm_start={tmp_path / 'another'}"],
            CheckpointError,
            "was trained with model.dim=",
        ),
    ):
        found = refusal([*others, *overrides], "train")
        assert found[0] is kind, found[1]
        assert message in found[1]
