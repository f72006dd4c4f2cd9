"""What is refused before any process is started."""

from pathlib import Path

import pytest
import ray

from lrurec_dist.config_file import load_config
from lrurec_dist.errors import ConfigError
from lrurec_dist.train.launch import launch_training
from lrurec_dist.train.standalone import train_standalone
from tests.datasets import write_dataset


def test_more_workers_than_items_to_deal_out_are_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = write_dataset(str(tmp_path / "data"), [[1, 2, 3, 1]] * 4, 3, shards=1).url
    config = load_config(None, [f"run_dir={tmp_path / 'run'}", f"dataset.dir={url}", "train.workers=4", "model.table=sharded"])
    refusal = "world_size=4: a sharded item table needs an item for every rank, the catalogue has 3; take at most 3 workers"
    with pytest.raises(ConfigError, match=refusal):
        launch_training(config)
    assert not ray.is_initialized()
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "4")  # what torchrun started is what counts
    with pytest.raises(ConfigError, match=refusal):
        train_standalone(load_config(None, [f"run_dir={tmp_path / 'run'}", f"dataset.dir={url}", "model.table=sharded"]))
    assert not (tmp_path / "run").exists()
