"""Every form of the parallel scan against the sequential one in complex float64."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec_dist.errors import LrurecError
from lrurec_dist.model import native, scan
from lrurec_dist.model.scan import parallel_scan, sequential_scan

LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 64, 200]
ON_CPU = ["native", "portable"]  # the Triton form has its own process and its own tests
HIDDEN = 5


def draw(
    lengths: list[int], hidden: int = HIDDEN, dtype: torch.dtype = torch.float64, gap: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decay, inputs, spans and initial states of sequences with `gap` rows of nobody before each."""
    torch.manual_seed(sum(lengths) + len(lengths))
    decay = torch.polar(torch.rand(hidden, dtype=torch.float64) * 0.99, torch.rand(hidden, dtype=torch.float64) * 6)
    ends = torch.tensor([length + gap for length in lengths]).cumsum(0)
    spans = torch.stack([ends - torch.tensor(lengths), ends], dim=1)
    inputs = torch.randn(int(ends[-1]), 2, hidden, dtype=torch.float64)
    initial = torch.randn(len(lengths), 2, hidden, dtype=torch.float64)
    return torch.stack([decay.real, decay.imag]).to(dtype), inputs.to(dtype), spans, initial.to(dtype)


@pytest.fixture(autouse=True)
def _compiler() -> None:
    assert native.load() is not None, "install a C compiler: the native form would go untested"


@pytest.mark.parametrize("form", ON_CPU)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("with_initial", [False, True])
def test_parallel_scan_equals_sequential_scan(form: str, length: int, with_initial: bool) -> None:
    decay, inputs, spans, initial = draw([length] * 3)
    start = initial if with_initial else None
    expected = sequential_scan(decay, inputs, spans, start)
    torch.testing.assert_close(parallel_scan(decay, inputs, spans, start, form=form), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ON_CPU)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8), gap=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_states_and_gradients_of_packed_sequences_equal_the_truth(form: str, lengths: list[int], gap: int) -> None:
    tensors = draw(lengths, gap=gap)
    decay, inputs, initial = (tensors[index].requires_grad_() for index in (0, 1, 3))
    results, gradients = [], []
    for states in (
        parallel_scan(decay, inputs, tensors[2], initial, form=form),
        sequential_scan(decay, inputs, tensors[2], initial),
    ):
        results.append(states.detach())
        weight = torch.linspace(-1, 1, states.numel(), dtype=torch.float64).view_as(states)
        loss = (states * weight).sum() + states.square().sum()
        gradients.append(torch.autograd.grad(loss, (decay, inputs, initial), allow_unused=True) if loss.requires_grad else ())
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)
    for mine, truth in zip(*gradients, strict=True) if sum(lengths) else ():
        torch.testing.assert_close(mine, truth, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("form", ON_CPU)
@pytest.mark.parametrize("lengths", [[1, 1], [2, 3], [5, 0, 1]])
def test_gradients_pass_gradcheck(form: str, lengths: list[int]) -> None:
    decay, inputs, spans, initial = draw(lengths, hidden=3, gap=1)
    leaves = [tensor.requires_grad_() for tensor in (decay, inputs, initial)]
    assert torch.autograd.gradcheck(lambda d, x, h: parallel_scan(d, x, spans, h, form=form), leaves)


@pytest.mark.parametrize("radix", [2, 3, 4, 8, 300])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_portable_recursion_is_exact_at_any_radix(monkeypatch: pytest.MonkeyPatch, radix: int, length: int) -> None:
    monkeypatch.setattr(scan, "RADIX", ((0, radix),))
    decay, inputs, spans, initial = draw([length, max(0, length - 3)])
    expected = sequential_scan(decay, inputs, spans, initial)
    torch.testing.assert_close(parallel_scan(decay, inputs, spans, initial, form="portable"), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", ON_CPU)
def test_float32_stays_within_rounding_over_a_long_sequence(form: str) -> None:
    decay, inputs, spans, _ = draw([5000, 3], hidden=8)
    single = parallel_scan(decay.float(), inputs.float(), spans, form=form)
    torch.testing.assert_close(single.double(), sequential_scan(decay, inputs, spans), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ON_CPU)
@given(cut=st.integers(1, 30), length=st.integers(31, 60))
@settings(max_examples=25, deadline=None)
def test_a_sequence_cut_in_two_carries_its_last_state_over(form: str, cut: int, length: int) -> None:
    decay, inputs, spans, initial = draw([length])
    whole = parallel_scan(decay, inputs, spans, initial, form=form)
    head = parallel_scan(decay, inputs[:cut], torch.tensor([[0, cut]]), initial, form=form)
    tail = parallel_scan(decay, inputs[cut:], torch.tensor([[0, length - cut]]), head[-1:], form=form)
    torch.testing.assert_close(torch.cat([head, tail]), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ON_CPU)
def test_a_reset_at_any_position_makes_what_follows_independent_of_what_came_before(form: str) -> None:
    decay, inputs, _, _ = draw([30])
    for reset in range(31):
        spans = torch.tensor([[0, reset], [reset, 30]])
        packed = parallel_scan(decay, inputs, spans, form=form)
        alone = parallel_scan(decay, inputs[reset:], torch.tensor([[0, 30 - reset]]), form=form)
        torch.testing.assert_close(packed[reset:], alone, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("form", ON_CPU)
def test_a_nan_stays_in_its_own_sequence_and_in_its_own_future(form: str) -> None:
    decay, inputs, spans, _ = draw([6, 6, 6])
    clean = parallel_scan(decay, inputs, spans, form=form)
    inputs[8, :, 2] = torch.nan  # third row of the second sequence
    states = parallel_scan(decay, inputs, spans, form=form)
    assert torch.equal(states[:8], clean[:8])
    assert torch.equal(states[12:], clean[12:])
    assert states[8:12, :, 2].isnan().all()
    assert torch.equal(states[8:12, :, [0, 1, 3, 4]], clean[8:12, :, [0, 1, 3, 4]])


@pytest.mark.parametrize("form", ON_CPU)
def test_rows_of_no_sequence_have_state_zero_and_gradient_zero(form: str) -> None:
    decay, inputs, spans, _ = draw([4, 4], gap=2)
    inputs.requires_grad_()
    states = parallel_scan(decay, inputs, spans, form=form)
    (gradient,) = torch.autograd.grad(states.sum(), inputs)
    nobody = [0, 1, 6, 7]
    assert states[nobody].abs().max() == 0
    assert gradient[nobody].abs().max() == 0
    assert gradient[[2, 3, 4, 5, 8, 9, 10, 11]].abs().min() > 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_native_gradients_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    decay, inputs, spans, _ = draw([700] * 8, hidden=64, dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            leaf = decay.clone().requires_grad_()
            results.append(torch.autograd.grad(parallel_scan(leaf, inputs, spans, form="native").square().sum(), leaf)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("form", ON_CPU)
def test_bfloat16_inputs_meet_a_float32_state(form: str) -> None:
    decay, inputs, spans, _ = draw([50, 7], dtype=torch.float32)
    rounded = inputs.bfloat16().requires_grad_()
    states = parallel_scan(decay, rounded, spans, form=form)
    assert states.dtype == torch.float32
    torch.testing.assert_close(states, parallel_scan(decay, rounded.detach().float(), spans, form=form))
    assert torch.autograd.grad(states.sum(), rounded)[0].dtype == torch.bfloat16


def test_inputs_are_left_untouched() -> None:
    for form in ON_CPU:
        decay, inputs, spans, initial = draw([9, 2])
        before = inputs.clone(), initial.clone()
        parallel_scan(decay, inputs, spans, initial, form=form)
        assert torch.equal(inputs, before[0])
        assert torch.equal(initial, before[1])


def test_shapes_that_do_not_fit_are_refused() -> None:
    decay, inputs, spans, initial = draw([4, 2])
    for arguments in ((decay[:, :3], inputs, spans), (decay, inputs[:, 0], spans), (decay, inputs, spans[:, 0])):
        with pytest.raises(LrurecError, match=r"decay .* inputs .* and spans"):
            parallel_scan(*arguments)
    with pytest.raises(LrurecError, match="initial"):
        parallel_scan(decay, inputs, spans, initial[:1])


@pytest.mark.parametrize("modulus", [1.0, 1.5, float("nan")])
def test_a_decay_that_does_not_decay_is_refused(modulus: float) -> None:
    decay, inputs, spans, _ = draw([4])
    decay[:, 1] = torch.tensor([modulus, 0.0])
    with pytest.raises(LrurecError, match="decay has a modulus of 1 or more, or NaN"):
        parallel_scan(decay, inputs, spans)


@pytest.mark.parametrize(
    ("spans", "message"),
    [([[0, 3], [2, 6]], "overlap"), ([[3, 1]], "ascending"), ([[0, 7]], "leave the 6 rows"), ([[-1, 2]], "leave the 6 rows")],
)
def test_spans_that_overlap_or_leave_the_rows_are_refused(spans: list[list[int]], message: str) -> None:
    decay, inputs, _, _ = draw([4, 2])
    with pytest.raises(LrurecError, match=message):
        parallel_scan(decay, inputs, torch.tensor(spans))


def test_no_sequences_and_no_rows_give_an_empty_result() -> None:
    decay, _, _, _ = draw([1])
    for form in ON_CPU:
        assert parallel_scan(decay, decay.new_zeros(0, 2, HIDDEN), torch.zeros(0, 2, dtype=torch.int64), form=form).shape == (
            0,
            2,
            HIDDEN,
        )


def test_the_form_follows_the_device_and_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scan.best_form(torch.device("cpu")) == "native"
    monkeypatch.setattr(native, "load", lambda: None)
    assert scan.best_form(torch.device("cpu")) == "portable"
    monkeypatch.setattr(scan, "_has_triton", lambda: True)
    assert scan.best_form(torch.device("cuda")) == "triton"
    monkeypatch.setattr(scan, "_has_triton", lambda: False)
    assert scan.best_form(torch.device("cuda")) == "portable"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which the test extra installs on Linux")
def test_the_triton_kernel_equals_the_truth_under_its_interpreter() -> None:
    # The interpreter is chosen when triton is imported, hence a process of its own.
    program = Path(__file__).with_name("triton_interpreted.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["states", "gradients", "bfloat16"], "every comparison ran"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which the test extra installs on Linux")
@pytest.mark.parametrize("reverse", [False, True])
def test_the_triton_kernel_compiles_for_a_gpu(monkeypatch: pytest.MonkeyPatch, reverse: bool) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns that its default will change
    # No GPU is needed to get as far as machine-independent GPU code, and it tells more than the interpreter.
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from lrurec_dist.model import scan_triton

    floats = ["decay", "inputs", "states", "initial", "output", "grad_decay"]
    signature = dict.fromkeys(floats, "*fp32") | {"inputs": "*bf16", "spans": "*i64", "hidden": "i32"}
    constants = {"with_initial": True, "reverse": reverse, "tile": scan_triton.TILE, "block": scan_triton.BLOCK}
    names = scan_triton._scan_kernel.arg_names
    source = ASTSource(
        fn=scan_triton._scan_kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    assert "ptx" in compiled.asm
