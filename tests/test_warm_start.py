"""Beginning with the parameters of another run, whose catalogue was smaller."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lrurec_dist import collectives
from lrurec_dist.config_file import load_config
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import CatalogueError, CheckpointError, DataNotReadyError
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.train.checkpoint import Progress, Subject, load_model, read_checkpoint_manifest, write_manifest
from lrurec_dist.train.checkpoint_index import find_checkpoint, keep_checkpoints
from lrurec_dist.train.pieces import PieceReader, pieces_of_rank
from lrurec_dist.train.subject import describe_subject
from tests.datasets import chain_sequences, write_dataset
from tests.processes import run_ranks
from tests.test_checkpoint import change_a_byte, checkpoint_url, write_pieces

KNOWN, NEW, SEED = 25, 400, 11
SHAPE = {"num_items": KNOWN, "dim": 8, "hidden": 8, "blocks": 2, "dropout": 0.0, "temperature": 0.0}


@pytest.fixture
def today(tmp_path: Path) -> SequenceDataset:
    return write_dataset(str(tmp_path / "today"), chain_sequences(30, KNOWN), KNOWN + NEW, shards=2)


@pytest.fixture
def yesterday(tmp_path: Path) -> str:
    """The run directory of a run whose best checkpoint is at step 300 after a warm start of its own."""
    dataset = write_dataset(str(tmp_path / "yesterday"), chain_sequences(30, KNOWN), KNOWN, shards=2)
    run = str(tmp_path / "run")
    torch.manual_seed(1)
    for step, recall in ((300, 0.3), (400, 0.2)):
        named = [(name, value.detach() + 0.1) for name, value in LRURec(**SHAPE).named_parameters()]
        tensors = named + [(f"{moment}/{name}", value.abs() + 1) for moment in ("exp_avg", "exp_avg_sq") for name, value in named]
        written = write_pieces(checkpoint_url(run, step), [pieces_of_rank(tensors, rank, 2) for rank in range(2)])
        subject = Subject(
            model=SHAPE,
            num_items=KNOWN,
            catalogue_fingerprint=dataset.catalogue.fingerprint,
            dataset_identity=dataset.identity,
            settings={},
        )
        progress = Progress(step=step, epoch=3, updates=step + 50, best_recall=0.3)
        write_manifest(checkpoint_url(run, step), subject=subject, progress=progress, validation={"recall@10": recall}, **written)
        keep_checkpoints(run, step, recall, latest=2, damaged=frozenset())
    return run


def start(run: str, url: str, warm_from: str, zero_stage: int, moments: bool, vectors: str = "", **shape: Any) -> dict[str, Any]:
    from lrurec_dist.train.deepspeed_config import derive
    from lrurec_dist.train.engine import Engine  # DeepSpeed only where a rank runs
    from lrurec_dist.train.resume import begin

    torch.manual_seed(7)
    overrides = [f"run_dir={run}", f"dataset.dir={url}", f"seed={SEED}", f"train.warm_start={warm_from}"]
    overrides += [f"train.new_item_vectors={vectors}"] if vectors else []
    config, dataset = load_config(None, [*overrides, f"train.warm_start_moments={moments}"]), SequenceDataset(url)
    model = {**SHAPE, "num_items": dataset.num_items, **shape}
    engine = Engine(
        LRURec(**model),
        device=torch.device("cpu"),
        config=derive(
            device=torch.device("cpu"),
            zero_stage=zero_stage,
            accumulation=1,
            offload_optimizer="none",
            offload_parameters="none",
            extras={},
        ),
        learning_rate=0.01,
        weight_decay=0.1,
        decay_recurrence=False,
        epsilon=1e-9,
        clip_norm=1.0,
    )
    notes: list[str] = []
    progress, _ = begin(
        config, dataset, engine, None, describe_subject(config, dataset, model), collectives.new_group(), notes.append
    )
    arrays = {name: tensor.numpy().copy() for name, tensor in engine.tensors()}
    counts = {float(state["step"]) for state in engine._inner.state.values()}
    return {"progress": progress, "tensors": arrays, "counts": counts, "notes": notes}


def both(run: str, url: str, warm_from: str, vectors: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return start(run, url, warm_from, 1, True, vectors), start(run, url, f"{warm_from}/checkpoints/step_000400", 2, False)


def scores(model: LRURec, histories: torch.Tensor) -> torch.Tensor:
    return model.encode(histories) @ model.item_rows()[: KNOWN + 1].T + model.table.bias[: KNOWN + 1]


def test_known_items_score_as_before_to_the_bit_and_new_ones_look_like_them(
    tmp_path: Path, yesterday: str, today: SequenceDataset
) -> None:
    given, keys = np.full((3, SHAPE["dim"]), 0.125), today.catalogue.keys_of(np.array([1, KNOWN + 2, KNOWN + NEW]))
    pq.write_table(pa.table({"item_key": keys, "vector": list(given)}), tmp_path / "vectors.parquet")
    found = run_ranks(2, both, str(tmp_path / "new"), today.url, yesterday, str(tmp_path / "vectors.parquet"))
    warm, without = found[0]
    for one, other in zip(warm["tensors"].values(), found[1][0]["tensors"].values(), strict=True):
        np.testing.assert_array_equal(one, other)
    before = load_model(str(find_checkpoint(yesterday, "best")))
    after = LRURec(**{**SHAPE, "num_items": KNOWN + NEW}).eval()
    names = {name for name, _ in after.named_parameters()}
    after.load_state_dict({name: torch.from_numpy(value) for name, value in warm["tensors"].items() if name in names})
    histories = torch.randint(1, KNOWN + 1, (6, 5), generator=torch.Generator().manual_seed(0))
    assert torch.equal(scores(after, histories), scores(before, histories))

    for name in ("table.weight", "table.bias"):
        table = warm["tensors"][name]
        known, new = table[1 : KNOWN + 1], table[KNOWN + 1 :]
        assert len(new) == NEW
        # 400 draws: a mean within 5 standard errors, and a standard deviation within 5 of its own
        assert np.all(np.abs(new.mean(0) - known.mean(0)) < 5 * known.std(0) / NEW**0.5)
        np.testing.assert_allclose(new.std(0), known.std(0), rtol=5 / (2 * NEW) ** 0.5)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert warm["tensors"][f"{moment}/{name}"][: KNOWN + 1].min() >= 1
            assert not warm["tensors"][f"{moment}/{name}"][KNOWN + 1 :].any()
    # Adam has to know that its moments are of many updates, not of the first
    assert (warm["progress"], warm["counts"]) == (Progress(updates=350), {350.0})
    np.testing.assert_array_equal(warm["tensors"]["table.weight"][[KNOWN + 2, KNOWN + NEW]], given[:2])
    assert "25 items keep their rows, 400 are new, 2 of them with given rows; with moments" in warm["notes"][0]

    assert (without["progress"], without["counts"]) == (Progress(), {0.0})
    assert not any(value.any() for name, value in without["tensors"].items() if "/" in name)
    second = checkpoint_url(yesterday, 400)
    with PieceReader(second, read_checkpoint_manifest(second)["tensors"]) as reader:
        np.testing.assert_array_equal(without["tensors"]["table.weight"][: KNOWN + 1], reader.read("table.weight"))


def warm(tmp_path: Path, dataset: SequenceDataset, warm_from: str, **shape: Any) -> None:
    """The way to an error: nothing of the engine is needed before it."""
    from lrurec_dist.train.warm_start import warm_start

    config = load_config(None, [f"run_dir={tmp_path / 'new'}", f"train.warm_start={warm_from}"])
    subject = describe_subject(config, dataset, {**SHAPE, **shape})
    warm_start(config, dataset, None, subject, None, print)  # type: ignore[arg-type]


def test_a_catalogue_that_does_not_extend_the_known_one_is_refused_with_numbers(tmp_path: Path, yesterday: str) -> None:
    smaller = write_dataset(str(tmp_path / "smaller"), chain_sequences(30, 20), 20)
    with pytest.raises(
        CatalogueError, match=rf"train\.warm_start={yesterday}: knows 25 items, .*smaller has 20: it does not extend"
    ):
        warm(tmp_path, smaller, yesterday)
    as_large = write_dataset(str(tmp_path / "other"), chain_sequences(30, 30), 30)
    table = as_large.catalogue.table
    keys = table["item_key"].to_pylist()
    keys[3], keys[4] = keys[4], keys[3]  # two known items have changed places
    swapped = table.set_column(table.schema.get_field_index("item_key"), "item_key", [keys])
    as_large.catalogue = type(as_large.catalogue)(swapped)  # type: ignore[misc]
    with pytest.raises(
        CatalogueError, match=r"its 25 items have fingerprint [0-9a-f]{16}, the first 25 of the 30 in .* have [0-9a-f]{16}"
    ):
        warm(tmp_path, as_large, yesterday)


def test_another_shape_is_refused_by_its_name(tmp_path: Path, yesterday: str, today: SequenceDataset) -> None:
    with pytest.raises(CheckpointError, match=r"was trained with model\.dim=8, this run has 16; set model\.dim=8"):
        warm(tmp_path, today, yesterday, dim=16)


def test_a_damaged_or_missing_checkpoint_is_refused(tmp_path: Path, yesterday: str, today: SequenceDataset) -> None:
    change_a_byte(checkpoint_url(yesterday, 300))
    with pytest.raises(CheckpointError, match=r"train\.warm_start=.*changed after the commit"):
        warm(tmp_path, today, yesterday)
    with pytest.raises(DataNotReadyError, match="is neither a checkpoint nor a run directory with one"):
        warm(tmp_path, today, str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        warm(tmp_path, today, today.url)
