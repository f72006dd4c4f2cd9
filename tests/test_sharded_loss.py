"""Losses over rows spread over real processes, against one process that holds them all."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lrurec_dist import collectives
from lrurec_dist.errors import LrurecError
from lrurec_dist.model.item_table import ItemTable, initial_values
from lrurec_dist.model.loss import softmax_loss
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.model.sampling import NegativeSampler, sampled_softmax_loss
from lrurec_dist.model.sharded_loss import sharded_sampled_softmax_loss, sharded_softmax_loss
from lrurec_dist.model.sharded_table import ShardedItemTable
from lrurec_dist.train.optimizer import adamw
from lrurec_dist.train.row_optimizer import RowAdamW
from tests.processes import run_ranks
from tests.sharded import dense, own, sharded, whole

NUM_ITEMS, DIM = 39, 6  # 40 rows: 14, 13 and 13 on three ranks
COUNTS = {"uneven": (37, 0, 5), "none": (0, 0, 0), "many": (90, 0, 20)}
FACTOR = 0.37  # stands for a division by the global number of targets

Case = tuple[str, torch.dtype, dict[str, Any]]
CASES: list[Case] = [
    *(
        ("uneven", torch.float64, {"include_padding_class": include, "unit_rows": unit, "weighted": unit, "tile_elements": tile})
        for include, unit, tile in itertools.product((True, False), (False, True), (50, 1 << 20))
    ),
    ("uneven", torch.float32, {"include_padding_class": True, "tile_elements": 50}),
    # 13 rows would fit a tile beside 64 targets and 14 would not: ranks that cut by their own rows would not meet
    ("many", torch.float64, {"include_padding_class": True, "tile_elements": 430}),
    ("uneven", torch.float32, {"include_padding_class": False}),
    ("uneven", torch.float32, {"include_padding_class": False, "product_dtype": torch.bfloat16}),
    ("none", torch.float32, {"include_padding_class": True}),
    ("uneven", torch.float32, {"negatives": 11}),
    ("uneven", torch.float64, {"negatives": 11, "unit_rows": True, "weighted": True, "tile_elements": 50}),
    ("none", torch.float32, {"negatives": 11}),
]


def draw(case: Case) -> tuple[torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Rows, biases, and of each rank vectors, targets and their factors."""
    counts, dtype, _ = case
    torch.manual_seed(0)
    weight, bias = torch.randn(NUM_ITEMS + 1, DIM).to(dtype), torch.randn(NUM_ITEMS + 1).to(dtype)
    parts = [
        (torch.randn(n, DIM).to(dtype), torch.randint(1, NUM_ITEMS + 1, (n,)), torch.rand(n).to(dtype)) for n in COUNTS[counts]
    ]
    return weight, bias, parts


def negatives_of(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A sample with repetitions and its log probabilities."""
    sampler = NegativeSampler(torch.arange(NUM_ITEMS + 1), "counts")
    return sampler.draw(number, seed=3), sampler.log_probability


def on_ranks() -> dict[str, Any]:
    curves = [train_sharded(negatives) for negatives in (0, 11)] if collectives.world_size() in SHARES else []
    return {"cases": [one_rank(case) for case in CASES], "curves": curves}


def one_rank(case: Case) -> dict[str, Any]:
    options = dict(case[2])
    weight, bias, parts = draw(case)
    vectors, targets, factors = own(parts)
    vectors.requires_grad_()
    table = sharded(weight, bias)
    options["target_weights"] = factors if options.pop("weighted", False) else None
    if number := options.pop("negatives", 0):
        total, count = sharded_sampled_softmax_loss(vectors, table, targets, *negatives_of(number), **options)
    else:
        total, count = sharded_softmax_loss(vectors, table, targets, **options)
        with torch.no_grad():
            silent, _ = sharded_softmax_loss(vectors, table, targets, **options)
        assert not silent.requires_grad
        assert silent.item() == total.item()
    (total * FACTOR).backward()
    grads = {"vectors": dense(vectors.grad), "weight": dense(table.weight.grad), "bias": dense(table.bias.grad)}
    return {"total": total.item(), "count": count, **grads}


def truth(case: Case, world_size: int) -> tuple[list[float], dict[str, np.ndarray]]:
    """Sums of each rank, and gradients of the sum of all, by the losses of one process."""
    options = dict(case[2])
    weight, bias, parts = draw(case)
    vectors, targets, factors = (torch.cat(list(part)) for part in zip(*parts[:world_size], strict=True))
    leaves = {"vectors": vectors, "weight": weight, "bias": bias}
    for leaf in leaves.values():
        leaf.requires_grad_()
    weighted, number = options.pop("weighted", False), options.pop("negatives", 0)
    if number and options.pop("unit_rows", False):
        weight = torch.nn.functional.normalize(weight, dim=1)
    totals, begin = [], 0
    for count in COUNTS[case[0]][:world_size]:
        here = slice(begin, begin + count)
        begin += count
        common = {**options, "target_weights": factors[here] if weighted else None}
        inputs = (vectors[here], weight, bias, targets[here])
        totals.append(
            (sampled_softmax_loss(*inputs, *negatives_of(number), **common) if number else softmax_loss(*inputs, **common))[0]
        )
    (torch.stack(totals).sum() * FACTOR).backward()
    return [total.item() for total in totals], {name: dense(leaf.grad) for name, leaf in leaves.items()}


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[str, Any]]]:
    return {world_size: run_ranks(world_size, on_ranks) for world_size in (1, 2, 3)}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: str(CASES[case]))
def test_sums_and_gradients_are_those_of_one_process(found: dict[int, list[dict[str, Any]]], case: int, world_size: int) -> None:
    parts = [rank["cases"][case] for rank in found[world_size]]
    counts, dtype, options = CASES[case]
    totals, grads = truth(CASES[case], world_size)
    # sums in another order; in bfloat16, roundings of other factors too
    rounded = options.get("product_dtype") == torch.bfloat16
    tolerance = 1e-9 if dtype == torch.float64 else 2e-2 if rounded else 2e-5
    assert [part["count"] for part in parts] == list(COUNTS[counts][:world_size])
    assert [part["total"] for part in parts] == pytest.approx(totals, rel=1e-3 if rounded else tolerance)
    np.testing.assert_allclose(
        np.concatenate([part["vectors"] for part in parts]), grads["vectors"], rtol=tolerance, atol=tolerance
    )
    for name in ("weight", "bias"):
        np.testing.assert_allclose(whole([part[name] for part in parts]), grads[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bad", [0, NUM_ITEMS + 1])
def test_a_target_outside_the_catalogue_is_refused(bad: int) -> None:
    table = ShardedItemTable(NUM_ITEMS, DIM, seed=0)
    vectors, targets = torch.zeros(2, DIM), torch.tensor([3, bad])
    with pytest.raises(LrurecError, match="outside the catalogue"):
        sharded_softmax_loss(vectors, table, targets, include_padding_class=True)
    with pytest.raises(LrurecError, match="outside"):
        sharded_sampled_softmax_loss(vectors, table, targets, *negatives_of(5))


STEPS, BATCH, LENGTH, CLIP = 50, 12, 7, 0.3  # the norm is clipped in nearly every step
SHARES = {3: (8, 4, 0)}  # sequences of each rank


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Left-padded chains of items and their successors."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        lengths = torch.randint(2, LENGTH + 1, (BATCH,), generator=generator)
        first = torch.randint(1, NUM_ITEMS + 1, (BATCH, 1), generator=generator)
        chain = (first + 3 * torch.arange(LENGTH + 1)) % NUM_ITEMS + 1
        keep = torch.arange(LENGTH) >= LENGTH - lengths[:, None]
        yield chain[:, :-1] * keep, chain[:, 1:] * keep


def build(table: ItemTable | ShardedItemTable) -> LRURec:
    torch.manual_seed(0)
    return LRURec(num_items=NUM_ITEMS, dim=8, hidden=8, blocks=1, dropout=0.0, table=table)


def groups_of(parameters: dict[str, torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": [p for name, p in parameters.items() if name.endswith("bias") == biases], "weight_decay": decay}
        for biases, decay in ((False, 0.1), (True, 0.0))
    ]


def train_replicated(negatives: int) -> list[float]:
    table = ItemTable(NUM_ITEMS, 8)
    with torch.no_grad():
        table.weight.copy_(initial_values(torch.arange(NUM_ITEMS + 1), torch.arange(8), seed=4))
        table.bias.copy_(initial_values(torch.arange(NUM_ITEMS + 1), torch.tensor([-1]), seed=4)[:, 0])
    model = build(table)
    optimizer = adamw(groups_of(dict(model.named_parameters())), learning_rate=0.02, epsilon=1e-8)
    losses = []
    for item_ids, targets in batches():
        keep = targets > 0
        inputs = (model(item_ids, keep), table.weight, table.bias, targets[keep])
        if negatives:
            total, count = sampled_softmax_loss(*inputs, *negatives_of(negatives))
        else:
            total, count = softmax_loss(*inputs, include_padding_class=True)
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(total.item() / count)
    return losses


def train_sharded(negatives: int) -> list[float]:
    table = ShardedItemTable(NUM_ITEMS, 8, seed=4)
    model = build(table)
    encoder = {name: p for name, p in model.named_parameters() if not name.startswith("table.")}
    optimizer = adamw(groups_of(encoder), learning_rate=0.02, epsilon=1e-8)
    rows = RowAdamW(table, learning_rate=0.02, weight_decay=0.1, epsilon=1e-8)
    shares = SHARES[collectives.world_size()]
    begin = sum(shares[: collectives.rank()])
    here = slice(begin, begin + shares[collectives.rank()])
    losses = []
    for item_ids, targets in batches():
        count = int((targets > 0).sum())
        item_ids, targets = item_ids[here], targets[here]
        keep = targets > 0
        vectors = model(item_ids, keep)
        if negatives:
            total, _ = sharded_sampled_softmax_loss(vectors, table, targets[keep], *negatives_of(negatives))
        else:
            total, _ = sharded_softmax_loss(vectors, table, targets[keep], include_padding_class=True)
        optimizer.zero_grad()
        rows.zero_grad()
        (total / count).backward()
        gradients = [collectives.all_reduce_sum(p.grad) for p in encoder.values() if p.grad is not None]
        sq_norm = collectives.all_reduce_sum(rows.sq_norm()) + sum(gradient.double().square().sum() for gradient in gradients)
        factor = min(1.0, CLIP / (float(sq_norm) ** 0.5 + 1e-6))
        rows.scale_gradients(factor)
        for gradient in gradients:
            gradient.mul_(factor)
        optimizer.step()
        rows.step()
        losses.append(float(collectives.all_reduce_sum(total.detach().clone())) / count)
    return losses


def test_training_with_rows_on_three_ranks_gives_the_losses_of_one_process(found: dict[int, list[dict[str, Any]]]) -> None:
    replicated = [train_replicated(negatives) for negatives in (0, 11)]
    assert all(losses[-1] < 0.7 * losses[0] for losses in replicated)
    for rank in found[3]:
        for curve, expected in zip(rank["curves"], replicated, strict=True):
            assert curve == pytest.approx(expected, abs=1e-4)
