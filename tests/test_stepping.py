"""One event more: the model's own step, by a kernel and without one, and no drift over ten thousand of them."""

import pytest
import torch

from lrurec_dist.errors import LrurecError
from lrurec_dist.model import native
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.model.stepping import Stepper
from lrurec_dist.serve.encoding import extend_states, initial_states

NUM_ITEMS = 30
# widths below a register, above and between the kernel's blocks of 64 outputs
SHAPES = [(6, 8, 2, 0.0), (64, 128, 2, 0.0), (72, 40, 3, 0.1), (1, 1, 1, 0.0)]


def build_model(dim: int, hidden: int, blocks: int, temperature: float, ring: tuple[float, float] = (0.8, 0.99)) -> LRURec:
    torch.manual_seed(4)
    model = LRURec(num_items=NUM_ITEMS, dim=dim, hidden=hidden, blocks=blocks, dropout=0.0, temperature=temperature, ring=ring)
    for name, parameter in model.named_parameters():
        if not name.endswith(("_log", "norm.weight")):
            torch.nn.init.normal_(parameter, std=0.3)  # so that every part has its say
    return model.eval().requires_grad_(False)


@pytest.fixture(params=["kernel", "portable"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "portable":
        monkeypatch.setattr(native, "load", lambda: None)
    elif native.load() is None:
        pytest.skip("no C compiler here")


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(("dim", "hidden", "blocks", "temperature"), SHAPES)
def test_a_step_is_the_models_step(dim: int, hidden: int, blocks: int, temperature: float) -> None:
    model = build_model(dim, hidden, blocks, temperature)
    states, item_ids = torch.randn(5, blocks, 2, hidden), torch.tensor([1, 2, 30, 7, 7])
    before = states.clone()
    vectors, after = Stepper(model).step(item_ids, states)
    expected, expected_after = model.step(item_ids, states.transpose(0, 1))
    assert torch.equal(states, before), "the states given are left as they are"
    # float32 sums in another order, of at most 4 x 72 products
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(after, expected_after.transpose(0, 1), rtol=1e-4, atol=2e-5)


@pytest.mark.skipif(native.load() is None, reason="no C compiler here")
def test_a_users_step_does_not_depend_on_who_is_stepped_beside_it() -> None:
    stepper = Stepper(build_model(64, 128, 2, 0.0))
    states, item_ids = torch.randn(9, 2, 2, 128), torch.arange(1, 10)
    vectors, after = stepper.step(item_ids, states)
    for user in range(9):
        vector, state = stepper.step(item_ids[user : user + 1], states[user : user + 1])
        assert torch.equal(vector[0], vectors[user])
        assert torch.equal(state[0], after[user])


@pytest.mark.parametrize("item_id", [0, -1, NUM_ITEMS + 1])
def test_an_item_outside_the_catalogue_is_refused(item_id: int) -> None:
    with pytest.raises(LrurecError, match=r"outside 1\.\.30"):
        Stepper(build_model(6, 8, 2, 0.0)).step(torch.tensor([item_id]), torch.zeros(1, 2, 2, 8))


@pytest.mark.parametrize("shape", [(1, 2, 2, 4), (1, 1, 2, 8), (2, 2, 2, 8)])
def test_states_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(LrurecError, match=r"have to be \(users, blocks, 2, hidden\) = \(1, 2, 2, 8\)"):
        Stepper(build_model(6, 8, 2, 0.0)).step(torch.tensor([1]), torch.zeros(shape))


@pytest.mark.parametrize(("steps", "ring"), [(10_000, (0.8, 0.99)), (2_000, (0.999, 0.9999))])
def test_states_do_not_drift_from_the_encoding_of_the_whole_history(steps: int, ring: tuple[float, float]) -> None:
    model = build_model(64, 128, 2, 0.0, ring)
    stepper = Stepper(model)
    history = torch.randint(1, NUM_ITEMS + 1, (steps,), generator=torch.Generator().manual_seed(1))
    states, vectors = initial_states(model, 1)
    for item_id in history.split(1):
        vectors, states = stepper.step(item_id, states)
    whole, whole_vectors = extend_states(model, *initial_states(model, 1), [history])
    # relative to the largest entry; a modulus below 1 forgets rounding as it forgets events, so that it does not add up
    for found, expected in ((states, whole), (vectors, whole_vectors)):
        drift = float((found - expected).abs().max() / expected.abs().max())
        print(f"{steps} steps, ring {ring}: {drift:.1e}")
        assert drift < 2e-5  # measured 5e-6 and below


@pytest.mark.parametrize("events_at_once", [1, 3, 7, 1 << 15])
def test_histories_in_pieces_make_the_states_of_whole_ones(monkeypatch: pytest.MonkeyPatch, events_at_once: int) -> None:
    monkeypatch.setattr("lrurec_dist.serve.encoding.EVENTS_AT_ONCE", events_at_once)
    model = build_model(6, 8, 2, 0.0)
    histories = [torch.randint(1, NUM_ITEMS + 1, (length,)) for length in (0, 1, 12, 5, 0, 3)]
    states, vectors = extend_states(model, *initial_states(model, len(histories)), histories)
    for user, history in enumerate(histories):
        expected = model.encode(history[None] if len(history) else torch.zeros(1, 1, dtype=torch.int64))
        torch.testing.assert_close(vectors[user], expected[0], rtol=1e-4, atol=1e-5)
        state = model.init_state(1)
        for item_id in history:
            _, state = model.step(item_id[None], state)
        torch.testing.assert_close(states[user], state[:, 0], rtol=1e-4, atol=1e-5)
