"""Checkpoints: what is written, read, kept, chosen and refused."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lrurec_dist import storage
from lrurec_dist.errors import CheckpointError, TryAgainError
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.train import tensor_file
from lrurec_dist.train.checkpoint import (
    Progress,
    Subject,
    checkpoint_url,
    load_model,
    parameter_names,
    rank_file,
    read_checkpoint_manifest,
    write_manifest,
)
from lrurec_dist.train.checkpoint_index import choose_checkpoint, find_checkpoint, keep_checkpoints, kept_checkpoints
from lrurec_dist.train.pieces import Piece, PieceReader, pieces_of_rank
from lrurec_dist.train.tensor_file import TensorFile, write_tensors
from tests.stores import passing

SHAPE = {"num_items": 7, "dim": 4, "hidden": 6, "blocks": 1, "dropout": 0.2, "ring": [0.8, 0.99]}
SUBJECT = Subject(model=SHAPE, num_items=7, catalogue_fingerprint="feed", dataset_identity="cafe", settings={"model.dim": 4})


def write_pieces(url: str, ranks: list[Iterable[Piece]]) -> dict[str, Any]:
    """What several ranks would write, without the ranks; returns the manifest's `tensors` and `files`."""
    tensors: dict[str, Any] = {}
    files = {}
    for rank, pieces in enumerate(ranks):
        held = list(pieces)
        file = rank_file(rank, len(ranks))
        values = {piece.name: piece.values.contiguous() for piece in held}
        files[file] = write_tensors(storage.join(url, file), values)
        for piece in held:
            dtype = tensor_file.dtype_name(piece.values.dtype)
            tensor = tensors.setdefault(piece.name, {"shape": list(piece.shape), "dtype": dtype, "pieces": []})
            rows = [piece.rows.start, piece.rows.stop, piece.rows.step]
            tensor["pieces"].append({"file": file, "key": piece.name, "rows": rows})
    return {"tensors": tensors, "files": files}


def model_of(step: int) -> LRURec:
    torch.manual_seed(step)
    return LRURec(**SHAPE)


def tensors_of(model: LRURec) -> list[tuple[str, Tensor]]:
    named = [(name, value.detach()) for name, value in model.named_parameters()]
    return named + [(f"exp_avg/{name}", value + 1) for name, value in named]


def save_step(run: str, step: int, recall: float | None = None, *, keep: int = 2, indexed: bool = True) -> LRURec:
    model = model_of(step)
    url = checkpoint_url(run, step)
    written = write_pieces(url, [pieces_of_rank(tensors_of(model), rank, 2) for rank in range(2)])
    progress = Progress(step=step, epoch=2, batches_into_epoch=5)
    write_manifest(
        url, subject=SUBJECT, progress=progress, validation={"recall@10": recall} if recall is not None else None, **written
    )
    if indexed:
        keep_checkpoints(run, step, recall, latest=keep, damaged=frozenset())
    return model


def directories(run: str) -> list[str]:
    return sorted(path.name for path in (Path(run) / "checkpoints").iterdir())


def change_a_byte(url: str, rank: int = 1) -> None:
    file = Path(url) / rank_file(rank, 2)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def truncate(url: str) -> None:
    file = Path(url) / rank_file(0, 2)
    file.write_bytes(file.read_bytes()[:-5])


def tear_the_manifest(url: str) -> None:
    file = Path(url) / storage.MANIFEST
    file.write_bytes(file.read_bytes()[:100])


def lose_the_manifest(url: str) -> None:
    (Path(url) / storage.MANIFEST).unlink()


def lose_a_file(url: str) -> None:
    (Path(url) / rank_file(1, 2)).unlink()


DAMAGES = {
    change_a_byte: "changed after the commit",
    truncate: "changed after the commit",
    tear_the_manifest: "is not JSON",
    lose_the_manifest: "was never committed",
    lose_a_file: "is missing",
}


def test_a_written_file_is_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(5, 3),
        "bits": torch.tensor([True, False]),
        "half": torch.randn(2, 2, 2).bfloat16(),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(7),
    }
    entry = write_tensors(str(tmp_path / "file"), tensors)
    read = safetensors.torch.load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)
    storage.verify_file(str(tmp_path), "file", entry)


@pytest.mark.parametrize("chunk_bytes", [1, 40, 8 << 20])  # less than a row, a few rows, everything
@pytest.mark.parametrize(
    "rows",
    [slice(None), slice(3, 9), slice(2, None, 3), slice(1, 11, 5), slice(0, 1), slice(4, 4), slice(12, None), slice(1, 12, 4)],
)
def test_any_rows_come_from_any_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, rows: slice) -> None:
    monkeypatch.setattr(tensor_file, "_CHUNK_BYTES", chunk_bytes)
    whole = torch.randn(13, 3)
    layouts = {
        "one": [range(13)],
        "stretches": [range(5), range(5, 6), range(6, 13)],
        "dealt": [range(rank, 13, 3) for rank in range(3)],
        "mixed": [range(0, 6, 2), range(1, 6, 2), range(6, 13)],
    }
    for name, layout in layouts.items():
        ranks = [[Piece("t", (13, 3), held, whole[held.start : held.stop : held.step])] for held in layout]
        tensors = write_pieces(str(tmp_path / name), ranks)["tensors"]
        with PieceReader(str(tmp_path / name), tensors) as reader:
            assert torch.equal(reader.read("t", rows), whole[rows]), name


def test_rows_are_read_without_the_rest_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(100_000, 8)
    tensors = write_pieces(str(tmp_path), [[Piece("t", (100_000, 8), range(100_000), whole)]])["tensors"]
    sizes: list[int] = []
    read = tensor_file.RetriedReader.read

    def counted(self: Any, size: int = -1) -> bytes:
        sizes.append(size)
        return read(self, size)

    monkeypatch.setattr(tensor_file.RetriedReader, "read", counted)
    with PieceReader(str(tmp_path), tensors) as reader:
        assert torch.equal(reader.read("t", slice(50_000, 50_010)), whole[50_000:50_010])
        assert sum(sizes[2:]) == 10 * 8 * 4  # after the header and its length
        sizes.clear()
        monkeypatch.setattr(tensor_file, "_CHUNK_BYTES", 10_000)  # rows lie 32,000 bytes apart
        assert torch.equal(reader.read("t", slice(7, None, 1000)), whole[7::1000])
        assert sum(sizes) == 100 * 8 * 4


def test_a_row_that_no_piece_holds_is_named(tmp_path: Path) -> None:
    tensors = write_pieces(str(tmp_path), [[Piece("t", (9, 2), range(0, 9, 2), torch.randn(5, 2))]])["tensors"]
    with PieceReader(str(tmp_path), tensors) as reader:
        assert reader.read("t", slice(2, 9, 4)).shape == (2, 2)
        with pytest.raises(CheckpointError, match="4 of 9 rows of t are in no piece, the first is 1"):
            reader.read("t")
        with pytest.raises(CheckpointError, match="has no tensor u"):
            reader.read("u")


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_write_every_row_once_and_about_as_many_bytes_each(world_size: int) -> None:
    tensors = [
        ("table", torch.empty(5003, 16)),
        ("bias", torch.empty(5003)),
        *((f"small{number}", torch.empty(100)) for number in range(30)),
        ("few_rows", torch.empty(2, 30_000)),
        ("scalar", torch.tensor(1.0)),
    ]
    written: dict[str, list[int]] = {name: [] for name, _ in tensors}
    sizes = []
    for rank in range(world_size):
        pieces = list(pieces_of_rank(tensors, rank, world_size))
        for piece in pieces:
            assert len(piece.values) == len(piece.rows)
            written[piece.name] += piece.rows
        sizes.append(sum(piece.values.nbytes for piece in pieces))
    assert written == {name: list(range(len(tensor) if tensor.dim() else 1)) for name, tensor in tensors}
    assert max(sizes) - min(sizes) <= 2 * 30_000 * 4  # the largest that is not split


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    model = save_step(str(tmp_path), 500, 0.25)
    url = find_checkpoint(str(tmp_path), "best")
    assert url == checkpoint_url(str(tmp_path), 500)
    manifest = read_checkpoint_manifest(url)
    assert Progress(**manifest["progress"]) == Progress(step=500, epoch=2, batches_into_epoch=5)
    assert parameter_names(manifest) == sorted(name for name, _ in model.named_parameters())
    with PieceReader(url, manifest["tensors"]) as reader:
        for name, value in tensors_of(model):
            assert torch.equal(reader.read(name), value)
    item_ids = torch.tensor([[1, 2, 3]])
    loaded = load_model(url)
    assert not loaded.training
    assert torch.equal(loaded.encode(item_ids), model.eval().encode(item_ids))


def test_a_scalar_is_kept(tmp_path: Path) -> None:
    tensors = write_pieces(str(tmp_path), [pieces_of_rank([("scale", torch.tensor(2.5))], 0, 1)])["tensors"]
    with PieceReader(str(tmp_path), tensors) as reader:
        assert reader.read("scale").tolist() == 2.5


def test_the_latest_few_and_the_best_are_kept(tmp_path: Path) -> None:
    run = str(tmp_path)
    for step, recall in ((100, 0.1), (200, 0.3), (300, 0.3), (350, None), (400, 0.2), (450, None)):
        save_step(run, step, recall, keep=2)
    assert find_checkpoint(run, "best") == checkpoint_url(run, 200), "of two equal ones the earlier"
    assert find_checkpoint(run, "last") == checkpoint_url(run, 450)
    assert directories(run) == ["index.json", "step_000200", "step_000400", "step_000450"]
    index = storage.read_json(str(tmp_path / "checkpoints" / "index.json"))
    assert index["checkpoints"] == [
        {"step": 200, "recall@10": 0.3},
        {"step": 400, "recall@10": 0.2},
        {"step": 450, "recall@10": None},
    ]
    save_step(run, 500, 0.4, keep=1)
    assert directories(run) == ["index.json", "step_000500"]


def test_without_checkpoints_none_is_found(tmp_path: Path) -> None:
    assert find_checkpoint(str(tmp_path), "best") is None
    assert find_checkpoint(str(tmp_path), "last") is None
    assert choose_checkpoint(str(tmp_path), None) is None


@pytest.mark.parametrize("index", ["before", "torn", "missing"])
def test_a_checkpoint_that_the_index_does_not_name_is_not_lost(tmp_path: Path, index: str) -> None:
    run, file = str(tmp_path), tmp_path / "checkpoints" / "index.json"
    save_step(run, 100, 0.1)
    save_step(run, 200, 0.3, indexed=False)  # killed between the two writes
    if index == "torn":
        file.write_bytes(file.read_bytes()[:20])
    elif index == "missing":
        file.unlink()
    assert kept_checkpoints(run) == {100: 0.1, 200: 0.3}
    assert find_checkpoint(run, "best") == checkpoint_url(run, 200)
    choice = choose_checkpoint(run, None)
    assert choice is not None
    assert (choice.url, choice.best, choice.notes) == (checkpoint_url(run, 200), (0.3, 200), [])


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path: Path, damage: Any, reason: str) -> None:
    run = str(tmp_path)
    save_step(run, 100, 0.1)
    save_step(run, 200, 0.3)
    damage(checkpoint_url(run, 200))
    choice = choose_checkpoint(run, None)
    assert choice is not None
    assert (choice.url, choice.manifest["progress"]["step"]) == (checkpoint_url(run, 100), 100)
    assert choice.best == (0.1, 100), "what is damaged is no best"
    (note,) = choice.notes
    assert "step_000200" in note
    assert reason in note
    # deleted, but only once something newer is whole, so that it could still be restored
    assert "step_000200" in directories(run)
    save_step(run, 150, None, indexed=False)
    keep_checkpoints(run, 150, None, latest=2, damaged=choice.damaged)
    assert directories(run) == ["index.json", "step_000100", "step_000150"]
    assert find_checkpoint(run, "best") == checkpoint_url(run, 100)


def test_an_older_best_that_is_damaged_gives_way_to_the_next_best(tmp_path: Path) -> None:
    run = str(tmp_path)
    for step, recall in ((100, 0.3), (200, 0.2), (300, 0.1)):
        save_step(run, step, recall)
    truncate(checkpoint_url(run, 100))
    choice = choose_checkpoint(run, None)
    assert choice is not None
    assert (choice.url, choice.best, choice.damaged) == (checkpoint_url(run, 300), (0.2, 200), {100})
    assert "the next best stands in" in choice.notes[0]
    save_step(run, 400, None, indexed=False)
    keep_checkpoints(run, 400, None, latest=2, damaged=choice.damaged)
    assert kept_checkpoints(run) == {200: 0.2, 300: 0.1, 400: None}


def test_where_no_checkpoint_is_whole_all_are_named_with_a_way_out(tmp_path: Path) -> None:
    run = str(tmp_path)
    save_step(run, 100, 0.1)
    save_step(run, 200, 0.3)
    truncate(checkpoint_url(run, 100))
    lose_the_manifest(checkpoint_url(run, 200))
    with pytest.raises(CheckpointError, match=r"none of the 2 .*step_000200.*step_000100.*train\.resume=never") as raised:
        choose_checkpoint(run, None)
    assert not isinstance(raised.value, TryAgainError)


def test_what_a_write_left_that_was_interrupted_is_no_checkpoint(tmp_path: Path) -> None:
    run = str(tmp_path)
    save_step(run, 100, 0.1, indexed=False)
    lose_the_manifest(checkpoint_url(run, 100))
    assert choose_checkpoint(run, None) is None, "training begins at the beginning"
    save_step(run, 50, 0.1)
    assert directories(run) == ["index.json", "step_000050"]


@pytest.mark.usefixtures("no_wait")
def test_a_store_that_fails_in_passing_damages_no_checkpoint(faulty: Any, tmp_path: Path) -> None:
    url, faults = faulty
    save_step(str(tmp_path), 100, 0.1)
    for good in (0, 2):  # the index and the manifest; then a file
        faults.reads = [None] * good + [passing()] * 50
        with pytest.raises(TryAgainError, match="could not read"):
            choose_checkpoint(url, None)
    faults.reads = [passing()] * 2
    choice = choose_checkpoint(url, None)
    assert choice is not None
    assert choice.notes == []


def write_first_schema(run: Path) -> str:
    """A checkpoint as the first schema had it."""
    url = checkpoint_url(str(run), 500)
    storage.write_bytes(storage.join(url, "model.safetensors"), safetensors.torch.save({"norm.weight": torch.ones(4)}))
    storage.commit(url, {"schema_version": 1, "progress": {"step": 500}, "model": SHAPE, "catalogue_fingerprint": "feed"})
    (run / "checkpoints" / "index.json").write_text(json.dumps({"best": 500, "last": 500}))
    return url


def test_a_checkpoint_of_the_first_schema_is_refused(tmp_path: Path) -> None:
    url = write_first_schema(tmp_path)
    for read in (
        lambda: load_model(url),
        lambda: find_checkpoint(str(tmp_path), "best"),
        lambda: choose_checkpoint(str(tmp_path), None),
    ):
        with pytest.raises(CheckpointError, match=r"schema_version=1, this code reads 2; finish this run"):
            read()


def test_another_committed_directory_is_no_checkpoint(tmp_path: Path) -> None:
    storage.commit(str(tmp_path), {"schema_version": 2, "num_items": 3})
    with pytest.raises(CheckpointError, match=r"is no checkpoint .*tensors"):
        load_model(str(tmp_path))


def test_tensors_in_files_that_the_manifest_does_not_verify_are_refused(tmp_path: Path) -> None:
    save_step(str(tmp_path), 1)
    file = Path(checkpoint_url(str(tmp_path), 1)) / storage.MANIFEST
    manifest = json.loads(file.read_text())
    manifest["tensors"]["norm.weight"]["pieces"][0]["file"] = "../elsewhere"
    file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"\.\./elsewhere, which is not among the files"):
        load_model(str(file.parent))


def test_a_file_that_ends_early_or_is_none_is_named(tmp_path: Path) -> None:
    url = str(tmp_path / "file")
    write_tensors(url, {"t": torch.ones(4, 2)})
    whole = Path(url).read_bytes()
    Path(url).write_bytes(whole[:-4])
    file = TensorFile(url)
    with pytest.raises(CheckpointError, match="ends within t"):
        file.read_into(torch.empty(4, 2), "t", range(4))
    with pytest.raises(CheckpointError, match=r"t is F32 \[4, 2\]; expected rows up to 5"):
        file.read_into(torch.empty(6, 2), "t", range(6))
    file.close()
    Path(url).write_bytes(b"short")
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        TensorFile(url)
