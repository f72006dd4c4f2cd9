"""Writes checkpoints while training goes on: a copy in CPU memory now, files in a thread, one commit by all ranks.

The ranks agree over a process group of their own, used by the writing threads alone, so that their
exchanges never mix with those of training and a file may take as long as it needs.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from lrurec_dist import collectives, storage
from lrurec_dist.errors import LrurecError
from lrurec_dist.train.checkpoint import Progress, Subject, checkpoint_url, rank_file, write_manifest
from lrurec_dist.train.checkpoint_index import keep_checkpoints
from lrurec_dist.train.pieces import Piece
from lrurec_dist.train.tensor_file import dtype_name, write_tensors


class CheckpointWriter:
    """One rank's side of writing the checkpoints of a run.

    Args:
        run_url: the run directory.
        subject: what is trained.
        keep: latest checkpoints that are kept, beside the best.
        damaged: steps found damaged when the run resumed; they go once a newer checkpoint is there.
        group: of `collectives.new_group`.
        record: gets kind and values of what `metrics.jsonl` should say, from the writing thread.

    At most one write is under way. A failure on one rank is raised by all, at the next `save` or
    `wait`. As a context it waits at the end; after an error, without raising another.
    """

    def __init__(
        self,
        run_url: str,
        *,
        subject: Subject,
        keep: int,
        damaged: frozenset[int] = frozenset(),
        group: Any,
        record: Callable[..., None],
    ) -> None:
        self._run_url, self._subject, self._keep, self._damaged = run_url, subject, keep, damaged
        self._group, self._record = group, record
        self._copies: dict[str, Tensor] = {}  # kept from one snapshot to the next: their pages are there already
        self._failure: LrurecError | None = None
        self._writes: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        # One thread, begun now: where memory is short later, Python waits for ever for one that finds none to begin with.
        threading.Thread(target=self._write_all, name="checkpoint-writer", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._idle.wait()
        self._writes.put(None)
        if kind is None:
            self.wait()

    def save(self, pieces: Iterable[Piece], progress: Progress, validation: dict[str, float] | None) -> None:
        """Copy this rank's pieces and begin to write them; all ranks call, each with its own.

        Waits for the write before it. The pieces may change once this returns.

        Raises:
            LrurecError: the write before failed, on any rank.
        """
        started = time.perf_counter()
        self.wait()
        waited_s = time.perf_counter() - started
        snapshot = self._snapshot(pieces)
        stalled = {"waited_s": waited_s, "snapshot_s": time.perf_counter() - started - waited_s}
        self._idle.clear()
        self._writes.put(partial(self._write, snapshot, progress, validation, stalled))

    def wait(self) -> None:
        """Return once nothing is being written any more.

        Raises:
            LrurecError: the write failed, on any rank.
        """
        self._idle.wait()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _write_all(self) -> None:
        for write in iter(self._writes.get, None):
            try:
                write()
            finally:
                self._idle.set()

    def _snapshot(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The pieces with values of their own, in CPU memory."""
        copied, on_gpu = [], False
        for piece in pieces:
            copy, is_cuda = self._copies.get(piece.name), piece.values.is_cuda
            if copy is None:
                copy = torch.empty(piece.values.shape, dtype=piece.values.dtype, pin_memory=is_cuda)
                self._copies[piece.name] = copy
            copy.copy_(piece.values, non_blocking=is_cuda)
            on_gpu = on_gpu or is_cuda
            copied.append(Piece(piece.name, piece.shape, piece.rows, copy))
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copied

    def _write(
        self, snapshot: list[Piece], progress: Progress, validation: dict[str, float] | None, stalled: dict[str, float]
    ) -> None:
        started = time.perf_counter()
        url = checkpoint_url(self._run_url, progress.step)
        name = rank_file(collectives.rank(), collectives.world_size())

        def write_mine() -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], str, list[int]]]]:
            entry = write_tensors(storage.join(url, name), {piece.name: piece.values for piece in snapshot})
            return entry, [(piece.name, piece.shape, dtype_name(piece.values.dtype), _numbers(piece.rows)) for piece in snapshot]

        def commit() -> None:
            files: dict[str, dict[str, Any]] = {}
            tensors: dict[str, dict[str, Any]] = {}
            for rank, (entry, pieces) in enumerate(written):
                file = rank_file(rank, len(written))
                files[file] = entry
                for key, shape, dtype, rows in pieces:
                    tensor = tensors.setdefault(key, {"shape": list(shape), "dtype": dtype, "pieces": []})
                    tensor["pieces"].append({"file": file, "key": key, "rows": rows})
            write_manifest(
                url,
                subject=self._subject,
                progress=progress,
                validation=validation,
                tensors=dict(sorted(tensors.items())),
                files=files,
            )
            recall = validation["recall@10"] if validation else None
            keep_checkpoints(self._run_url, progress.step, recall, latest=self._keep, damaged=self._damaged)
            size = sum(entry["bytes"] for entry in files.values())
            self._record("checkpoint", step=progress.step, bytes=size, write_s=time.perf_counter() - started, **stalled)

        try:
            collectives.on_first_rank(lambda: storage.remove_tree(url), self._group)  # what an interrupted write left there
            written = collectives.together(write_mine, self._group)
            collectives.on_first_rank(commit, self._group)
        except LrurecError as error:
            self._failure = error
        except Exception as error:  # the exchange itself: a rank is gone
            self._failure = LrurecError(f"{url}: the ranks could not agree on it: {type(error).__name__}: {error}")
        if self._failure is not None and collectives.rank() == 0:
            with suppress(Exception):  # the failure to report is the one above; what stays is no checkpoint without a manifest
                if not storage.is_committed(url):
                    storage.remove_tree(url)


def _numbers(rows: range) -> list[int]:
    return [rows.start, rows.stop, rows.step]
