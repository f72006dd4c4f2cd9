"""Optimizer steps under real DeepSpeed on real processes, compared across world sizes and ZeRO stages."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from lrurec_dist import collectives
from lrurec_dist.data.batches import DataOrder, iter_batches
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import CheckpointError
from lrurec_dist.model.loss import softmax_loss
from lrurec_dist.model.lrurec import LRURec
from tests.datasets import chain_sequences, write_dataset
from tests.processes import run_ranks

NUM_ITEMS, STEPS = 25, 6
ORDER = DataOrder(seed=3, shards_mixed=2, global_batch_size=10, max_length=6, first_item_is_target=True)


def build_engine(zero_stage: int, dim: int = 8) -> Any:
    from lrurec_dist.train.engine import Engine  # DeepSpeed only where a rank runs

    torch.manual_seed(5)
    model = LRURec(num_items=NUM_ITEMS, dim=dim, hidden=8, blocks=2, dropout=0.0)
    return Engine(
        model,
        device=torch.device("cpu"),
        zero_stage=zero_stage,
        learning_rate=0.01,
        weight_decay=0.1,
        decay_recurrence=False,
        epsilon=1e-9,
        clip_norm=0.3,  # low enough to bite, so that a norm taken per rank would show
    )


def train_steps(engine: Any, url: str, first: int, last: int) -> list[float]:
    """Mean losses of the global batches first..last-1 of epoch 0."""
    dataset = SequenceDataset(url)
    place = {"rank": collectives.rank(), "world_size": collectives.world_size()}
    losses = []
    for batch in itertools.islice(iter_batches(dataset, ORDER, epoch=0, first_batch=first, **place), last - first):
        item_ids, targets = torch.from_numpy(batch.item_ids), torch.from_numpy(batch.targets)
        keep = targets > 0
        table = engine.model.table
        total, _ = softmax_loss(engine(item_ids, keep), table.weight, table.bias, targets[keep], include_padding_class=True)
        engine.step(total, batch.num_targets)
        losses.append(collectives.all_reduce_sum(total.detach().clone()).item() / batch.num_targets)
    return losses


def run_stages(url: str) -> dict[int, tuple[list[float], dict[str, np.ndarray], dict[str, np.ndarray]]]:
    found = {}
    for zero_stage in (0, 1, 2):
        engine = build_engine(zero_stage)
        losses = train_steps(engine, url, 0, STEPS)
        found[zero_stage] = (losses, as_arrays(engine.parameters()), as_arrays(engine.optimizer_state()))
    return found


def as_arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(str(tmp_path_factory.mktemp("engine")), chain_sequences(64, NUM_ITEMS), NUM_ITEMS, shards=4).url


@pytest.fixture(scope="module")
def alone(url: str) -> dict[int, Any]:
    return dict(run_ranks(1, run_stages, url)[0])


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # sums over ranks are taken in another order, and Adam's division magnifies what differs
        np.testing.assert_allclose(found[name], value, rtol=2e-3, atol=2e-5, err_msg=name)


def test_zero_stages_give_the_same_losses_parameters_and_moments(alone: dict[int, Any]) -> None:
    losses, parameters, moments = alone[0]
    assert losses[-1] < losses[0]
    for zero_stage in (1, 2):
        assert alone[zero_stage][0] == pytest.approx(losses, rel=1e-5)
        assert_same(alone[zero_stage][1], parameters)
        assert_same(alone[zero_stage][2], moments)


@pytest.mark.parametrize("world_size", [2, 3])  # 3 divides neither the batch nor the parameters
def test_losses_and_parameters_are_independent_of_world_size(url: str, alone: dict[int, Any], world_size: int) -> None:
    losses, parameters, moments = alone[0]
    for rank_found in run_ranks(world_size, run_stages, url):
        for zero_stage in (0, 1, 2):
            assert rank_found[zero_stage][0] == pytest.approx(losses, rel=1e-5)
            assert_same(rank_found[zero_stage][1], parameters)
            assert_same(rank_found[zero_stage][2], moments)


def save_half_way(url: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    engine = build_engine(1)
    train_steps(engine, url, 0, STEPS // 2)
    return as_arrays(engine.parameters()), as_arrays(engine.optimizer_state())


def go_on(
    url: str, zero_stage: int, saved: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
) -> tuple[list[float], dict[str, np.ndarray]]:
    engine = build_engine(zero_stage)
    train_steps(engine, url, 4, 5)  # moments and weights of its own, all to be replaced
    engine.load(*({name: torch.from_numpy(value) for name, value in part.items()} for part in saved), step=STEPS // 2)
    return train_steps(engine, url, STEPS // 2, STEPS), as_arrays(engine.parameters())


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 2), (2, 1), (3, 0)])
def test_state_saved_on_two_ranks_goes_on_anywhere(url: str, alone: dict[int, Any], world_size: int, zero_stage: int) -> None:
    saved = run_ranks(2, save_half_way, url)[0]
    losses, parameters, _ = alone[0]
    for rank_losses, rank_parameters in run_ranks(world_size, go_on, url, zero_stage, saved):
        assert rank_losses == pytest.approx(losses[STEPS // 2 :], rel=1e-5)
        assert_same(rank_parameters, parameters)


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
