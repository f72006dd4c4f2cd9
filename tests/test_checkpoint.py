"""Checkpoints: what is kept, what is refused."""

from pathlib import Path

import pytest
import torch

from lrurec_dist import storage
from lrurec_dist.errors import CatalogueError, CheckpointError
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.train.checkpoint import Progress, checkpoint_url, find_checkpoint, load_checkpoint, load_model, save_checkpoint

SHAPE = {"num_items": 7, "dim": 4, "hidden": 6, "blocks": 1, "dropout": 0.2, "ring": [0.8, 0.99]}


def save_step(run: str, step: int, *, is_best: bool) -> LRURec:
    torch.manual_seed(step)
    model = LRURec(**SHAPE)
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    save_checkpoint(
        run,
        progress=Progress(step=step, epoch=2, batches_into_epoch=5, best_recall=0.25, curve=[{"step": step, "recall@10": 0.25}]),
        parameters=parameters,
        moments={f"exp_avg/{name}": value + 1 for name, value in parameters.items()},
        description={"model": SHAPE, "catalogue_fingerprint": "feed"},
        is_best=is_best,
    )
    return model


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    model = save_step(str(tmp_path), 500, is_best=True)
    url = find_checkpoint(str(tmp_path), "best")
    assert url == checkpoint_url(str(tmp_path), 500)
    progress, parameters, moments = load_checkpoint(url, catalogue_fingerprint="feed")
    assert (progress.step, progress.epoch, progress.batches_into_epoch, progress.best_recall) == (500, 2, 5, 0.25)
    for name, value in model.named_parameters():
        assert torch.equal(parameters[name], value)
        assert torch.equal(moments[f"exp_avg/{name}"], value + 1)
    item_ids = torch.tensor([[1, 2, 3]])
    loaded = load_model(url)
    assert not loaded.training
    assert torch.equal(loaded.encode(item_ids), model.eval().encode(item_ids))


def test_only_the_best_and_the_last_are_kept(tmp_path: Path) -> None:
    run = str(tmp_path)
    save_step(run, 100, is_best=True)
    save_step(run, 200, is_best=True)
    save_step(run, 300, is_best=False)
    save_step(run, 400, is_best=False)
    assert find_checkpoint(run, "best") == checkpoint_url(run, 200)
    assert find_checkpoint(run, "last") == checkpoint_url(run, 400)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["index.json", "step_000200", "step_000400"]


def test_without_checkpoints_none_is_found(tmp_path: Path) -> None:
    assert find_checkpoint(str(tmp_path), "best") is None
    assert find_checkpoint(str(tmp_path), "last") is None


def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    save_step(str(tmp_path), 1, is_best=True)
    file = Path(checkpoint_url(str(tmp_path), 1)) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="changed after the commit"):
        load_model(str(file.parent))


def test_a_checkpoint_without_manifest_is_refused(tmp_path: Path) -> None:
    save_step(str(tmp_path), 1, is_best=True)
    url = checkpoint_url(str(tmp_path), 1)
    (Path(url) / storage.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="never committed"):
        load_checkpoint(url, catalogue_fingerprint="feed")


def test_a_checkpoint_of_another_catalogue_is_refused(tmp_path: Path) -> None:
    save_step(str(tmp_path), 1, is_best=True)
    with pytest.raises(CatalogueError, match="expects catalogue feed, the dataset has beef"):
        load_checkpoint(checkpoint_url(str(tmp_path), 1), catalogue_fingerprint="beef")
