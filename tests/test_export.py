"""What other runtimes get: the model's own answers, at any batch and length, or nothing at all."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import BundleError, ConfigError
from lrurec_dist.evaluate.ranking import top_k
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.serve import export
from lrurec_dist.serve.bundle import load_bundle
from lrurec_dist.serve.export import state_after, write_exports
from lrurec_dist.serve.programs import Encode, Step, TopK
from lrurec_dist.serve.recommender import Recommender
from tests.test_bundle import dataset as dataset
from tests.test_bundle import write
from tests.test_recommender import MAX_LENGTH, NUM_ITEMS, SHAPE, build_model

# float32 sums in another order, over a dozen products; scores here are below 100
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
KEYS = pa.chunked_array([[f"i{item}" for item in range(NUM_ITEMS)]])


def padded(*histories: list[int], length: int) -> Tensor:
    return torch.tensor([[0] * (length - len(history)) + history for history in histories])


@pytest.fixture(scope="module")
def cosine() -> LRURec:
    """Scores by cosine, and decay moduli near one, of which rounding shows soonest."""
    torch.manual_seed(5)
    model = LRURec(**{**SHAPE, "ring": (0.999, 0.9999), "temperature": 0.2})
    with torch.no_grad():
        model.table.weight.mul_(30)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("max_length", [1, 2, 3, 7, 64, 200])
def test_encode_equals_the_model_at_every_length_and_padding(cosine: LRURec, max_length: int) -> None:
    program = Encode(cosine, max_length)
    draw = torch.Generator().manual_seed(1)
    for length in {1, 2, max_length, max_length + 5}:
        item_ids = torch.randint(1, NUM_ITEMS + 1, (6, length), generator=draw)
        item_ids[torch.arange(length) < torch.tensor([0, 1, 2, length - 1, length, length])[:, None].clamp(max=length)] = 0
        vectors, state = program(item_ids)
        torch.testing.assert_close(vectors, cosine.encode(item_ids[:, -max_length:]), **CLOSE)
        torch.testing.assert_close(state, state_after(cosine, item_ids[:, -max_length:]), rtol=1e-5, atol=1e-4)  # sums of 200


def test_steps_from_an_encoded_state_equal_the_model_on_the_whole_history(cosine: LRURec) -> None:
    history = [3, 7, 1, 20, 5, 5, 9]
    vectors, state = Encode(cosine, 3)(padded(history[:3], [], length=4))
    for place in range(3, len(history)):
        vectors, state = Step(cosine)(torch.tensor([history[place]] * 2), state)
    expected = cosine.encode(padded(history, history[3:], length=7))
    torch.testing.assert_close(vectors, expected, **CLOSE)


@pytest.mark.parametrize("k", [1, 5, NUM_ITEMS])
def test_lists_equal_those_of_the_ranking_with_what_is_excluded(cosine: LRURec, k: int) -> None:
    histories = padded([1, 2, 3], [], list(range(1, NUM_ITEMS)), length=NUM_ITEMS)
    vectors = cosine.encode(histories)
    rows, places = (histories > 0).nonzero(as_tuple=True)
    ids, scores = top_k(vectors, cosine.item_rows(), cosine.table.bias, k, rows, histories[rows, places])
    found, best = TopK(cosine, k)(vectors, histories)
    assert torch.equal(found, ids)
    torch.testing.assert_close(best, scores, **CLOSE)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, dataset: SequenceDataset) -> Path:
    """A bundle with all exports, of rows that were rounded."""
    return Path(
        write(
            str(tmp_path_factory.mktemp("registry")), dataset, table_dtype="int8", exports=("torch", "onnx", "vectors", "faiss")
        )
    )


@pytest.fixture(params=["pt2", "onnx"])
def program(request: pytest.FixtureRequest, exported: Path) -> Callable[[str], Callable[..., list[Tensor]]]:
    """What opens a program of the bundle by its name, as whoever serves it would."""

    def opened(name: str) -> Callable[..., list[Tensor]]:
        path = exported / "exports" / f"{name}.{request.param}"
        if request.param == "pt2":
            return torch.export.load(path).module()
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]

        def run(*tensors: Tensor) -> list[Tensor]:
            given = dict(zip(names, (tensor.numpy() for tensor in tensors), strict=True))
            return [torch.from_numpy(array) for array in session.run(None, given)]

        return run

    return opened


def test_programs_of_a_bundle_answer_as_its_recommender(program: Any, exported: Path) -> None:
    encode, step, best = program("encode"), program("step"), program("top_k")
    recommender, bundle = Recommender.load(str(exported)), load_bundle(str(exported))
    for histories in ([[1, 2, 3], [4], [], [5, 6, 7, 8, 9]], [[7]], [[1, 2, 3, 4, 5, 6, 7, 8]] * 2):
        item_ids = padded(*histories, length=max(map(len, histories)))
        vectors, state = encode(item_ids)
        found, scores = best(vectors, item_ids)
        keys = [[bundle.item_keys[item - 1].as_py() for item in history] for history in histories]
        expected, expected_scores = recommender.top_ids(keys, found.shape[1])
        torch.testing.assert_close(scores, expected_scores, **CLOSE)
        assert torch.equal(found, expected), "in another order, though nothing is tied here"
        one = torch.tensor([11] * len(histories))
        for ours, theirs in zip(step(one, state), bundle.model.step(one, state), strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)


def test_exports_are_listed_in_the_manifest_and_verified(exported: Path) -> None:
    bundle = load_bundle(str(exported))
    names = {name for name in bundle.manifest["files"] if name.startswith("exports/")}
    programs = {f"exports/{name}.{kind}" for name in ("encode", "step", "top_k") for kind in ("pt2", "onnx")}
    assert names == {"exports/item_vectors.parquet", "exports/item_vectors.faiss", *programs}
    assert bundle.manifest["exports"] == ["torch", "onnx", "vectors", "faiss"]
    file = exported / "exports" / "step.onnx"
    data = file.read_bytes()
    try:
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(BundleError, match="changed after the commit"):
            load_bundle(str(exported))
    finally:
        file.write_bytes(data)


def test_onnx_programs_are_one_file_of_standard_operations_on_real_numbers(exported: Path) -> None:
    for name in ("encode", "step", "top_k"):
        model = onnx.load(str(exported / "exports" / f"{name}.onnx"))
        onnx.checker.check_model(model)
        assert {node.domain for node in model.graph.node} == {""}
        types = {value.type.tensor_type.elem_type for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]}
        assert not types & {onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128}


def test_a_product_with_the_item_vectors_is_the_score(exported: Path) -> None:
    model = load_bundle(str(exported)).model
    table = pq.read_table(exported / "exports" / "item_vectors.parquet")
    vectors = torch.tensor(table["vector"].to_pylist())
    users = model.encode(padded([1, 2], [], [9, 9, 9], length=3))
    scores = torch.cat([users, torch.ones(3, 1)], dim=1) @ vectors.T
    torch.testing.assert_close(scores, (users @ model.item_rows().T + model.table.bias)[:, 1:], **CLOSE)
    assert table["item_id"].to_pylist() == list(range(1, NUM_ITEMS + 1))
    assert table["item_key"][4].as_py() == "i005"
    assert vectors.shape == (NUM_ITEMS, SHAPE["dim"] + 1)


def test_the_index_names_the_items_of_the_recommender_in_its_order(exported: Path) -> None:
    index = faiss.read_index(str(exported / "exports" / "item_vectors.faiss"))
    recommender, histories = Recommender.load(str(exported)), [["i001", "i002"], ["i009"], []]
    users = torch.stack([state.vector for state in recommender.encode(histories)])
    scores, ids = index.search(torch.cat([users, torch.ones(3, 1)], dim=1).numpy(), NUM_ITEMS)
    bundle = load_bundle(str(exported))
    expected = (users @ bundle.model.item_rows().T + bundle.model.table.bias)[:, 1:].sort(dim=1, descending=True)
    assert (expected.values.diff(dim=1) < -1e-4).all(), "nothing is tied here"
    assert torch.equal(torch.from_numpy(ids), expected.indices + 1)
    torch.testing.assert_close(torch.from_numpy(scores), expected.values, **CLOSE)


def test_an_index_that_disagrees_with_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, right = build_model(), export.item_vectors
    monkeypatch.setattr(export, "item_vectors", lambda model: right(model).roll(1, 0))
    with pytest.raises(BundleError, match=r"exports/item_vectors\.faiss: answers otherwise .* the export is wrong"):
        write_exports(str(tmp_path), model, ["faiss"], item_keys=KEYS, max_length=MAX_LENGTH)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["encode", "step", "top_k"])
def test_a_program_that_disagrees_with_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    other = build_model()
    with torch.no_grad():
        other.table.bias[3] += 1 if wrong == "top_k" else 0
        other.recurrent[1].theta_log += 0.01
    programs = {one.name: one for one in export._programs(other, MAX_LENGTH)}
    monkeypatch.setattr(export, "_programs", lambda *_: [programs[wrong]])
    monkeypatch.setitem(export._WRITERS, "torch", lambda exported, *_: exported.program)  # writing is what is slow
    with pytest.raises(BundleError, match=f"exports/{wrong} .* the export is wrong"):
        write_exports(str(tmp_path / "exports"), build_model(), ["torch"], item_keys=KEYS, max_length=MAX_LENGTH)
    assert not (tmp_path / "exports").exists()


def test_an_unknown_export_and_a_missing_package_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="tensorrt is none of torch, onnx, vectors, faiss"):
        write_exports(str(tmp_path), build_model(), ["tensorrt"], item_keys=KEYS, max_length=MAX_LENGTH)
    for kind, package in (("onnx", "onnxruntime"), ("faiss", "faiss")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigError, match=rf"needs {package}; pip install 'lrurec-dist\[{kind}\]'"):
            write_exports(str(tmp_path), build_model(), [kind], item_keys=KEYS, max_length=MAX_LENGTH)
