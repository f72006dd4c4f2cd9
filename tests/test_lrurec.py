"""The model against the original's recorded figures, the slow truth, and its own promises."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lrurec_dist.errors import LrurecError
from lrurec_dist.model.loss import softmax_loss
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.model.original import from_original
from tests.reference import complex_parameters, user_vectors

BLOCKS = 2


def build(num_items: int = 30, dropout: float = 0.0) -> LRURec:
    torch.manual_seed(0)
    model = LRURec(num_items=num_items, dim=8, hidden=12, blocks=BLOCKS, dropout=dropout)
    with torch.no_grad():  # weights of 0.02 would hide mistakes behind the residual path
        for name, parameter in model.named_parameters():
            if name.endswith(("proj.weight", "proj.bias", "w_1.weight", "w_2.weight", "table.weight")):
                parameter.mul_(20)
    return model.eval()


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "golden" / "original.npz") as file:
        return {name: file[name] for name in file.files}


def tensors_of(golden: dict[str, np.ndarray], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): torch.from_numpy(array) for name, array in golden.items() if name.startswith(prefix)}


@pytest.fixture
def original(golden: dict[str, np.ndarray]) -> LRURec:
    classes, dim = golden["param/embedding.token.weight"].shape
    hidden = golden["param/model.lru_blocks.0.lru_layer.params_log"].shape[1]
    model = LRURec(num_items=classes - 1, dim=dim, hidden=hidden, blocks=BLOCKS, dropout=0.0)
    model.load_state_dict(from_original(tensors_of(golden, "param/")))
    return model


def test_hidden_states_and_logits_reproduce_the_original(original: LRURec, golden: dict[str, np.ndarray]) -> None:
    item_ids = torch.from_numpy(golden["x"])
    vectors = original(item_ids, item_ids > 0)
    scores = vectors @ original.table.weight.T + original.table.bias
    # float32 on both sides, another order of summation: a few units in the last place
    torch.testing.assert_close(vectors, torch.from_numpy(golden["hidden"])[item_ids > 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores, torch.from_numpy(golden["logits"])[item_ids > 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("include_padding_class", "name"), [(True, "loss_with_padding_class"), (False, "loss_items_only")])
def test_loss_reproduces_the_original(
    original: LRURec, golden: dict[str, np.ndarray], include_padding_class: bool, name: str
) -> None:
    item_ids, targets = torch.from_numpy(golden["x"]), torch.from_numpy(golden["y"])
    keep = targets > 0
    table = original.table
    total, count = softmax_loss(
        original(item_ids, keep), table.weight, table.bias, targets[keep], include_padding_class=include_padding_class
    )
    assert count == int(keep.sum())
    assert total.item() / count == pytest.approx(float(golden[name]), rel=1e-6)


def test_every_gradient_reproduces_the_original(original: LRURec, golden: dict[str, np.ndarray]) -> None:
    item_ids, targets = torch.from_numpy(golden["x"]), torch.from_numpy(golden["y"])
    keep = targets > 0
    table = original.table
    total, count = softmax_loss(original(item_ids, keep), table.weight, table.bias, targets[keep], include_padding_class=True)
    (total / count).backward()
    expected = from_original(tensors_of(golden, "grad/"))  # linear in the tensors, so gradients convert as weights do
    names = [name for name, _ in original.named_parameters()]
    assert sorted(names) == sorted(expected)
    for name, parameter in original.named_parameters():
        assert parameter.grad is not None, name
        scale = float(expected[name].abs().max())
        assert scale > 0, f"the recorded gradient of {name} is zero and would prove nothing"
        assert float((parameter.grad - expected[name]).abs().max()) <= 1e-4 * scale, name


def test_forward_equals_the_slow_truth_in_float64() -> None:
    model = build().double()
    truth = complex_parameters(model.state_dict(), BLOCKS)
    history = [3, 7, 7, 30, 1, 12, 3]
    padded = torch.tensor([[0, 0, *history]])
    vectors = model(padded, padded > 0).detach().numpy()
    np.testing.assert_allclose(vectors, user_vectors(truth, history, BLOCKS), rtol=1e-10, atol=1e-12)


def test_a_padding_position_with_a_target_gives_the_vector_of_a_user_without_history() -> None:
    model = build().double()
    truth = complex_parameters(model.state_dict(), BLOCKS)
    item_ids = torch.tensor([[0, 0, 5, 6], [0, 9, 9, 9]])
    keep = torch.tensor([[False, True, True, True], [True, True, True, True]])
    vectors = model(item_ids, keep).detach().numpy()
    np.testing.assert_allclose(vectors[0], vectors[3], rtol=1e-12)
    np.testing.assert_allclose(vectors[:3], user_vectors(truth, [0, 5, 6], BLOCKS), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("extra", [1, 3, 50])
def test_extra_left_padding_changes_nothing(extra: int) -> None:
    model = build()
    item_ids = torch.tensor([[4, 5, 6, 7, 8]])
    padded = torch.nn.functional.pad(item_ids, (extra, 0))
    # the scan's blocks start elsewhere, so the same sums are taken in another order
    torch.testing.assert_close(model(padded, padded > 0), model(item_ids, item_ids > 0), rtol=1e-5, atol=1e-6)


def test_step_by_step_equals_forward() -> None:
    model = build()
    item_ids = torch.randint(1, 31, (3, 40))
    state = model.init_state(3)
    by_step = []
    for position in range(item_ids.shape[1]):
        vectors, state = model.step(item_ids[:, position], state)
        by_step.append(vectors)
    whole = model(item_ids, item_ids > 0).unflatten(0, (3, 40))
    torch.testing.assert_close(torch.stack(by_step, dim=1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.encode(item_ids), by_step[-1], rtol=1e-4, atol=1e-5)


def test_a_state_is_that_before_the_first_item_however_much_padding_stands_before_it() -> None:
    model = build().double()
    state = torch.randn_like(model.init_state(3))
    rows = torch.tensor([[0, 0, 0, 5, 6], [1, 2, 3, 4, 5], [0, 7, 8, 9, 9]])
    together, new_state = model(rows, rows > 0, state=state)
    vectors = together.split((rows > 0).sum(1).tolist())
    for row, items in enumerate(rows):
        alone = items[items > 0][None]
        expected, state_alone = model(alone, alone > 0, state=state[:, row : row + 1])
        torch.testing.assert_close(vectors[row], expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(new_state[:, row : row + 1], state_alone, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(together, model(rows, rows > 0)), "the state matters, or the test would prove nothing"


@pytest.mark.parametrize("rows", [[[0, 0], [0, 3]], [[0, 3], [0, 0]], [[0, 0], [0, 0]]])
def test_a_row_without_items_keeps_its_state(rows: list[list[int]]) -> None:
    model = build()
    item_ids = torch.tensor(rows)
    state = torch.randn_like(model.init_state(2))
    for keep in (item_ids > 0, torch.ones_like(item_ids) > 0):
        _, new_state = model(item_ids, keep, state=state)
        for row, items in enumerate(rows):
            assert torch.equal(new_state[:, row], state[:, row]) == (not any(items))


def test_gradients_of_a_history_in_pieces_are_those_of_the_whole_if_the_state_is_not_detached() -> None:
    model = build().double()
    history = torch.randint(1, 31, (3, 20))
    model(history, history > 0).square().sum().backward()
    whole = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    state = model.init_state(3)
    for piece in history.split(7, dim=1):
        vectors, state = model(piece, piece > 0, state=state)
        vectors.square().sum().backward(retain_graph=True)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-8, atol=1e-10)


def test_future_items_receive_zero_gradient() -> None:
    model = build()
    item_ids = torch.arange(1, 9).unsqueeze(0)  # every item once, so a row's gradient belongs to one position
    for position in range(8):
        model.zero_grad()
        model(item_ids, item_ids > 0)[position].square().sum().backward()
        gradient = model.table.weight.grad
        assert gradient is not None
        touched = gradient.abs().sum(1) > 0
        assert touched[1 : position + 2].all(), "every past item matters, or the test would prove nothing"
        assert not touched[position + 2 :].any()


def test_encode_takes_rows_of_every_length_at_once() -> None:
    model = build()
    rows = [[], [7], [1, 2, 3], [9] * 5]
    item_ids = torch.tensor([[0] * (5 - len(row)) + row for row in rows])
    together = model.encode(item_ids)
    for row, vector in zip(rows, together, strict=True):
        alone = model.encode(torch.tensor([row or [0]]))
        torch.testing.assert_close(vector, alone[0], rtol=1e-5, atol=1e-6)


def test_decay_moduli_start_inside_the_ring_and_gamma_normalises_them() -> None:
    model = LRURec(num_items=5, dim=4, hidden=500, blocks=1, dropout=0.0, ring=(0.8, 0.99))
    layer = model.recurrent[0]
    modulus = layer.decay().detach().norm(dim=0)
    assert 0.8 - 1e-5 <= float(modulus.min()) < 0.83
    assert 0.98 < float(modulus.max()) <= 0.99 + 1e-5
    torch.testing.assert_close(torch.exp(layer.gamma_log), torch.sqrt(1 - modulus**2), rtol=1e-3, atol=1e-4)


def test_initial_weights_are_truncated_normal_except_norms_and_recurrence() -> None:
    model = LRURec(num_items=2000, dim=16, hidden=32, blocks=1, dropout=0.0)
    for name, parameter in model.named_parameters():
        if "norm." in name:
            assert set(parameter.detach().unique().tolist()) <= {0.0, 1.0}, name
        elif not name.endswith(("nu_log", "theta_log", "gamma_log")):
            assert 0 < float(parameter.detach().abs().max()) <= 0.04, name
    # a normal of std 0.02 cut at two sigma has std 0.0176
    assert float(model.table.weight.detach().std()) == pytest.approx(0.0176, rel=0.02)


def test_dropout_acts_in_training_and_not_in_evaluation() -> None:
    model = build(dropout=0.5)
    item_ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model.encode(item_ids), model.encode(item_ids))
    model.train()
    assert not torch.equal(model.encode(item_ids), model.encode(item_ids))


@pytest.mark.parametrize("bad", [-1, 31])
def test_an_id_outside_the_catalogue_is_refused(bad: int) -> None:
    item_ids = torch.tensor([[1, bad, 3]])
    with pytest.raises(LrurecError, match=r"item_ids: an id is outside 0\.\.30"):
        build()(item_ids, torch.ones_like(item_ids, dtype=torch.bool))


@pytest.mark.parametrize(
    ("item_ids", "keep", "message"),
    [
        ([[1, 0, 2]], [[True, True, True]], "item_ids: padding .* after an item"),
        ([[0, 1, 2]], [[True, False, True]], "keep: a dropped position stands after a kept one"),
        ([[1, 2, 3]], [[False, True, True]], "keep: an item is dropped"),
    ],
)
def test_positions_that_are_no_left_prefix_are_refused(item_ids: list[list[int]], keep: list[list[bool]], message: str) -> None:
    with pytest.raises(LrurecError, match=message):
        build()(torch.tensor(item_ids), torch.tensor(keep))


def test_an_empty_batch_and_a_batch_of_padding_give_no_vectors_and_zero_gradients() -> None:
    model = build()
    for item_ids in (torch.zeros(0, 5, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.int64)):
        vectors = model(item_ids, item_ids > 0)
        assert vectors.shape == (0, 8)
        total, count = softmax_loss(
            vectors, model.table.weight, model.table.bias, torch.zeros(0, dtype=torch.int64), include_padding_class=False
        )
        model.zero_grad()
        total.backward()
        assert (total.item(), count) == (0.0, 0)
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_packing_makes_a_users_vectors_independent_of_the_others_in_the_batch() -> None:
    model = build()
    item_ids = torch.tensor([[0, 0, 0, 5, 6], [1, 2, 3, 4, 5], [0, 7, 8, 9, 9]])
    together = model(item_ids, item_ids > 0)
    changed = item_ids.clone()
    changed[1] = torch.tensor([9, 9, 9, 9, 9])
    others = torch.ones(11, dtype=torch.bool)
    others[2:7] = False
    assert torch.equal(model(changed, changed > 0)[others], together[others])
    assert not torch.equal(model(changed, changed > 0)[~others], together[~others])


def test_with_a_temperature_scores_are_cosines_divided_by_it() -> None:
    model = build()
    item_ids = torch.tensor([[3, 4, 5]])
    plain = model.encode(item_ids)
    model.temperature = 0.05
    scores = model.encode(item_ids) @ model.item_rows().T + model.table.bias
    expected = torch.nn.functional.cosine_similarity(plain, model.table.weight) / 0.05 + model.table.bias
    torch.testing.assert_close(scores[0], expected, rtol=1e-4, atol=1e-4)
    stepped, _ = model.step(item_ids[:, 0], model.init_state(1))
    torch.testing.assert_close(stepped, model.encode(item_ids[:, :1]), rtol=1e-4, atol=1e-4)


def test_bfloat16_products_keep_a_float32_recurrence_and_stay_near_float32() -> None:
    model = build()
    item_ids = torch.randint(1, 31, (8, 30))
    exact = model(item_ids, item_ids > 0)
    model.compute_dtype = torch.bfloat16
    rounded = model(item_ids, item_ids > 0)
    rounded.square().sum().backward()
    assert rounded.dtype == torch.float32
    assert all(
        parameter.grad is not None and parameter.grad.dtype == torch.float32
        for name, parameter in model.named_parameters()
        if name != "table.bias"
    )
    difference = ((rounded - exact).norm() / exact.norm()).item()
    assert 1e-6 < difference < 0.03, "bfloat16 rounds to three digits, and has to be in use"


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_a_checkpointed_model_keeps_less_and_gives_the_same_gradients_to_the_bit(compute_dtype: torch.dtype | None) -> None:
    item_ids = torch.tensor([[0, 0, 1, 2, 3], [4, 5, 6, 7, 8], [0, 0, 0, 0, 9]]).repeat(20, 1)
    kept_bytes, gradients = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = LRURec(
            num_items=30, dim=8, hidden=12, blocks=2, dropout=0.5, compute_dtype=compute_dtype, checkpointed=checkpointed
        )
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(1)  # of the dropout masks, which the second pass over a block has to repeat
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            vectors = model(item_ids, item_ids > 0)
        kept_bytes.append(sum(kept.values()))
        after_forward = torch.get_rng_state()
        (vectors * torch.linspace(-1, 1, vectors.numel()).reshape(vectors.shape)).sum().backward()
        assert torch.equal(torch.get_rng_state(), after_forward)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert kept_bytes[1] < kept_bytes[0] / 2
    for name, gradient in gradients[0].items():
        assert gradient is None or torch.equal(gradient, gradients[1][name]), name


def test_places_of_the_kept_positions_may_be_given() -> None:
    model, item_ids = build(), torch.tensor([[0, 0, 1, 2, 3], [4, 5, 6, 7, 8]])
    keep = item_ids > 0
    assert torch.equal(model(item_ids, keep, keep.flatten().nonzero().squeeze(1)), model(item_ids, keep))
