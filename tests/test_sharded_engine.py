"""Training with a table that is spread over real processes: the curve, the metrics and the checkpoints of a replicated one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lrurec_dist import collectives
from lrurec_dist.config import Config
from lrurec_dist.config_file import load_config
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.data.splits import resolve_split
from lrurec_dist.errors import CheckpointError
from lrurec_dist.evaluate.evaluation import RankingProtocol, rank_shard
from lrurec_dist.evaluate.metrics import RankCounts
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.model.sharded_loss import sharded_softmax_loss
from lrurec_dist.model.sharded_table import ShardedItemTable
from lrurec_dist.train.checkpoint import checkpoint_url, load_model, read_checkpoint_manifest
from lrurec_dist.train.transfer import iter_step_batches
from tests.datasets import chain_sequences, write_dataset
from tests.processes import run_ranks
from tests.test_engine import CPU, NUM_ITEMS, rank_batches

MORE_ITEMS = 31
KS = [1, 5, 10]
OPTIONS = [
    "model.dim=8",
    "model.hidden=8",
    "model.dropout=0",  # masks are a function of the rank
    "batch.global_batch_size=10",  # three ranks have unequal parts of it
    "batch.max_length=8",
    "batch.shards_mixed=2",
    "evaluate.batch_size=7",
    "evaluate.ks=[1,5,10]",
    "train.clip_norm=0.4",  # low enough to bite
    "train.learning_rate=0.01",
    "train.report_every=1",
    "train.patience=100",
]
SHARDED = "model.table=sharded"
# name: settings of a run; each is computed by one process and three, sharded, and by one process, replicated
CURVES: dict[str, list[str]] = {
    "full softmax": ["train.max_steps=50", "train.validate_every=25", "train.validate_lists=true"],
    "sampled softmax": [
        "train.max_steps=10",
        "train.validate_every=10",
        "loss.negatives=20",
        "model.temperature=0.5",
        "train.zero_stage=2",
        "train.accumulation=3",
    ],
    "many options": [
        "train.max_steps=10",
        "train.validate_every=10",
        "loss.include_padding_class=true",
        "model.temperature=0.5",
        "train.precision=bfloat16",
        "train.activation_checkpointing=true",
        "train.zero_stage=0",
        "train.accumulation=2",
        "train.schedule=cosine",
        "train.warmup_steps=3",
        "batch.windows=carried",
    ],
}
LAZY = ("lazy_adam", "rowwise_adagrad")  # of a sharded table only
TIMEOUT_S = 900


def configure(place: Path, run: str, *overrides: str, data: str = "data") -> Config:
    return load_config(None, [f"run_dir={place / run}", f"dataset.dir={place / data}", *OPTIONS, *overrides])


def run_training(*configs: Config) -> None:
    from lrurec_dist.train.loop import train  # DeepSpeed only where a rank runs

    for config in configs:
        train(config, CPU, lambda _: None)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """Runs of two, one, three and again two processes, each in a directory of its name; what two ranks refused to load."""
    place = tmp_path_factory.mktemp("sharded")
    # of three ranks one has nobody to rank, and the other two have unequal numbers of batches
    walks = [walk if i % 2 or i < 30 else walk[:2] for i, walk in enumerate(chain_sequences(100, NUM_ITEMS))]
    write_dataset(str(place / "data"), walks, NUM_ITEMS, shards=2)
    write_dataset(str(place / "more"), chain_sequences(100, MORE_ITEMS), MORE_ITEMS, shards=2)

    def moved(steps: int, *overrides: str) -> Config:
        return configure(place, "moved", *CURVES["full softmax"], f"train.max_steps={steps}", *overrides)

    def lazy(kind: str, run: str, steps: int) -> Config:
        settings = [SHARDED, f"train.table_optimizer={kind}", "loss.negatives=20", "train.validate_every=5"]
        return configure(place, f"{kind}, {run}", *settings, f"train.max_steps={steps}")

    def warm(run: str, *overrides: str) -> Config:
        settings = [f"train.warm_start={place / 'moved'}", "train.max_steps=4", "train.validate_every=4", *overrides]
        return configure(place, f"warm, {run}", *settings, data="more")

    def curves(run: str, *overrides: str) -> list[Config]:
        return [configure(place, f"{name}, {run}", *settings, *overrides) for name, settings in CURVES.items()]

    refusals = run_ranks(2, spoil_load_and_train, moved(27), timeout_s=TIMEOUT_S)
    alone = [*curves("replicated"), *curves("1", SHARDED), *(lazy(kind, "1", 15) for kind in LAZY), warm("replicated")]
    run_ranks(1, run_training, *alone, moved(33, SHARDED), timeout_s=TIMEOUT_S)
    spread = [*curves("3", SHARDED), *(lazy(kind, "3", 10) for kind in LAZY), warm("3", SHARDED)]
    run_ranks(3, run_training, *spread, moved(41, SHARDED), timeout_s=TIMEOUT_S)
    run_ranks(2, run_training, moved(50), *(lazy(kind, "3", 15) for kind in LAZY), timeout_s=TIMEOUT_S)
    return place, refusals


@pytest.fixture(scope="module")
def place(found: tuple[Path, list[list[str]]]) -> Path:
    return found[0]


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for line in (run / "metrics.jsonl").read_text().splitlines() if (record := json.loads(line))["kind"] == kind]


def curve(run: Path) -> np.ndarray:
    """(steps, 2): loss and gradient norm of each step."""
    return np.array([(record["loss"], record["gradient_norm"]) for record in records(run, "train")])


@pytest.mark.parametrize("run", ["1", "3"])
@pytest.mark.parametrize("name", CURVES)
def test_losses_and_norms_are_those_of_one_process_with_the_whole_table(place: Path, name: str, run: str) -> None:
    expected, found = curve(place / f"{name}, replicated"), curve(place / f"{name}, {run}")
    assert len(expected) == (50 if name == "full softmax" else 10)
    assert expected[-1, 0] < expected[0, 0]
    assert (expected[:, 1] > 0.4).all(), "every gradient was clipped"
    # sums of float32 in another order; where factors are rounded to bfloat16, a last bit of theirs now and then
    np.testing.assert_allclose(found, expected, rtol=1e-2 if name == "many options" else 1e-5)


@pytest.mark.parametrize("kind", LAZY)
def test_lazy_optimizers_go_on_from_three_ranks_on_two_as_one_process_would_have(place: Path, kind: str) -> None:
    expected, found = curve(place / f"{kind}, 1"), curve(place / f"{kind}, 3")
    assert len(expected) == 15
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_checkpoint_goes_on_in_any_mode_and_at_any_world_size(place: Path) -> None:
    notes = [record["text"] for record in records(place / "moved", "note")]
    resumed = [note.rpartition("/")[2] for note in notes if note.startswith("resuming from")]
    assert resumed == [
        "step_000027",
        "step_000033",
        "step_000041",
    ]  # left by 2 replicated, 1 sharded, 3 sharded; then 2 replicated
    np.testing.assert_allclose(curve(place / "moved"), curve(place / "full softmax, replicated"), rtol=1e-5)


def test_each_rank_writes_the_rows_it_holds_and_no_others(place: Path) -> None:
    tensors = read_checkpoint_manifest(checkpoint_url(str(place / "full softmax, 3"), 50))["tensors"]
    table = {name: entry for name, entry in tensors.items() if name.rpartition("/")[2].startswith("table.")}
    assert sorted(table) == sorted(
        f"{kind}table.{name}" for kind in ("", "exp_avg/", "exp_avg_sq/") for name in ("weight", "bias")
    )
    for entry in table.values():
        assert entry["shape"][0] == NUM_ITEMS + 1
        assert [piece["rows"] for piece in entry["pieces"]] == [[rank, NUM_ITEMS + 1, 3] for rank in range(3)]
    adagrad = read_checkpoint_manifest(checkpoint_url(str(place / "rowwise_adagrad, 3"), 15))["tensors"]
    assert adagrad["sum_sq/table.weight"]["shape"] == [NUM_ITEMS + 1]
    assert "exp_avg/table.weight" not in adagrad


def metrics_of(run: Path, record: Mapping[str, Any]) -> dict[str, float]:
    """What one process counts that loads the checkpoint of a validation whole, as evaluation and serving do."""
    dataset = SequenceDataset(str(run.parent / "data"))
    protocol = RankingProtocol(
        split=resolve_split(dataset, kind="leave_last_out", train_until="", test_from=""),
        part="validation",
        max_length=8,
        batch_size=7,
        exclude_history=True,
        deepest=10,
        list_k=10,
    )
    counts, listed = RankCounts(10), torch.zeros(NUM_ITEMS + 1, dtype=torch.bool)
    model = load_model(checkpoint_url(str(run), record["step"]))
    for name in dataset.shard_names:
        counts.counts += rank_shard(model, dataset.read_shard(name), protocol, listed).counts
    coverage = {"coverage@10": int(listed[1:].sum()) / NUM_ITEMS} if "coverage@10" in record else {}
    return {"users": counts.users, **counts.metrics(KS), **coverage}


@pytest.mark.parametrize("name", ["full softmax", "sampled softmax"])  # the other one is ranked with products in bfloat16
def test_metrics_of_a_validation_on_three_ranks_are_the_figures_of_its_checkpoint_ranked_whole(place: Path, name: str) -> None:
    run = place / f"{name}, 3"
    validations = records(run, "validation")
    assert [record["step"] for record in validations] == ([25, 50] if name == "full softmax" else [10])
    for record in validations:
        expected = metrics_of(run, record)
        assert 30 < expected["users"] < 86
        assert {key: record[key] for key in expected} == expected
        assert ("coverage@10" in expected) == (name == "full softmax")
    replicated = records(place / f"{name}, replicated", "validation")
    kept = ("step", "users", "recall@1", "recall@5", "recall@10", "ndcg@10")
    assert [[record[key] for key in kept] for record in validations] == [[record[key] for key in kept] for record in replicated]


def test_a_warm_start_gives_new_items_the_rows_that_a_replicated_table_would_give_them(place: Path) -> None:
    replicated, spread = curve(place / "warm, replicated"), curve(place / "warm, 3")
    assert len(replicated) == 4
    np.testing.assert_allclose(spread, replicated, rtol=1e-5)
    (note,) = (record["text"] for record in records(place / "warm, 3", "note") if "warm start from" in record["text"])
    assert "25 items keep their rows, 6 are new; with moments" in note


def spoil_one_update(zero_stage: int) -> None:
    """Three updates of which the second is not finite on the last rank, beside two that are."""
    engines = [build(zero_stage) for _ in range(2)]
    for number, steps in enumerate(([0, 1], [0, 3, 1])):
        for step in steps:
            (batch,) = iter_step_batches(rank_batches(step, step + 1), accumulation=1, device=CPU)
            micro = batch.micro_batches[0]
            loss = engines[number](loss_of, engines[number].model, micro)
            spoilt = step == 3 and collectives.rank() == collectives.world_size() - 1
            engines[number].backward(loss * torch.nan if spoilt else loss, batch.num_targets)
            assert engines[number].update().skipped.item() == float(step == 3)
    sound, other = ({piece.name: piece.values for piece in engine.pieces()} for engine in engines)
    assert "exp_avg/table.weight" in sound
    assert sound.keys() == other.keys()
    assert all(torch.equal(sound[name], other[name]) for name in sound)


def loss_of(model: LRURec, micro: Any) -> torch.Tensor:
    vectors = model(micro.item_ids, micro.keep, micro.kept)
    assert isinstance(model.table, ShardedItemTable)
    return sharded_softmax_loss(vectors, model.table, micro.targets, include_padding_class=True)[0]


def build(zero_stage: int) -> Any:
    from lrurec_dist.train.deepspeed_config import derive
    from lrurec_dist.train.sharded_engine import ShardedEngine

    torch.manual_seed(5)
    table = ShardedItemTable(NUM_ITEMS, 8, seed=5)
    return ShardedEngine(
        LRURec(num_items=NUM_ITEMS, dim=8, hidden=8, blocks=1, dropout=0.0, table=table),
        table,
        table_optimizer="adamw",
        device=CPU,
        config=derive(device=CPU, zero_stage=zero_stage),
        learning_rate=0.01,
        weight_decay=0.1,
        decay_recurrence=False,
        epsilon=1e-9,
        clip_norm=0.3,
    )


def load_foreign() -> list[str]:
    """What is said about a checkpoint of another optimizer, and of the whole table."""
    engine = build(1)
    table = {f"table.{name}": value.detach().clone() for name, value in engine.model.table.named_parameters()}
    parameters, moments = {**engine.parameters(), **table}, engine.optimizer_state()
    engine.load(parameters, None, 0)
    moments |= {f"{moment}/table.weight": table["table.weight"] for moment in ("exp_avg", "exp_avg_sq")}
    found = []
    for arguments in ((parameters, moments, 1), ({**parameters, "table.bias": torch.zeros(NUM_ITEMS + 1)}, None, 1)):
        with pytest.raises(CheckpointError) as caught:
            engine.load(*arguments)
        found.append(str(caught.value))
    return found


def spoil_load_and_train(config: Config) -> list[str]:
    for zero_stage in (0, 1, 2):
        spoil_one_update(zero_stage)
    run_training(config)
    return load_foreign()


def test_a_skipped_update_leaves_rows_alone_and_state_that_does_not_fit_is_refused(found: tuple[Path, list[list[str]]]) -> None:
    for other_optimizer, whole_table in found[1]:  # the first part is asserted on the ranks
        assert "exp_avg/table.bias is not in the checkpoint, which another train.table_optimizer wrote" in other_optimizer
        assert "parameter table.bias (13,) is not in both checkpoint and model" in whole_table
