"""Writing in the background: what training notices, what a failure leaves, what a kill leaves."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lrurec_dist import collectives, storage, stores
from lrurec_dist.errors import LrurecError, StorageError, TryAgainError
from lrurec_dist.files import NewFile
from lrurec_dist.train import checkpoint_writer
from lrurec_dist.train.checkpoint import Progress, checkpoint_url, load_model
from lrurec_dist.train.checkpoint_index import choose_checkpoint, kept_checkpoints
from lrurec_dist.train.checkpoint_writer import CheckpointWriter
from lrurec_dist.train.pieces import pieces_of_rank
from tests.processes import killed_at, run_ranks
from tests.stores import Faults, FaultyFileSystem, S3Server, passing
from tests.test_checkpoint import SUBJECT, directories, model_of, tensors_of


def writer_of(run: str, records: list[dict[str, Any]] | None = None, **options: Any) -> CheckpointWriter:
    def record(kind: str, **values: Any) -> None:
        if records is not None:
            records.append({"kind": kind, **values})

    return CheckpointWriter(run, **{"subject": SUBJECT, "keep": 2, "group": None, "record": record, **options})


def save(writer: CheckpointWriter, step: int) -> None:
    pieces = pieces_of_rank(tensors_of(model_of(step)), collectives.rank(), collectives.world_size())
    writer.save(pieces, Progress(step=step), {"recall@10": step / 1000})


def assert_whole(run: str, step: int) -> None:
    found = load_model(checkpoint_url(run, step)).state_dict()
    for name, value in model_of(step).state_dict().items():
        assert torch.equal(found[name], value), name


class HeldUp:
    """Lets no write go on before `let_go`, and counts how many are under way at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.let_go, self.begun = threading.Event(), threading.Event()
        self.under_way, self.most = 0, 0
        write = checkpoint_writer.write_tensors

        def held(*args: Any) -> Any:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            self.begun.set()
            assert self.let_go.wait(60)
            try:
                return write(*args)
            finally:
                self.under_way -= 1

        monkeypatch.setattr(checkpoint_writer, "write_tensors", held)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldUp(monkeypatch)
    run, records = str(tmp_path), []
    with writer_of(run, records) as writer:
        tensors = dict(tensors_of(model_of(1)))
        writer.save(pieces_of_rank(tensors.items(), 0, 1), Progress(step=1), {"recall@10": 0.5})
        assert held.begun.wait(60)
        for value in tensors.values():  # the next step changes the parameters
            value.zero_()
        assert (kept_checkpoints(run), records) == ({}, [])
        held.let_go.set()
    assert_whole(run, 1)
    (record,) = records
    assert (record["kind"], record["step"]) == ("checkpoint", 1)
    size = sum(file.stat().st_size for file in Path(checkpoint_url(run, 1)).glob("rank-*"))
    assert record["bytes"] == size > 0
    assert min(record["write_s"], record["snapshot_s"], record["waited_s"]) >= 0


def test_a_second_checkpoint_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldUp(monkeypatch)
    run = str(tmp_path)
    with writer_of(run) as writer:
        save(writer, 1)
        second = threading.Thread(target=save, args=(writer, 2))
        second.start()
        assert held.begun.wait(60)
        assert second.is_alive()
        held.let_go.set()
        second.join()
    assert held.most == 1
    assert kept_checkpoints(run) == {1: 0.001, 2: 0.002}
    for step in (1, 2):
        assert_whole(run, step)


def test_no_save_begins_a_thread_for_which_there_may_be_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with writer_of(str(tmp_path)) as writer:
        monkeypatch.setattr(threading.Thread, "start", lambda _: pytest.fail("a thread was begun"))
        for step in (1, 2):
            save(writer, step)
    assert kept_checkpoints(str(tmp_path)) == {1: 0.001, 2: 0.002}


@pytest.mark.usefixtures("no_wait")
def test_a_write_that_fails_twice_in_passing_is_written(faulty: tuple[str, Faults], tmp_path: Path) -> None:
    url, faults = faulty
    faults.writes = [None, passing(), None, None, passing()]
    with writer_of(url) as writer:
        save(writer, 1)
    assert faults.writes == []
    assert_whole(str(tmp_path), 1)


def test_checkpoints_live_on_an_object_store(s3: S3Server, bucket: str) -> None:
    s3.order({"request": "PUT .*rank-", "times": 2, "action": "refuse", "status": 503, "code": "SlowDown"})
    with writer_of(bucket, keep=1) as writer:
        for step in (1, 2):
            save(writer, step)
    assert storage.list_names(f"{bucket}/checkpoints") == ["index.json", "step_000002"]
    assert storage.list_names(f"{bucket}/nothing") == []
    choice = choose_checkpoint(bucket, None)
    assert choice is not None
    assert choice.url == checkpoint_url(bucket, 2)
    assert_whole(bucket, 2)


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def test_a_full_store_is_an_error_at_the_end_and_leaves_the_checkpoint_before(faulty: tuple[str, Faults], tmp_path: Path) -> None:
    url, faults = faulty
    writer = writer_of(url)
    save(writer, 1)
    writer.wait()
    faults.writes = [None, None, full()]
    with pytest.raises(StorageError, match=r"step_000002/rank-00000-of-00001\.safetensors: no room to write"), writer:
        save(writer, 2)
    assert directories(str(tmp_path)) == ["index.json", "step_000001"], "what there was no room for is removed"
    choice = choose_checkpoint(str(tmp_path), None)
    assert choice is not None
    assert choice.url == checkpoint_url(str(tmp_path), 1)
    assert_whole(str(tmp_path), 1)


def test_an_index_that_cannot_be_written_is_an_error_and_loses_no_checkpoint(faulty: tuple[str, Faults], tmp_path: Path) -> None:
    url, faults = faulty
    writer = writer_of(url)
    pieces = list(pieces_of_rank(tensors_of(model_of(1)), 0, 1))
    faults.writes = [None] * (1 + len(pieces)) + [None, full()]  # header, tensors, manifest, index
    writer.save(pieces, Progress(step=1), None)
    with pytest.raises(StorageError, match=r"index\.json: no room"):
        writer.wait()
    assert kept_checkpoints(str(tmp_path)) == {1: None}
    assert_whole(str(tmp_path), 1)


def test_an_error_of_training_is_not_hidden_by_one_of_writing(faulty: tuple[str, Faults]) -> None:
    url, faults = faulty
    faults.writes = [full()]
    writer = writer_of(url)
    save(writer, 1)
    with pytest.raises(ValueError, match="training"), writer:
        raise ValueError("training")


def bug() -> ValueError:
    return ValueError("bug")


FAULTS = {"full": [full()], "passing": [passing()] * 5, "bug": [bug()]}


def fail_on_one_rank(directory: str) -> dict[str, list[tuple[str, str]]]:
    """What this rank is told, and of which type, when rank 1 alone fails in the second of three checkpoints."""
    stores.FIRST_WAIT_S = 0
    group = collectives.new_group()
    heard: dict[str, list[tuple[str, str]]] = {}
    for what, faults in FAULTS.items():
        FaultyFileSystem.faults = Faults()
        writer = writer_of(f"faulty://{directory}/{what}", group=group)
        heard[what] = []
        for step in (1, 2, 3):
            if step == 2:
                writer.wait()
                FaultyFileSystem.faults.writes = list(faults) if collectives.rank() == 1 else []
            try:
                save(writer, step)
            except LrurecError as error:
                heard[what].append((type(error).__name__, str(error)))
                save(writer, step)
        writer.wait()
    return heard


def test_a_failure_on_one_rank_is_raised_by_all_at_the_next_checkpoint(tmp_path: Path) -> None:
    found = run_ranks(3, fail_on_one_rank, str(tmp_path))
    assert found[0] == found[1] == found[2]
    for what, kind, message in (
        ("full", StorageError, "rank-00001-of-00003.safetensors: no room to write"),
        ("passing", TryAgainError, "rank-00001-of-00003.safetensors: could not write in 5 attempts"),
        ("bug", LrurecError, "rank 1 failed: ValueError: bug"),
    ):
        ((name, text),) = found[0][what]
        assert name == kind.__name__
        assert message in text
        run = str(tmp_path / what)
        assert kept_checkpoints(run) == {1: 0.001, 3: 0.003}
        for step in (1, 3):
            assert_whole(run, step)


def stop_in_the_middle_of_the_second(directory: str) -> None:
    with writer_of(directory, group=collectives.new_group()) as writer:
        save(writer, 1)
        writer.wait()
        if collectives.rank() == 1:
            write = NewFile.write

            def hang(file: NewFile, data: Any) -> int:
                if file.bytes > 500:
                    print("writing", flush=True)
                    threading.Event().wait()
                return write(file, data)

            NewFile.write = hang  # type: ignore[method-assign]
        save(writer, 2)


def test_a_kill_in_the_middle_of_a_write_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    run = str(tmp_path)
    script = f"""
from tests.processes import run_ranks
from tests.test_checkpoint_writer import stop_in_the_middle_of_the_second
run_ranks(2, stop_in_the_middle_of_the_second, {run!r})
"""
    killed_at("writing", script, timeout_s=120)
    assert any((tmp_path / "checkpoints" / "step_000002").iterdir()), "it was in the middle"
    choice = choose_checkpoint(run, None)
    assert choice is not None
    assert choice.url == checkpoint_url(run, 1)
    assert "step_000002 was never committed" in choice.notes[0]
    assert_whole(run, 1)
    with writer_of(run) as writer:  # another number of ranks writes the same step
        save(writer, 2)
    assert_whole(run, 2)
    files = sorted(file.name for file in (tmp_path / "checkpoints" / "step_000002").iterdir())
    assert files == ["manifest.json", "rank-00000-of-00001.safetensors"]
