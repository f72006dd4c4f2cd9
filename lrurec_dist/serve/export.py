"""What other runtimes get beside a bundle: the model as programs, and item vectors for nearest-neighbour stores.

torch    encode.pt2, step.pt2, top_k.pt2     for `torch.export.load`
onnx     encode.onnx, step.onnx, top_k.onnx  for ONNX Runtime and others; weights above 2 GB in a file beside
vectors  item_vectors.parquet                item_id, item_key, vector: row and bias, dim + 1 wide
faiss    item_vectors.faiss                  the same vectors in an exact index of FAISS, by item_id

The programs are those of `lrurec_dist/serve/programs.py`, of any batch and any length of histories, with the item rows
that the bundle stores. A score is the product of an item's vector with the user's, behind which a 1 is appended.
"""

import importlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from lrurec_dist import PAD_ID, storage
from lrurec_dist.errors import BundleError, ConfigError
from lrurec_dist.files import new_file
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.serve.programs import Encode, Step, TopK
from lrurec_dist.stores import retried

EXPORTS = ("torch", "onnx", "vectors", "faiss")
TOP_K = 100  # items of a list, or all there are
TOLERANCE = 1e-4  # of a number, relative to the larger of it and one: what golden scores are allowed
_BATCH, _LENGTH = {0: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "faiss": ("faiss",)}  # torch.onnx needs the first two to write
_Run = Callable[..., Sequence[Tensor]]


class _Exported(NamedTuple):
    name: str
    program: nn.Module
    examples: tuple[Tensor, ...]
    inputs: dict[str, dict[int, Any]]  # with the dimensions that vary
    outputs: tuple[str, ...]


def write_exports(url: str, model: LRURec, exports: Sequence[str], *, item_keys: pa.ChunkedArray, max_length: int) -> None:
    """Write some of `EXPORTS` below the directory `url`, each read back and compared with `model` on random inputs.

    Args:
        model: with the item rows that the bundle stores, on the CPU.
        item_keys: of item_id 1, 2, …
        max_length: the programs look at so many events at most.

    Raises:
        BundleError: what was written answers otherwise than the model.
        ConfigError: an export is unknown, or needs a package that is not installed.
    """
    if unknown := sorted(set(exports) - set(EXPORTS)):
        raise ConfigError(f"bundle.exports={list(exports)}: {', '.join(unknown)} is none of {', '.join(EXPORTS)}")
    for kind in _PACKAGES.keys() & exports:
        _require(kind)
    if "vectors" in exports:
        storage.write_table(storage.join(url, "item_vectors.parquet"), _checked_vectors(model, item_keys))
    if "faiss" in exports:
        storage.write_bytes(storage.join(url, "item_vectors.faiss"), _checked_index(model))
    if kinds := [kind for kind in exports if kind in _WRITERS]:
        with tempfile.TemporaryDirectory() as folder:
            for exported in _programs(model, max_length):
                with _quiet(), torch.no_grad():
                    graph = torch.export.export(exported.program, exported.examples, dynamic_shapes=exported.inputs)
                for node in graph.graph.nodes:
                    node.meta.pop("stack_trace", None)  # paths of this machine
                for kind in kinds:
                    run = _WRITERS[kind](exported, graph, Path(folder))
                    _CHECKS[exported.name](run, model, max_length, f"exports/{exported.name} ({kind})")
            for file in sorted(Path(folder).iterdir()):
                _copy(file, storage.join(url, file.name))


def item_vectors(model: LRURec) -> Tensor:
    """(num_items, dim + 1) float32: row and bias of item_id 1, 2, …; times a user vector with a 1 behind it, the scores."""
    return torch.cat([model.item_rows()[1:], model.table.bias[1:, None]], dim=1).detach()


def _programs(model: LRURec, max_length: int) -> list[_Exported]:
    some, num_items = torch.ones(3, 4, dtype=torch.int64), model.table.num_items  # sizes of 1 would be taken for constants
    state, vectors = model.init_state(3), model.item_rows()[:1].expand(3, -1).contiguous()
    k = min(TOP_K, num_items)
    return [
        _Exported("encode", Encode(model, max_length), (some,), {"item_ids": _LENGTH}, ("vectors", "state")),
        _Exported(
            "step",
            Step(model),
            (some[:, 0].clone(), state),
            {"item_ids": _BATCH, "state": {1: torch.export.Dim.DYNAMIC}},
            ("vectors", "new_state"),
        ),
        _Exported("top_k", TopK(model, k), (vectors, some), {"vectors": _BATCH, "excluded": _LENGTH}, ("item_ids", "scores")),
    ]


def _require(kind: str) -> None:
    try:
        for package in _PACKAGES[kind]:
            importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"bundle.exports=[{kind}]: needs {error.name}; pip install 'lrurec-dist[{kind}]'") from None


def _write_torch(exported: _Exported, graph: torch.export.ExportedProgram, folder: Path) -> _Run:
    path = folder / f"{exported.name}.pt2"
    with _quiet():
        torch.export.save(graph, path)
        return torch.export.load(path).module()


def _write_onnx(exported: _Exported, graph: torch.export.ExportedProgram, folder: Path) -> _Run:
    import onnxruntime

    path = folder / f"{exported.name}.onnx"
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph,
            dynamo=True,
            verbose=False,
            input_names=list(exported.inputs),
            output_names=list(exported.outputs),
        )
        assert program is not None
        program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*tensors: Tensor) -> list[Tensor]:
        given = dict(zip(exported.inputs, (tensor.numpy() for tensor in tensors), strict=True))
        return [torch.from_numpy(array) for array in session.run(None, given)]

    return run


_WRITERS = {"torch": _write_torch, "onnx": _write_onnx}


@contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """The exporters warn of their own deprecated calls, and of libraries nobody asked for."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _copy(file: Path, url: str) -> None:
    def write() -> None:
        with file.open("rb") as source, new_file(url, file.stat().st_size) as target:
            shutil.copyfileobj(source, target, 8 << 20)

    retried("write", url, write)


def _some_histories(num_items: int, max_length: int) -> list[Tensor]:
    """Batches of padded histories: one event, none, many rows, as long as the window, and longer."""
    draw = torch.Generator().manual_seed(0)
    batches = []
    for batch, length in ((1, 1), (1, 2), (3, 1), (5, min(max_length, 64)), (2, max_length), (3, max_length + 3)):
        item_ids = torch.randint(1, num_items + 1, (batch, length), generator=draw)
        padding = torch.randint(0, length + 1, (batch,), generator=draw)
        padding[0] = 0
        padding[-1] = length if batch > 1 else 0
        batches.append(torch.where(torch.arange(length) < padding[:, None], PAD_ID, item_ids))
    return batches


def _check_encode(run: _Run, model: LRURec, max_length: int, what: str) -> None:
    for item_ids in _some_histories(model.table.num_items, max_length):
        recent = item_ids[:, -max_length:]
        _compare(run(item_ids), (model.encode(recent), state_after(model, recent)), what)


def _check_step(run: _Run, model: LRURec, max_length: int, what: str) -> None:
    for item_ids in _some_histories(model.table.num_items, max_length):
        state, one = state_after(model, item_ids), item_ids[:, -1].clamp(min=1)
        _compare(run(one, state), model.step(one, state), what)


def _check_top_k(run: _Run, model: LRURec, max_length: int, what: str) -> None:
    for item_ids in _some_histories(model.table.num_items, max_length):
        vectors = model.encode(item_ids)
        found, scores = run(vectors, item_ids)
        expected = torch.addmm(model.table.bias, vectors, model.item_rows().T).scatter(1, item_ids, -torch.inf)
        expected[:, PAD_ID] = -torch.inf
        _compare_best(found, scores, expected, what)


def _compare_best(found: Tensor, scores: Tensor, expected: Tensor, what: str) -> None:
    """Lists (users, k) of item ids and scores with all scores (users, num_items + 1), -inf where an item is no candidate."""
    best = expected.topk(scores.shape[1]).values
    present = best > -torch.inf
    if not torch.equal(present, found != PAD_ID):
        raise BundleError(f"{what}: answers with another number of items than the model; the export is wrong")
    # in the places of ties any of the tied items may stand, but its own score is the best that is left
    own = expected.gather(1, found)
    distinct = all(len(set(row)) == len(row) for row in ([item for item in row if item] for row in found.tolist()))
    if not distinct:
        raise BundleError(f"{what}: names an item twice; the export is wrong")
    _compare((own[present], scores[present]), (best[present], best[present]), what)


_CHECKS = {"encode": _check_encode, "step": _check_step, "top_k": _check_top_k}


def _checked_vectors(model: LRURec, item_keys: pa.ChunkedArray) -> pa.Table:
    vectors = item_vectors(model)
    for item_ids in _some_histories(model.table.num_items, 5):
        users = model.encode(item_ids)
        product = torch.cat([users, torch.ones(len(users), 1)], dim=1) @ vectors.T
        _compare((product,), (torch.addmm(model.table.bias, users, model.item_rows().T)[:, 1:],), "exports/item_vectors.parquet")
    flat = pa.array(vectors.flatten().numpy())
    ids = pa.array(range(1, len(vectors) + 1), pa.int64())
    return pa.table({"item_id": ids, "item_key": item_keys, "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])})


def _checked_index(model: LRURec) -> bytes:
    """A FAISS index that compares with every item, as `faiss.read_index` takes it; read back, and its lists compared."""
    import faiss

    vectors, what = item_vectors(model).numpy(), "exports/item_vectors.faiss"
    index = faiss.IndexIDMap(faiss.IndexFlatIP(vectors.shape[1]))
    index.add_with_ids(vectors, np.arange(1, len(vectors) + 1))
    data = faiss.serialize_index(index)
    read, k = faiss.deserialize_index(data), min(TOP_K, len(vectors))
    for item_ids in _some_histories(model.table.num_items, 5):
        users = model.encode(item_ids)
        scores, found = read.search(torch.cat([users, torch.ones(len(users), 1)], dim=1).numpy(), k)
        expected = torch.addmm(model.table.bias, users, model.item_rows().T)
        expected[:, PAD_ID] = -torch.inf
        _compare_best(torch.from_numpy(found), torch.from_numpy(scores), expected, what)
    return bytes(data.tobytes())


def state_after(model: LRURec, item_ids: Tensor) -> Tensor:
    """(blocks, batch, 2, hidden): the state after padded histories item_ids (batch, length)."""
    found: tuple[Tensor, Tensor] = model(item_ids, item_ids != PAD_ID, state=model.init_state(len(item_ids)))
    return found[1]


def _compare(found: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        fits = ours.shape == theirs.shape and ours.dtype == theirs.dtype
        if not fits or not ((ours - theirs).abs() <= TOLERANCE * theirs.abs().clamp(min=1)).all():
            off = f"by {float((ours - theirs).abs().max()):.2g}, allowed {TOLERANCE:g} relative" if fits else "in shape or type"
            raise BundleError(f"{what}: answers otherwise than the model, {off}; the export is wrong")
