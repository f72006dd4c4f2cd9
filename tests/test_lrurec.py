"""The model against the original's recorded figures, the slow truth, and its own promises."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lrurec_dist.model.loss import softmax_loss
from lrurec_dist.model.lrurec import LRURec
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


def from_original(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, torch.Tensor]:
    """Tensors under the original's names, as this package names and stores them.

    Re(C h) = Cr hr - Ci hi: the imaginary part of C is stored negated, and so is its gradient.
    """

    def get(name: str) -> torch.Tensor:
        return torch.from_numpy(arrays[prefix + name])

    ours = {
        "table.weight": get("embedding.token.weight"),
        "table.bias": get("model.bias"),
        "norm.weight": get("embedding.layer_norm.weight"),
        "norm.bias": get("embedding.layer_norm.bias"),
    }
    for block in range(BLOCKS):
        theirs = f"model.lru_blocks.{block}."
        layer, ffn = f"recurrent.{block}.", f"feed_forward.{block}."
        ours[layer + "nu_log"], ours[layer + "theta_log"], ours[layer + "gamma_log"] = get(theirs + "lru_layer.params_log")
        in_weight = get(theirs + "lru_layer.in_proj.weight")
        ours[layer + "in_proj.weight"] = torch.stack([in_weight.real, in_weight.imag], dim=1).flatten(0, 1)
        ours[layer + "in_proj.bias"] = torch.view_as_real(get(theirs + "lru_layer.in_proj.bias")).flatten()
        out_weight = get(theirs + "lru_layer.out_proj.weight")
        ours[layer + "out_proj.weight"] = torch.stack([out_weight.real, -out_weight.imag], dim=2).flatten(1)
        ours[layer + "out_proj.bias"] = get(theirs + "lru_layer.out_proj.bias").real
        for kind in ("weight", "bias"):
            ours[layer + f"norm.{kind}"] = get(theirs + f"lru_layer.layer_norm.{kind}")
            ours[ffn + f"norm.{kind}"] = get(theirs + f"feed_forward.layer_norm.{kind}")
            ours[ffn + f"w_1.{kind}"] = get(theirs + f"feed_forward.w_1.{kind}")
            ours[ffn + f"w_2.{kind}"] = get(theirs + f"feed_forward.w_2.{kind}")
    return ours


@pytest.fixture
def original(golden: dict[str, np.ndarray]) -> LRURec:
    classes, dim = golden["param/embedding.token.weight"].shape
    hidden = golden["param/model.lru_blocks.0.lru_layer.params_log"].shape[1]
    model = LRURec(num_items=classes - 1, dim=dim, hidden=hidden, blocks=BLOCKS, dropout=0.0)
    model.load_state_dict(from_original(golden, "param/"))
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
    expected = from_original(golden, "grad/")
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
    modulus = layer.decay().detach().abs()
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
