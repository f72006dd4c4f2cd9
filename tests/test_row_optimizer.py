"""Optimizers of item rows against torch's AdamW and against plain float64 loops."""

from typing import Any

import pytest
import torch

from lrurec_dist.errors import CheckpointError
from lrurec_dist.model.item_table import ItemTable
from lrurec_dist.train import row_optimizer as module
from lrurec_dist.train.optimizer import adamw
from lrurec_dist.train.row_optimizer import RowOptimizer, row_optimizer

NUM_ITEMS, DIM, STEPS = 10, 3, 5
KINDS = ("adamw", "lazy_adam", "rowwise_adagrad")
LAZY = KINDS[1:]
OPTIONS = {"learning_rate": 0.1, "weight_decay": 0.3, "epsilon": 1e-8}


def build(kind: Any) -> tuple[ItemTable, RowOptimizer]:
    torch.manual_seed(0)
    table = ItemTable(NUM_ITEMS, DIM)
    for parameter in table.parameters():
        torch.nn.init.normal_(parameter)
    return table, row_optimizer(kind, table, **OPTIONS)


def set_gradients(table: ItemTable, step: int, rows: list[int], *, sparse: bool = False) -> None:
    """Gradients of some rows, functions of the step; a sparse one has every row twice, half and half."""
    generator = torch.Generator().manual_seed(step)
    for parameter in table.parameters():
        gradient = torch.zeros_like(parameter)
        gradient[rows] = torch.randn(gradient.shape, generator=generator)[rows]
        parameter.grad = gradient
        if sparse:
            twice = torch.tensor(rows + rows, dtype=torch.int64)
            parameter.grad = torch.sparse_coo_tensor(twice[None], gradient[twice] / 2, parameter.shape, check_invariants=False)


def snapshot(table: ItemTable, optimizer: RowOptimizer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in [*table.named_parameters(), *optimizer.state().items()]}


def test_adamw_is_that_of_the_replicated_table_to_the_bit() -> None:
    table, optimizer = build("adamw")
    twin, _ = build("adamw")
    groups = [{"params": [twin.weight], "weight_decay": 0.3}, {"params": [twin.bias], "weight_decay": 0.0}]
    reference = adamw(groups, learning_rate=0.1, epsilon=1e-8)
    for step in range(STEPS):
        for each in (table, twin):
            set_gradients(each, step, [1, 4, 7])
        optimizer.step()
        reference.step()
        assert torch.equal(table.weight, twin.weight)
        assert torch.equal(table.bias, twin.bias)
    assert torch.equal(optimizer.state()["exp_avg_sq/weight"], reference.state[twin.weight]["exp_avg_sq"])


def test_lazy_adam_is_adamw_where_every_row_is_touched() -> None:
    table, optimizer = build("lazy_adam")
    twin, reference = build("adamw")
    for step in range(STEPS):
        for each in (table, twin):
            set_gradients(each, step, list(range(NUM_ITEMS + 1)))
        optimizer.step()
        reference.step()
    # the same formula in another order of operations, five times over
    torch.testing.assert_close(snapshot(table, optimizer), snapshot(twin, reference), rtol=1e-5, atol=1e-6)


def test_rowwise_adagrad_equals_a_plain_loop() -> None:
    table, optimizer = build("rowwise_adagrad")
    rows, biases, sums = table.weight.detach().double(), table.bias.detach().double(), torch.zeros(NUM_ITEMS + 1, 2).double()
    for step in range(STEPS):
        touched = [step, step + 3]
        set_gradients(table, step, touched)
        assert table.weight.grad is not None
        assert table.bias.grad is not None
        for row in touched:
            gradient, bias = table.weight.grad[row].double(), table.bias.grad[row].double()
            sums[row] += torch.stack([(gradient**2).mean(), bias**2])
            rows[row] = rows[row] * (1 - 0.1 * 0.3) - 0.1 * gradient / (sums[row, 0].sqrt() + 1e-8)
            biases[row] -= 0.1 * bias / (sums[row, 1].sqrt() + 1e-8)
        optimizer.step()
    torch.testing.assert_close(table.weight.double(), rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(table.bias.double(), biases, rtol=1e-5, atol=1e-6)
    assert optimizer.state()["sum_sq/weight"].shape == (NUM_ITEMS + 1,)


@pytest.mark.parametrize("kind", LAZY)
def test_a_lazy_optimizer_leaves_untouched_rows_and_their_state_alone(kind: str) -> None:
    table, optimizer = build(kind)
    set_gradients(table, 0, list(range(NUM_ITEMS + 1)))
    optimizer.step()
    before = snapshot(table, optimizer)
    set_gradients(table, 1, [2, 5])
    optimizer.step()
    for name, after in snapshot(table, optimizer).items():
        if name != "step":
            changed = (after != before[name]).view(NUM_ITEMS + 1, -1).any(1).nonzero().flatten().tolist()
            assert changed == [2, 5], name


@pytest.mark.parametrize("kind", LAZY)
def test_a_row_decays_when_it_is_touched_and_a_bias_never(kind: str) -> None:
    moved = {}
    for decay in (0.0, 0.3):
        table, _ = build(kind)
        set_gradients(table, 0, [2])
        row_optimizer(kind, table, **{**OPTIONS, "weight_decay": decay}).step()  # type: ignore[arg-type]
        moved[decay] = table
    start, _ = build(kind)
    difference = moved[0.0].weight - moved[0.3].weight
    torch.testing.assert_close(difference[2], start.weight[2] * 0.1 * 0.3, rtol=1e-4, atol=1e-6)
    assert torch.equal(moved[0.0].bias, moved[0.3].bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [[2, 5, 9], []])
def test_a_sparse_gradient_moves_rows_as_the_dense_one_does(monkeypatch: pytest.MonkeyPatch, kind: str, rows: list[int]) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_A_TIME", 2)
    found = []
    for sparse in (False, True):
        table, optimizer = build(kind)
        for step in range(STEPS):
            set_gradients(table, step, rows, sparse=sparse)
            optimizer.step()
        found.append(snapshot(table, optimizer))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_norm_is_that_of_the_summed_gradient_and_scaling_scales_it(sparse: bool) -> None:
    table, optimizer = build("lazy_adam")
    set_gradients(table, 0, [1, 2, 3])
    truth = sum(float(p.grad.double().square().sum()) for p in table.parameters() if p.grad is not None)
    set_gradients(table, 0, [1, 2, 3], sparse=sparse)
    assert optimizer.sq_norm().item() == pytest.approx(truth, rel=1e-6)
    optimizer.scale_gradients(0.5)
    optimizer.scale_gradients(torch.tensor(0.5))
    assert optimizer.sq_norm().item() == pytest.approx(truth / 16, rel=1e-6)
    optimizer.zero_grad()
    assert optimizer.sq_norm().item() == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_saved_state_goes_on_as_if_there_had_been_no_break(kind: str) -> None:
    table, optimizer = build(kind)
    for step in range(STEPS):
        if step == 2:
            other, taken_over = build(kind)
            set_gradients(other, 9, [0, 1])
            taken_over.step()  # state of its own, all to be replaced
            other.load_state_dict(table.state_dict())
            taken_over.load({name: tensor.clone() for name, tensor in optimizer.state().items()})
            table, optimizer = other, taken_over
        set_gradients(table, step, [step, 2, 7])
        optimizer.step()
    twin, uninterrupted = build(kind)
    for step in range(STEPS):
        set_gradients(twin, step, [step, 2, 7])
        uninterrupted.step()
    assert optimizer.state()["step"].item() == STEPS
    assert all(
        torch.equal(a, b)
        for a, b in zip(snapshot(table, optimizer).values(), snapshot(twin, uninterrupted).values(), strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_one_entry_a_row(kind: str) -> None:
    _, optimizer = build(kind)
    state = optimizer.state()
    assert state.pop("step").shape == ()
    assert {len(tensor) for tensor in state.values()} == {NUM_ITEMS + 1}


def test_state_of_another_optimizer_or_of_other_rows_is_refused() -> None:
    _, optimizer = build("adamw")
    with pytest.raises(CheckpointError, match="is not in both checkpoint and optimizer"):
        optimizer.load(build("rowwise_adagrad")[1].state())
    shorter = row_optimizer("adamw", ItemTable(NUM_ITEMS - 1, DIM), **OPTIONS)
    with pytest.raises(CheckpointError, match="is not in both"):
        optimizer.load(shorter.state())
