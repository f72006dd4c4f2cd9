"""Optimizer steps under real DeepSpeed on real processes, compared across world sizes, ZeRO stages and accumulation."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lrurec_dist import PAD_ID, collectives
from lrurec_dist.data.batches import TrainingBatch
from lrurec_dist.errors import CheckpointError
from lrurec_dist.model.loss import softmax_loss
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.train.transfer import iter_step_batches
from tests.processes import run_ranks

NUM_ITEMS = 25
CPU = torch.device("cpu")
# Rows of each global batch. One row: of four ranks three have no target, and of three micro-batches two.
ROWS = (10, 3, 1, 7)
ALL_PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # small parameters too

# What has to come out the same, whatever computes it: (ZeRO stage, accumulation, more of DeepSpeed's JSON)
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    **{f"zero {stage}, {parts} parts": (stage, parts, {}) for stage in (0, 1, 2, 3) for parts in (1, 3)},
    "zero 3, all partitioned": (3, 2, ALL_PARTITIONED),
}

Found = tuple[list[float], list[float], dict[str, np.ndarray], dict[str, np.ndarray]]


def build_engine(
    zero_stage: int,
    accumulation: int = 1,
    extras: dict[str, Any] | None = None,
    *,
    dim: int = 8,
    clip_norm: float = 0.3,  # low enough to bite, so that a norm taken per rank would show
    offload: bool = False,
) -> Any:
    from lrurec_dist.train.deepspeed_config import derive  # DeepSpeed only where a rank runs
    from lrurec_dist.train.engine import Engine

    torch.manual_seed(5)
    config = derive(device=CPU, zero_stage=zero_stage, accumulation=accumulation, extras=extras)
    if offload:  # refused on a CPU, where there is nothing to gain; how it works can be tried there all the same
        zero = config["zero_optimization"]
        zero.pop("compute_grad_norm", None)
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        if zero_stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    return Engine(
        LRURec(num_items=NUM_ITEMS, dim=dim, hidden=8, blocks=2, dropout=0.0),
        device=CPU,
        config=config,
        learning_rate=0.01,
        weight_decay=0.1,
        decay_recurrence=False,
        epsilon=1e-9,
        clip_norm=clip_norm,
    )


def rank_batches(first: int, last: int) -> Iterator[TrainingBatch]:
    """This rank's slices of the global batches first..last-1: rows of 1 to 6 items, each item followed by the next."""
    rank, world_size = collectives.rank(), collectives.world_size()
    for number, rows in list(enumerate(ROWS))[first:last]:
        draw = np.random.default_rng(number)
        starts, lengths = draw.integers(1, NUM_ITEMS, rows), draw.integers(1, 7, rows)
        walks = (starts[:, None] + np.arange(6)) % NUM_ITEMS + 1
        padding = np.arange(6) < 6 - lengths[:, None]
        item_ids, targets = np.where(padding, PAD_ID, walks), np.where(padding, PAD_ID, walks % NUM_ITEMS + 1)
        mine = slice(rows * rank // world_size, rows * (rank + 1) // world_size)
        yield TrainingBatch(item_ids[mine], targets[mine], int((~padding).sum()), 0, 0, number)


def train_steps(engine: Any, first: int = 0, last: int = len(ROWS), spoil: int = -1) -> tuple[list[float], list[Any]]:
    """Mean losses of the global batches and what each update did; of batch `spoil` the last rank's loss is NaN."""

    def loss(micro: Any) -> torch.Tensor:
        table = engine.model.table
        vectors = engine.model(micro.item_ids, micro.keep, micro.kept)
        return softmax_loss(vectors, table.weight, table.bias, micro.targets, include_padding_class=True)[0]

    losses, updates = [], []
    batches = iter_step_batches(rank_batches(first, last), accumulation=engine.accumulation, device=CPU)
    for number, batch in enumerate(batches, start=first):
        total = torch.zeros(())
        for micro in batch.micro_batches:
            part = engine(loss, micro)
            if number == spoil and collectives.rank() == collectives.world_size() - 1:
                part = part * torch.nan
            total += part.detach()
            engine.backward(part, batch.num_targets)
        updates.append(engine.update())
        losses.append(collectives.all_reduce_sum(total).item() / batch.num_targets)
    return losses, updates


def as_arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def run_case(zero_stage: int, accumulation: int, extras: dict[str, Any], offload: bool = False) -> Found:
    """Losses, gradient norms, first moments after the first update (a tenth of its gradient), parameters at the end."""
    engine = build_engine(zero_stage, accumulation, extras, offload=offload)
    losses, updates = train_steps(engine, 0, 1)
    gradient = as_arrays({name: value for name, value in engine.optimizer_state().items() if name.startswith("exp_avg/")})
    more_losses, more_updates = train_steps(engine, 1)
    norms = [update.norm.item() for update in updates + more_updates]
    return losses + more_losses, norms, gradient, as_arrays(engine.parameters())


def run_cases(names: list[str]) -> dict[str, Found]:
    return {name: run_case(*CASES[name]) for name in names}


@pytest.fixture(scope="module")
def one_process() -> dict[str, Found]:
    return run_ranks(1, run_cases, list(CASES))[0]


@pytest.fixture(scope="module")
def alone(one_process: dict[str, Found]) -> Found:
    """One process, nothing partitioned, whole batches: the truth."""
    return one_process["zero 0, 1 parts"]


def assert_same(found: Found, expected: Found) -> None:
    for mine, theirs in zip(found[:2], expected[:2], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    for which, (rtol, atol) in {
        # a gradient is a sum of float32 products, taken in another order
        2: (1e-4, 1e-8),
        # and Adam's division magnifies what differs
        3: (2e-3, 2e-5),
    }.items():
        assert found[which].keys() == expected[which].keys()  # type: ignore[union-attr]
        for name, value in expected[which].items():  # type: ignore[union-attr]
            np.testing.assert_allclose(found[which][name], value, rtol=rtol, atol=atol, err_msg=name)  # type: ignore[call-overload]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])  # 3 divides neither the batch nor the parameters
def test_losses_gradients_and_parameters_depend_on_neither_ranks_nor_stage_nor_parts(
    one_process: dict[str, Found], alone: Found, world_size: int
) -> None:
    assert alone[0][-1] < alone[0][0]
    for found in [one_process] if world_size == 1 else run_ranks(world_size, run_cases, list(CASES)):
        for name in CASES:
            assert_same(found[name], alone)


def run_offloaded() -> list[Found]:
    return [run_case(stage, 2, {}, offload=True) for stage in (1, 2, 3)]


def test_offloading_changes_nothing_but_where_things_lie(alone: Found) -> None:
    for found in run_ranks(2, run_offloaded)[0]:
        assert_same(found, alone)


def count_resident() -> tuple[int, int]:
    engine = build_engine(3, 1, ALL_PARTITIONED)
    train_steps(engine, 0, 1)
    return sum(p.numel() for p in engine.model.parameters()), sum(p.size for p in as_arrays(engine.parameters()).values())


def test_stage_3_leaves_no_whole_parameter_on_a_rank_between_updates() -> None:
    resident, whole = run_ranks(2, count_resident)[0]
    assert resident == 0 < whole


Saved = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


def save_half_way(zero_stage: int) -> Saved:
    engine = build_engine(zero_stage)
    train_steps(engine, 0, 2)
    everything = {name: tensor.clone() for name, tensor in engine.tensors()}
    parameters, moments = engine.parameters(), engine.optimizer_state()
    assert list(everything) == [*parameters, *moments]
    assert all(torch.equal(everything[name], tensor) for name, tensor in {**parameters, **moments}.items())
    return as_arrays(parameters), as_arrays(moments)


GOING_ON = [(0, None), (1, None), (2, None), (3, None), (3, ALL_PARTITIONED)]


def go_on(saved: Saved) -> list[tuple[list[float], dict[str, np.ndarray]]]:
    found = []
    for zero_stage, extras in GOING_ON:
        engine = build_engine(zero_stage, extras=extras)
        train_steps(engine, 3, 4)  # moments and weights of its own, all to be replaced
        engine.load(*({name: torch.from_numpy(value) for name, value in part.items()} for part in saved), step=2)
        found.append((train_steps(engine, 2)[0], as_arrays(engine.parameters())))
    return found


@pytest.mark.parametrize(("saved_at", "world_size"), [(1, 1), (3, 3)])
def test_state_saved_on_two_ranks_goes_on_anywhere(alone: Found, saved_at: int, world_size: int) -> None:
    saved = run_ranks(2, save_half_way, saved_at)[0]
    for rank_found in run_ranks(world_size, go_on, saved):
        for losses, parameters in rank_found:
            assert losses == pytest.approx(alone[0][2:], rel=1e-5)
            for name, value in alone[3].items():
                np.testing.assert_allclose(parameters[name], value, rtol=2e-3, atol=2e-5, err_msg=name)


def load_foreign() -> str:
    engine = build_engine(1)
    foreign = build_engine(1, dim=4)
    try:
        engine.load(foreign.parameters(), foreign.optimizer_state(), step=1)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_state_of_another_model_is_refused() -> None:
    assert "is not in both checkpoint and model" in run_ranks(1, load_foreign)[0]


def one_update(zero_stage: int, clip_norm: float, outside_sq_norm: float) -> tuple[float, float, dict[str, np.ndarray]]:
    engine = build_engine(zero_stage, clip_norm=clip_norm)
    batch = next(iter_step_batches(rank_batches(0, 1), accumulation=1, device=CPU))
    micro = batch.micro_batches[0]

    def loss() -> torch.Tensor:
        table = engine.model.table
        vectors = engine.model(micro.item_ids, micro.keep)
        return softmax_loss(vectors, table.weight, table.bias, micro.targets, include_padding_class=False)[0]

    engine.backward(engine(loss), batch.num_targets)
    clipped = engine.update(outside_sq_norm)
    return clipped.norm.item(), clipped.factor.item(), as_arrays(engine.optimizer_state())


def update_with_and_without() -> None:
    for zero_stage in (0, 1, 2, 3):
        check_outside_norm(zero_stage)


def check_outside_norm(zero_stage: int) -> None:
    inside, factor, _ = one_update(zero_stage, 1e9, 0.0)
    assert factor == 1.0
    outside = 3 * inside
    norm, factor, moments = one_update(zero_stage, inside, outside**2)
    assert norm == pytest.approx(inside * 10**0.5, rel=1e-6)
    assert factor == pytest.approx(10**-0.5, rel=1e-6)
    smaller_norm, smaller_factor, expected = one_update(zero_stage, inside * 10**-0.5, 0.0)
    assert smaller_norm == pytest.approx(inside, rel=1e-6)
    assert smaller_factor == pytest.approx(factor, rel=1e-6)
    for name, value in expected.items():
        np.testing.assert_allclose(moments[name], value, rtol=1e-5, atol=1e-12, err_msg=name)


def test_a_gradient_kept_elsewhere_counts_in_the_norm_that_clips() -> None:
    run_ranks(2, update_with_and_without)


def skip_and_go_on() -> None:
    for zero_stage, accumulation in itertools.product((0, 1, 2, 3), (1, 2)):
        engine, sound = build_engine(zero_stage, accumulation), build_engine(zero_stage, accumulation)
        train_steps(engine, 0, 1)
        before = {name: tensor.clone() for name, tensor in engine.tensors()}
        _, (update,) = train_steps(engine, 3, 4, spoil=3)
        assert update.skipped.item() == 1
        assert not update.norm.isfinite()
        assert all(torch.equal(before[name], tensor) for name, tensor in engine.tensors()), zero_stage
        _, (update,) = train_steps(engine, 1, 2)
        assert update.skipped.item() == 0
        train_steps(sound, 0, 2)
        expected = dict(sound.tensors())
        # to the bit: the step count, too, is that of a run which never saw the spoilt batch
        assert all(torch.equal(expected[name], tensor) for name, tensor in engine.tensors()), zero_stage


def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any() -> None:
    run_ranks(2, skip_and_go_on)


def norms_at(rates: list[float]) -> list[float]:
    engine = build_engine(1)
    moved = []
    for place, rate in enumerate(rates):
        before = engine.parameters()
        engine.set_learning_rate(rate)
        train_steps(engine, place, place + 1)
        moved.append(max(float((value - before[name]).abs().max()) for name, value in engine.parameters().items()))
    return moved


def test_the_learning_rate_is_that_of_the_next_update() -> None:
    slow, none = run_ranks(1, norms_at, [1e-5, 0.0])[0]
    assert 0 < slow < 2e-5  # Adam's first step is the rate, in every coordinate
    assert none == 0
