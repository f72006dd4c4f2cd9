"""The training loop under plain torchrun, compared with the same configuration under Ray Train."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lrurec_dist.config_file import load_config
from lrurec_dist.errors import ConfigError
from lrurec_dist.train.checkpoint import checkpoint_url, read_checkpoint_manifest
from lrurec_dist.train.launch import launch_training
from lrurec_dist.train.standalone import train_standalone
from tests.datasets import chain_sequences, write_dataset

ROOT = Path(__file__).resolve().parent.parent
NUM_ITEMS = 25
# Every option that the loop hands on: micro-batches with and without rows, dropout, a schedule, parts recomputed.
SETTINGS = [
    "model.dim=8",
    "model.hidden=8",
    "model.dropout=0.2",
    "batch.global_batch_size=10",
    "batch.max_length=8",
    "train.workers=2",
    "train.accumulation=2",
    "train.activation_checkpointing=true",
    "train.schedule=cosine",
    "train.warmup_steps=3",
    "train.max_steps=10",
    "train.report_every=2",
    "train.validate_every=5",
    "train.learning_rate=0.01",
    "train.threads_per_worker=1",
    "train.device=cpu",
]
# What jobs/train_torchrun.py does, and then a look at what was imported.
SCRIPT = """
import os, sys
from lrurec_dist.train.standalone import main
code = main(sys.argv[1:], description="", default_config="")
with open(f"{os.environ['SEEN']}/{os.environ['RANK']}", "w") as file:
    print(*sorted({"ray", "deepspeed", "omegaconf", "torch._inductor.compile_fx"} & set(sys.modules)), file=file)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def dataset_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(str(tmp_path_factory.mktemp("standalone")), chain_sequences(60, NUM_ITEMS), NUM_ITEMS, shards=2).url


def torchrun(script: Path, *arguments: str, seen: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SEEN": str(seen)},
    )


def train_records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


@pytest.mark.usefixtures("ray_session")
def test_torchrun_repeats_the_run_under_ray_to_the_bit_without_importing_ray(tmp_path: Path, dataset_url: str) -> None:
    script, seen = tmp_path / "train.py", tmp_path / "seen"
    script.write_text(SCRIPT)
    seen.mkdir()
    defaults = tmp_path / "defaults.yaml"
    defaults.write_text("# nothing\n")
    settings = [*SETTINGS, f"dataset.dir={dataset_url}"]
    done = torchrun(script, str(defaults), f"run_dir={tmp_path}/plain", *settings, seen=seen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(seen / str(rank)).read_text().split() for rank in (0, 1)] == [["deepspeed", "omegaconf"]] * 2
    assert done.stdout.count("train: step ") == 5, "rank 0 alone prints"
    assert "train: validation at step 10" in done.stdout

    launch_training(load_config(None, [f"run_dir={tmp_path}/ray", *settings]))
    names = ("step", "loss", "learning_rate", "gradient_norm", "skipped_steps", "padded_per_real")
    plain, ray = (
        [{name: record[name] for name in names} for record in train_records(tmp_path / run)] for run in ("plain", "ray")
    )
    assert plain == ray
    assert [record["step"] for record in plain] == [2, 4, 6, 8, 10]
    weights = [read_checkpoint_manifest(checkpoint_url(str(tmp_path / run), 10))["files"] for run in ("plain", "ray")]
    assert weights[0] == weights[1]


def test_shares_of_the_time_add_up_to_no_more_than_all_of_it(tmp_path: Path, dataset_url: str) -> None:
    overrides = [*SETTINGS, "train.max_steps=4", "train.validate_every=4"]
    done = torchrun(
        ROOT / "jobs/train_torchrun.py", f"run_dir={tmp_path}/run", *overrides, f"dataset.dir={dataset_url}", seen=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for record in train_records(tmp_path / "run"):
        shares = [record[f"{name}_share"] for name in ("waiting", "forward", "backward", "communication", "update")]
        assert all(share > 0 for share in shares)
        assert sum(shares) <= 1
        assert 0 <= record["padding_share"] < 1
    assert list((tmp_path / "run/tensorboard").glob("events.out.tfevents.*"))


def test_without_torchrun_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=r"RANK is not set: start this with torchrun --nproc-per-node N"):
        train_standalone(load_config(None, [f"run_dir={tmp_path}"]))


def test_a_feed_that_needs_ray_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=r"batch\.feed=ray: there is no Ray here; set batch\.feed=local"):
        train_standalone(load_config(None, [f"run_dir={tmp_path}", "batch.feed=ray"]))
