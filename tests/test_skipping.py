"""Steps whose loss is not finite: no parameter changes on any rank, and the batch is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lrurec_dist.config import Config
from lrurec_dist.config_file import load_config
from lrurec_dist.errors import DivergenceError
from lrurec_dist.reporting import METRICS, MetricsFile
from lrurec_dist.train.checkpoint_index import last_step
from lrurec_dist.train.presence import Presence
from tests.datasets import chain_sequences, write_dataset
from tests.processes import run_ranks


@pytest.fixture(scope="module")
def dataset_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(str(tmp_path_factory.mktemp("skipping")), chain_sequences(60, 20), 20, shards=2).url


def configure(run: Path, dataset_url: str, *overrides: str) -> Config:
    small = ["model.dim=8", "model.hidden=8", "batch.global_batch_size=10", "batch.max_length=8", "model.dropout=0"]
    budget = ["train.max_steps=8", "train.report_every=4", "train.validate_every=4", "train.learning_rate=0.01"]
    return load_config(None, [f"run_dir={run}", f"dataset.dir={dataset_url}", *small, *budget, *overrides])


def train_with_a_bad_loss(config: Config, at: list[int], on_rank: int) -> dict[str, Any]:
    """Train with the real loop; the loss of one rank is nan while the given steps are made."""
    from lrurec_dist.train.loop import _Worker  # DeepSpeed only where a rank runs

    moved: dict[int, bool] = {}

    class Struck(_Worker):
        def _forward(self, micro: Any) -> torch.Tensor:
            loss_sum = super()._forward(micro)
            struck = self.progress.step + 1 in at and self.rank == on_rank
            return loss_sum * torch.nan if struck else loss_sum

        def _step(self, *arguments: Any) -> Any:
            before = torch.cat([p.flatten() for p in self.engine.parameters().values()])
            result = super()._step(*arguments)
            after = torch.cat([p.flatten() for p in self.engine.parameters().values()])
            moved[self.progress.step + 1] = not torch.equal(before, after)
            return result

    worker = Struck(config, torch.device("cpu"), Presence())
    try:
        worker.run(lambda _: None)
        error = ""
    except DivergenceError as raised:
        error = str(raised)
    return {"moved": moved, "error": error, "skipped": worker.progress.skipped}


def addresses(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "bad_batches.jsonl").read_text().splitlines()]


def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any_and_training_goes_on(
    tmp_path: Path, dataset_url: str
) -> None:
    config = configure(tmp_path, dataset_url, "train.max_skipped_steps=2")
    for rank in run_ranks(2, train_with_a_bad_loss, config, [3, 6], 1):
        assert rank == {"moved": {step: step not in (3, 6) for step in range(1, 9)}, "error": "", "skipped": 2}
    found = addresses(tmp_path)
    assert [(line["epoch"], line["batch"], line["rank"]) for line in found] == [(0, 2, 1), (0, 5, 1)]
    notes = [record["text"] for record in MetricsFile(str(tmp_path / METRICS)).read() if record["kind"] == "note"]
    assert any("step 6 changed nothing" in note and "2 of train.max_skipped_steps=2" in note for note in notes)


def test_one_such_step_too_many_ends_training_with_the_last_checkpoint_sound(tmp_path: Path, dataset_url: str) -> None:
    config = configure(tmp_path, dataset_url, "train.max_skipped_steps=1")
    for rank in run_ranks(2, train_with_a_bad_loss, config, [2, 7], 0):
        assert "train.max_skipped_steps=1: the gradient of step 7 is not finite" in rank["error"]
        assert rank["moved"] == {step: step != 2 for step in range(1, 7)}
    assert [line["rank"] for line in addresses(tmp_path)] == [0, 0]
    assert last_step(str(tmp_path)) == 4


def test_without_leave_to_skip_the_first_ends_training_and_its_batch_is_named(tmp_path: Path, dataset_url: str) -> None:
    for rank in run_ranks(2, train_with_a_bad_loss, configure(tmp_path, dataset_url), [6], 1):
        assert "loss is nan" in rank["error"]
    assert [(line["batch"], line["rank"]) for line in addresses(tmp_path)] == [(5, 1)]
    assert last_step(str(tmp_path)) == 4
