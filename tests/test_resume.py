"""Going on from a checkpoint: on other ranks, at another ZeRO stage, and never as another run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrurec_dist import collectives
from lrurec_dist.config_file import load_config
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import CatalogueError, CheckpointError
from lrurec_dist.train import pieces
from lrurec_dist.train.checkpoint import Progress, Subject, read_checkpoint_manifest
from lrurec_dist.train.checkpoint_index import Choice, find_checkpoint
from lrurec_dist.train.checkpoint_writer import CheckpointWriter
from lrurec_dist.train.subject import describe_subject, refuse_another_subject
from tests.datasets import chain_sequences, write_dataset
from tests.processes import run_ranks
from tests.test_checkpoint import SUBJECT
from tests.test_engine import NUM_ITEMS, as_arrays, build_engine, train_steps

STEPS = 4


def go_on(run: str, url: str, zero_stage: int, last: int) -> tuple[list[float], list[str]]:
    """Losses from where the run's newest checkpoint is to step `last`, and what was noted; leaves a checkpoint."""
    from lrurec_dist.train.resume import begin  # DeepSpeed only where a rank runs

    pieces._SPLIT_BYTES = 200  # so that small tables are split between ranks as large ones are
    config, dataset = load_config(None, [f"run_dir={run}", f"dataset.dir={url}"]), SequenceDataset(url)
    engine, group, notes = build_engine(zero_stage), collectives.new_group(), []
    subject = describe_subject(config, dataset, {"num_items": NUM_ITEMS})
    progress, damaged = begin(config, dataset, engine, None, subject, group, notes.append)
    losses, _ = train_steps(engine, progress.step, last)
    options = {"subject": subject, "keep": 2, "damaged": damaged, "group": group, "record": lambda *_, **__: None}
    with CheckpointWriter(run, **options) as writer:
        mine = pieces.pieces_of_rank(engine.tensors(), collectives.rank(), collectives.world_size())
        writer.save(mine, replace(progress, step=last, updates=engine.updates), None)
    return losses, notes


def uninterrupted() -> tuple[list[float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    engine = build_engine(0)
    losses, _ = train_steps(engine, 0, STEPS)
    return losses, as_arrays(engine.parameters()), as_arrays(engine.optimizer_state())


def alone(run: str, url: str, zero_stage: int, last: int) -> Any:
    return go_on(run, url, zero_stage, last), uninterrupted()


def test_a_run_goes_on_at_any_world_size_and_zero_stage_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    url = write_dataset(str(tmp_path / "data"), chain_sequences(64, NUM_ITEMS), NUM_ITEMS, shards=4).url
    run = str(tmp_path / "run")
    found = [run_ranks(2, go_on, run, url, 1, 1)[0]]
    one, (losses, parameters, moments) = run_ranks(1, alone, run, url, 2, 2)[0]
    found += [one, run_ranks(3, go_on, run, url, 0, 3)[0], run_ranks(2, go_on, run, url, 3, STEPS)[0]]
    assert [len(part) for part, _ in found] == [1, 1, 1, 1]
    assert [notes for _, notes in found] == [
        [],
        *([f"resuming from {run}/checkpoints/step_{step:06d}"] for step in (1, 2, 3)),
    ]
    assert [loss for part, _ in found for loss in part] == pytest.approx(losses, rel=1e-5)
    last = str(find_checkpoint(run, "last"))
    manifest = read_checkpoint_manifest(last)
    assert len(manifest["files"]) == 2
    assert len(manifest["tensors"]["table.weight"]["pieces"]) == 2
    with pieces.PieceReader(last, manifest["tensors"]) as reader:
        saved = {name: reader.read(name).numpy() for name in manifest["tensors"]}
    expected = {**parameters, **moments}
    assert saved.keys() == expected.keys()
    for name, value in expected.items():  # gradients are summed in another order, which Adam's division magnifies
        np.testing.assert_allclose(saved[name], value, rtol=2e-3, atol=2e-5, err_msg=name)


def refusal(manifest: dict[str, Any], subject: Subject) -> str:
    with pytest.raises((CheckpointError, CatalogueError)) as raised:
        refuse_another_subject("step_7", manifest, subject)
    return f"{raised.type.__name__}: {raised.value}"


def subject_of(*overrides: str) -> Subject:
    from lrurec_dist.config_file import shaping_settings

    return replace(SUBJECT, settings=shaping_settings(load_config(None, list(overrides))))


def manifest_of(subject: Subject) -> dict[str, Any]:
    return dict(vars(subject))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.dim=32", "model.dim=64 -> 32"),
        ("model.dropout=0.5", "model.dropout=0.2 -> 0.5"),
        ("loss.negatives=9", "loss.negatives=0 -> 9"),
        ("batch.max_length=20", "batch.max_length=50 -> 20"),
        ("seed=3", "seed=0 -> 3"),
        ("train.precision=bfloat16", "train.precision=float32 -> bfloat16"),
        ("train.learning_rate=1", "train.learning_rate=0.001 -> 1"),
        ("model.table=sharded train.table_optimizer=lazy_adam", "train.table_optimizer=adamw -> lazy_adam"),
        ("train.validate_every=7", "train.validate_every=500 -> 7"),
    ],
)
def test_a_run_with_another_setting_that_shapes_the_future_is_refused_by_its_name(override: str, named: str) -> None:
    message = refusal(manifest_of(subject_of()), subject_of(*override.split()))
    assert message.startswith("CheckpointError: checkpoint step_7 was trained with other settings")
    assert named in message
    assert "train.resume=never" in message


def test_settings_that_do_not_shape_the_future_may_change() -> None:
    changed = (
        "train.max_steps=900", "train.max_minutes=3", "train.patience=2", "train.report_every=7", "train.workers=5",
        "train.zero_stage=2", "train.keep_checkpoints=9", "train.checkpoint_every=3", "batch.feed=ray", "run_dir=elsewhere", "model.table=sharded",
    )  # fmt: skip
    refuse_another_subject("step_7", manifest_of(subject_of()), subject_of(*changed))


def test_a_setting_that_the_checkpoint_does_not_know_had_its_default() -> None:
    old = manifest_of(subject_of())
    old["settings"] = {name: value for name, value in old["settings"].items() if name != "model.temperature"}
    refuse_another_subject("step_7", old, subject_of())
    assert "model.temperature=0.0 -> 0.05" in refusal(old, subject_of("model.temperature=0.05"))


def test_other_data_is_refused() -> None:
    old = manifest_of(subject_of())
    assert "expects catalogue feed (7 items), the dataset has beef (9)" in refusal(
        old, replace(subject_of(), catalogue_fingerprint="beef", num_items=9)
    )
    assert "CheckpointError: checkpoint step_7 was trained on dataset cafe" in refusal(
        old, replace(subject_of(), dataset_identity="babe")
    )


@pytest.mark.parametrize(
    ("best", "recall", "since"),
    [((0.3, 200), 0.3, 2), ((0.2, 300), 0.2, 1), (None, -1.0, 0)],  # as it was; the best is lost; nothing validated is left
)
def test_the_best_and_the_patience_follow_what_is_whole(best: Any, recall: float, since: int) -> None:
    from lrurec_dist.train.resume import standing

    curve = [{"step": step, "recall@10": 0.1} for step in (100, 200, 300, 400)]
    progress = {"step": 450, "best_recall": 0.3, "validations_since_best": 2, "curve": curve}
    found = standing(Choice("step_450", {"progress": progress}, best, frozenset()))
    assert found == Progress(step=450, best_recall=recall, validations_since_best=since, curve=curve)
