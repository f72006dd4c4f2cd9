"""Windows that go on from a carried state: the whole history's forward pass, any number of ranks, any stop."""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec_dist.config import Config
from lrurec_dist.config_file import load_config
from lrurec_dist.data.batches import DataOrder, TrainingBatch, iter_batches
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import CheckpointError
from lrurec_dist.model.loss import softmax_loss
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.reporting import METRICS, MetricsFile
from lrurec_dist.train.carried import NAME, CarriedState
from lrurec_dist.train.presence import Presence
from tests.datasets import chain_sequences, write_dataset
from tests.processes import run_ranks

NUM_ITEMS, LANES = 25, 5


def build(*, double: bool = False) -> LRURec:
    torch.manual_seed(0)
    model = LRURec(num_items=NUM_ITEMS, dim=8, hidden=12, blocks=2, dropout=0.0)
    with torch.no_grad():  # weights of 0.02 would hide mistakes behind the residual path
        for name, parameter in model.named_parameters():
            if name.endswith(("proj.weight", "proj.bias", "w_1.weight", "w_2.weight", "table.weight")):
                parameter.mul_(20)
    return model.double() if double else model


def order_of(windows: str, max_length: int) -> DataOrder:
    return DataOrder(
        seed=3, shards_mixed=2, global_batch_size=LANES, max_length=max_length, first_item_is_target=True, windows=windows
    )


def carried_state(model: LRURec, rank: int = 0, world_size: int = 1) -> CarriedState:
    return CarriedState(model, num_lanes=LANES, rank=rank, world_size=world_size)


def vectors_of(model: LRURec, carried: CarriedState, batch: TrainingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """User vectors at the targets of a batch, and the targets; the state goes on."""
    item_ids, targets = torch.from_numpy(batch.item_ids), torch.from_numpy(batch.targets)
    keep = (targets > 0) | (item_ids > 0)
    vectors, state = model(item_ids, keep, None, carried.before(torch.from_numpy(batch.goes_on)))
    carried.after(state)
    return vectors, targets[keep]


def epoch_of(dataset: SequenceDataset, order: DataOrder) -> list[TrainingBatch]:
    stream = iter_batches(dataset, order, epoch=0, first_batch=0, rank=0, world_size=1)
    return list(itertools.takewhile(lambda batch: batch.epoch == 0, stream))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Steps this small are done sooner than they are handed to threads that wait for a busy core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(str(tmp_path_factory.mktemp("carried")), chain_sequences(60, NUM_ITEMS), NUM_ITEMS, shards=4).url


@settings(deadline=None, max_examples=30)  # a loaded machine is slow now and then
@given(lengths=st.lists(st.integers(3, 40), min_size=1, max_size=9), max_length=st.integers(2, 45))
def test_windows_give_the_vectors_of_the_whole_history(tmp_path_factory, lengths, max_length):
    draw = np.random.default_rng(sum(lengths))
    sequences = [draw.permutation(NUM_ITEMS * 2)[:length] % NUM_ITEMS + 1 for length in lengths]
    dataset = write_dataset(str(tmp_path_factory.mktemp("histories")), [s.tolist() for s in sequences], NUM_ITEMS, shards=2)
    model = build(double=True)
    found: dict[tuple[int, ...], torch.Tensor] = {}
    carried, order = carried_state(model), order_of("carried", max_length)
    lanes: list[list[tuple[int, torch.Tensor]]] = [[] for _ in range(LANES)]  # (target, vector) of each lane's user
    for batch in epoch_of(dataset, order):
        vectors, targets = vectors_of(model, carried, batch)
        end = (batch.targets > 0).sum(1).cumsum()
        for lane, last in enumerate(end):
            row = slice(last - int((batch.targets[lane] > 0).sum()), last)
            if not batch.goes_on[lane]:
                lanes[lane] = []
            lanes[lane] = lanes[lane] + list(zip(targets[row].tolist(), vectors[row], strict=True))
            if lanes[lane]:
                found[tuple(target for target, _ in lanes[lane])] = torch.stack([vector for _, vector in lanes[lane]])
    for sequence in sequences:
        training = sequence[:-2].tolist()
        inputs = torch.tensor([[0, *training[:-1]]])
        # the scan and the packed products run over other shapes, so sums are taken in another order
        torch.testing.assert_close(found[tuple(training)], model(inputs, torch.ones_like(inputs) > 0), rtol=1e-9, atol=1e-9)


def losses_and_gradients(url: str, order: DataOrder) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Mean loss of each user, sorted, and the gradient of an epoch; the model does not move."""
    model, per_user = build(double=True), []
    carried = carried_state(model) if order.windows == "carried" else None
    for batch in epoch_of(SequenceDataset(url), order):
        item_ids, targets = torch.from_numpy(batch.item_ids), torch.from_numpy(batch.targets)
        keep = (targets > 0) | (item_ids > 0)
        vectors, kept = vectors_of(model, carried, batch) if carried else (model(item_ids, keep), targets[keep])
        losses = torch.nn.functional.cross_entropy(vectors @ model.table.weight.T + model.table.bias, kept, reduction="none")
        losses.sum().backward()
        per_user += [part.mean().item() for part in losses.detach().split(keep.sum(1).tolist()) if len(part)]
    return sorted(per_user), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_where_one_window_holds_a_history_training_is_that_of_the_paper(url: str) -> None:
    carried, paper = (losses_and_gradients(url, order_of(windows, 16)) for windows in ("carried", "paper"))
    assert carried[0] == pytest.approx(paper[0], rel=1e-12)
    torch.testing.assert_close(carried[1], paper[1], rtol=1e-9, atol=1e-12)


def test_no_gradient_reaches_the_window_before() -> None:
    model = build()
    first, second = torch.arange(1, 7)[None], torch.arange(7, 13)[None]  # no item in both
    whole = torch.cat([first, second], dim=1)
    model(whole, whole > 0)[-1].square().sum().backward()
    assert model.table.weight.grad[1:13].abs().sum(1).min() > 0, "every item matters, or the test would prove nothing"
    model.zero_grad()
    carried = CarriedState(model, num_lanes=1, rank=0, world_size=1)
    for item_ids in (first, second):
        vectors, state = model(item_ids, item_ids > 0, None, carried.before(torch.tensor([True])))
        carried.after(state)
    vectors[-1].square().sum().backward()
    assert model.table.weight.grad[7:13].abs().sum(1).min() > 0
    assert model.table.weight.grad[1:7].abs().max() == 0


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7])  # 7: ranks without a lane
def test_lanes_saved_by_any_ranks_are_loaded_by_any(world_size: int) -> None:
    model = build()
    whole = torch.randn(LANES, *model.init_state(1).transpose(0, 1).shape[1:])
    rows = []
    for rank in range(world_size):
        carried = carried_state(model, rank, world_size)
        carried.load({NAME: whole[carried.lanes.start : carried.lanes.stop]})
        assert carried.shape == tuple(whole.shape)
        state = carried.before(torch.ones(len(carried.lanes), dtype=torch.bool))
        assert torch.equal(state.transpose(0, 1), whole[carried.lanes.start : carried.lanes.stop])
        rows.append(carried.tensors()[NAME])
    assert torch.equal(torch.cat(rows), whole)


def test_a_state_of_other_lanes_or_another_model_is_refused() -> None:
    carried = carried_state(build(), rank=1, world_size=2)  # lanes 2, 3, 4
    for tensors in ({}, {NAME: torch.zeros(5, 2, 2, 12)}, {NAME: torch.zeros(3, 2, 2, 8)}):
        with pytest.raises(CheckpointError, match=r"carried/state: is .*, expected \(3, 2, 2, 12\): lanes 2 to 4 of 5"):
            carried.load(tensors)


def kept_for_backward(dataset: SequenceDataset, windows: str, max_length: int) -> int:
    """The most bytes that the forward pass of a training step keeps for its backward pass."""
    model, peak = LRURec(num_items=NUM_ITEMS, dim=8, hidden=8, blocks=2, dropout=0.1), 0
    carried = carried_state(model)
    for batch in epoch_of(dataset, order_of(windows, max_length)):
        kept: dict[int, int] = {}

        def keep_count(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep_count, lambda tensor: tensor):
            if windows == "paper":
                item_ids, targets = torch.from_numpy(batch.item_ids), torch.from_numpy(batch.targets)
                vectors, targets = model(item_ids, targets > 0), targets[targets > 0]
            else:
                vectors, targets = vectors_of(model, carried, batch)
            loss, _ = softmax_loss(vectors, model.table.weight, model.table.bias, targets, include_padding_class=False)
        loss.backward()
        peak = max(peak, sum(kept.values()))
    return peak


def test_memory_follows_the_window_and_not_the_history(tmp_path: Path) -> None:
    peaks = {}
    for length in (1_000, 10_000):
        sequence = [place % NUM_ITEMS + 1 for place in range(length + 2)]
        dataset = write_dataset(str(tmp_path / str(length)), [sequence], NUM_ITEMS, shards=1)
        peaks["carried", length] = kept_for_backward(dataset, "carried", 100)
        peaks["paper", length] = kept_for_backward(dataset, "paper", length)
    print("bytes kept for the backward pass:", peaks)
    assert peaks["carried", 10_000] == pytest.approx(peaks["carried", 1_000], rel=0.01)
    assert 9 < peaks["paper", 10_000] / peaks["paper", 1_000] < 10.1
    assert 5 < peaks["paper", 1_000] / peaks["carried", 1_000] < 10.1, "what does not depend on the length is kept as well"


def configure(run: Path, url: str, *, max_steps: int) -> Config:
    small = ["model.dim=8", "model.hidden=8", "model.dropout=0", "batch.global_batch_size=10", "batch.max_length=3"]
    order = ["batch.windows=carried", "batch.shards_mixed=3", "batch.feed=local"]
    budget = [f"train.max_steps={max_steps}", "train.report_every=3", "train.validate_every=9", "train.learning_rate=0.01"]
    return load_config(None, [f"run_dir={run}", f"dataset.dir={url}", *small, *order, *budget])


def train_rank(config: Config, *, forgets: bool = False) -> None:
    """One rank of a run until its budget ends, from the last checkpoint if there is one."""
    from lrurec_dist.train.loop import _Worker  # DeepSpeed only where a rank runs

    worker = _Worker(config, torch.device("cpu"), Presence())
    if forgets:
        worker.carried.load({name: torch.zeros_like(rows) for name, rows in worker.carried.tensors().items()})
    worker.run(lambda _: None)


def train_whole_and_cut(runs: Path, url: str) -> None:
    train_rank(configure(runs / "whole", url, max_steps=24))
    train_rank(configure(runs / "cut", url, max_steps=9))
    shutil.copytree(runs / "cut", runs / "forgotten")
    train_rank(configure(runs / "cut", url, max_steps=24))
    train_rank(configure(runs / "forgotten", url, max_steps=24), forgets=True)
    train_rank(configure(runs / "two to one", url, max_steps=24))


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in MetricsFile(str(run / METRICS)).read() if record["kind"] == "train"}


def test_a_run_that_stops_within_histories_goes_on_on_any_number_of_ranks_with_the_losses_of_an_uninterrupted_one(
    tmp_path: Path, url: str
) -> None:
    run_ranks(2, train_rank, configure(tmp_path / "two to one", url, max_steps=9))
    run_ranks(1, train_whole_and_cut, tmp_path, url)
    whole = losses(tmp_path / "whole")
    assert sorted(whole) == list(range(3, 25, 3))
    assert losses(tmp_path / "cut") == whole
    assert losses(tmp_path / "two to one") == pytest.approx(whole, rel=1e-5)
    assert losses(tmp_path / "forgotten")[12] != pytest.approx(whole[12], rel=1e-5), "the state decides what comes next"
