"""Rows spread over real processes: looked up, differentiated, drawn, and no more of them than there have to be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lrurec_dist.errors import ConfigError, LrurecError
from lrurec_dist.model import item_table
from lrurec_dist.model.item_table import ItemTable, initial_values
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.model.sharded_table import ShardedItemTable
from lrurec_dist.train.row_optimizer import row_optimizer
from tests.processes import run_ranks
from tests.sharded import dense, own, sharded, whole

NUM_ITEMS, DIM = 24, 5  # 25 rows: neither two nor three ranks hold equally many
MANY_ITEMS, WIDE = 300_000, 64
KINDS = ("adamw", "lazy_adam", "rowwise_adagrad")


def draw() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """A table, ids of each rank, and factors of the rows looked up: whole numbers, so that sums are exact in any order."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-9, 10, (NUM_ITEMS + 1, DIM), generator=generator).float()
    ids = [torch.randint(0, NUM_ITEMS + 1, shape, generator=generator) for shape in ((6, 7), (0,), (1,))]
    factors = [torch.randint(-9, 10, (part.numel(), DIM + 1), generator=generator).float() for part in ids]
    return weight, torch.arange(NUM_ITEMS + 1).float(), ids, factors


def on_ranks() -> dict[str, Any]:
    weight, bias, all_ids, all_factors = draw()
    ids, factors = own(all_ids), own(all_factors)
    table = sharded(weight, bias)
    rows = table(ids)
    (rows.flatten(0, -2) * factors[:, :-1]).sum().backward()
    found: dict[str, Any] = {
        "rows": rows.detach().numpy(),
        "grad_weight": dense(table.weight.grad),
        "bias_untouched": table.bias.grad is None,
    }
    assert table.weight.grad is not None
    found["sparse"] = table.weight.grad.is_sparse
    table.weight.grad = None
    rows, biases = table.rows_and_biases(ids.flatten())
    ((rows * factors[:, :-1]).sum() + (biases * factors[:, -1]).sum()).backward()
    found |= {"biases": biases.detach().numpy(), "grad_both": (dense(table.weight.grad), dense(table.bias.grad))}
    fresh = ShardedItemTable(NUM_ITEMS, DIM, seed=7)
    found["initial"] = (fresh.weight.detach().numpy(), fresh.bias.detach().numpy())
    found["too_few_items"] = refusal() if fresh.world_size == 3 else ""
    found["bytes"] = {kind: bytes_held(kind) for kind in KINDS}
    before = status("VmRSS")
    large = ShardedItemTable(MANY_ITEMS, WIDE, seed=0)
    found["peak"], found["large"] = status("VmHWM") - before, large.weight.nbytes
    return found


def bytes_held(kind: Any) -> int:
    """Bytes of parameters, gradients and state per rank, without the step count."""
    table = ShardedItemTable(NUM_ITEMS, DIM, seed=7)
    optimizer = row_optimizer(kind, table, learning_rate=0.1, weight_decay=0.1, epsilon=1e-8)
    for parameter in table.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [tensor for name, tensor in optimizer.state().items() if name != "step"]
    return sum(tensor.nbytes for tensor in [*table.parameters(), *(p.grad for p in table.parameters()), *state])  # type: ignore[union-attr]


def status(name: str) -> int:
    """Bytes of one line of /proc/self/status."""
    return (
        next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)) * 1024
    )


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[str, Any]]]:
    return {world_size: run_ranks(world_size, on_ranks) for world_size in (1, 2, 3)}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_looked_up_rows_are_those_of_the_whole_table(found: dict[int, list[dict[str, Any]]], world_size: int) -> None:
    weight, bias, ids, _ = draw()
    for rank, each in enumerate(found[world_size]):
        np.testing.assert_array_equal(each["rows"], weight[ids[rank]].numpy())
        np.testing.assert_array_equal(each["biases"], bias[ids[rank].flatten()].numpy())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_owners_receive_the_sum_of_all_ranks_gradients(found: dict[int, list[dict[str, Any]]], world_size: int) -> None:
    _, _, ids, factors = draw()
    truth = torch.zeros(NUM_ITEMS + 1, DIM + 1)
    for rank in range(world_size):
        truth.index_add_(0, ids[rank].flatten(), factors[rank])
    parts = found[world_size]
    np.testing.assert_array_equal(whole([part["grad_weight"] for part in parts]), truth[:, :-1].numpy())
    np.testing.assert_array_equal(whole([part["grad_both"][0] for part in parts]), truth[:, :-1].numpy())
    np.testing.assert_array_equal(whole([part["grad_both"][1] for part in parts]), truth[:, -1].numpy())
    assert all(part["sparse"] and part["bias_untouched"] for part in parts)


def test_initial_rows_do_not_depend_on_the_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch, found: dict[int, list[dict[str, Any]]]
) -> None:
    monkeypatch.setattr(item_table, "_ROWS_AT_A_TIME", 4)  # nor on how many are drawn at once
    alone = ShardedItemTable(NUM_ITEMS, DIM, seed=7)
    for parts in found.values():
        np.testing.assert_array_equal(whole([part["initial"][0] for part in parts]), alone.weight.detach().numpy())
        np.testing.assert_array_equal(whole([part["initial"][1] for part in parts]), alone.bias.detach().numpy())
    other = ShardedItemTable(NUM_ITEMS, DIM, seed=8)
    assert (alone.weight != other.weight).float().mean() > 0.99


def test_initial_values_are_distributed_as_those_of_the_replicated_table() -> None:
    values = initial_values(torch.arange(4_000), torch.arange(64), seed=3)
    torch.manual_seed(0)
    reference = torch.nn.init.trunc_normal_(torch.empty_like(values), std=0.02, a=-0.04, b=0.04)
    assert values.abs().max() <= 0.04
    # a quarter of a million draws: their quantiles lie within a hundredth of a deviation
    levels = torch.linspace(0.01, 0.99, 25)
    torch.testing.assert_close(values.flatten().quantile(levels), reference.flatten().quantile(levels), rtol=0, atol=4e-4)
    correlation = torch.corrcoef(torch.stack([values[:-1].flatten(), values[1:].flatten(), values.roll(1, 1)[:-1].flatten()]))
    assert (correlation - torch.eye(3)).abs().max() < 0.01


def test_numbers_are_mixed_as_in_the_reference_of_splitmix64() -> None:
    assert item_table._mix(torch.tensor(1234567)).item() == 6457827717110365317  # its first output for this seed


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_a_rank_is_its_share_of_the_rows(found: dict[int, list[dict[str, Any]]], kind: str) -> None:
    alone = found[1][0]["bytes"][kind]
    for world_size, parts in found.items():
        held = [part["bytes"][kind] for part in parts]
        assert sum(held) == alone
        assert max(held) == alone // (NUM_ITEMS + 1) * (NUM_ITEMS // world_size + 1)


def test_a_rank_never_holds_more_than_its_own_rows(found: dict[int, list[dict[str, Any]]]) -> None:
    table = (MANY_ITEMS + 1) * WIDE * 4
    for world_size, parts in found.items():
        for part in parts:
            assert part["large"] <= table / world_size + WIDE * 4
            # beside the rows: ids of all own items and one part that is being drawn, 64-bit numbers and some copies of them
            assert part["peak"] < part["large"] + (30 << 20)


def refusal() -> str:
    with pytest.raises(ConfigError) as caught:
        ShardedItemTable(2, DIM, seed=0)
    return str(caught.value)


def test_more_ranks_than_items_are_refused(found: dict[int, list[dict[str, Any]]]) -> None:
    for part in found[3]:
        assert part["too_few_items"].startswith("world_size=3: ")
        assert "take at most 2 workers" in part["too_few_items"]


@pytest.mark.parametrize("bad", [-1, NUM_ITEMS + 1])
def test_an_id_outside_the_catalogue_is_refused(bad: int) -> None:
    with pytest.raises(LrurecError, match=r"item_ids: an id is outside 0\.\.24"):
        ShardedItemTable(NUM_ITEMS, DIM, seed=0)(torch.tensor([1, bad]))


def build(table: Any, num_items: int = NUM_ITEMS) -> LRURec:
    torch.manual_seed(0)
    return LRURec(num_items=num_items, dim=DIM, hidden=4, blocks=1, dropout=0.0, table=table)


def test_a_model_keeps_the_rows_of_a_table_it_is_given() -> None:
    table = ShardedItemTable(NUM_ITEMS, DIM, seed=7)
    before = table.weight.detach().clone()
    model = build(table)
    replicated = ItemTable(NUM_ITEMS, DIM)
    replicated.load_state_dict(table.state_dict())
    assert model.table is table
    assert torch.equal(table.weight, before)
    item_ids = torch.tensor([[0, 3, 24], [1, 1, 2]])
    assert torch.equal(model.encode(item_ids), build(replicated).encode(item_ids))


def test_a_table_of_another_size_is_refused() -> None:
    with pytest.raises(LrurecError, match="table: holds 24 items of width 5, but num_items=25, dim=5"):
        build(ShardedItemTable(NUM_ITEMS, DIM, seed=7), num_items=25)
