"""Run a function on several real processes with a gloo group between them."""

import fcntl
import multiprocessing
import os
import pty
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 180) -> list[Any]:
    """What `function(*args)` returns on each rank, in the order of ranks; any failure fails the caller."""
    # Forked from a process that has imported everything, once: torch, DeepSpeed and what they import take four seconds of a core.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{Path(folder) / 'rendezvous'}"
        ranks = [
            context.Process(target=_entry, args=(rank, world_size, rendezvous, dict(os.environ), results, function, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            found = dict(results.get(timeout=timeout_s) for _ in ranks)
        finally:
            for process in ranks:
                process.join(timeout=10)
                process.kill()
    failures = {rank: value for rank, (ok, value) in found.items() if not ok}
    assert not failures, "\n".join(f"rank {rank}: {text}" for rank, text in failures.items())
    return [found[rank][1] for rank in range(world_size)]


def _entry(
    rank: int,
    world_size: int,
    rendezvous: str,
    environment: dict[str, str],
    results: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(environment)  # the caller's now; that of the process it was forked from is older
    # DeepSpeed asks the environment even where the process group exists.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
        results.put((rank, (True, function(*args))))
    except BaseException:
        results.put((rank, (False, traceback.format_exc())))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def on_a_terminal(command: list[str], timeout_s: float = 120) -> tuple[int, str, list[str]]:
    """Run a command on a pseudo-terminal of 120 columns.

    Returns its exit status, all that it wrote, and the lines that are left on the screen in the end.
    """
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its)
    os.close(its)
    deadline = threading.Timer(timeout_s, process.kill)
    deadline.start()
    written = b""
    try:
        with suppress(OSError):  # EIO: the other end was closed
            while piece := os.read(ours, 1 << 16):
                written += piece
        status = process.wait()
    finally:
        deadline.cancel()
        process.kill()
        process.wait()
        os.close(ours)
    text = written.decode().replace("\r\n", "\n")
    screen = []
    for line in text.split("\n"):
        left = ""
        for piece_of_line in line.split("\r"):
            left = piece_of_line + left[len(piece_of_line) :]
        screen.append(left.rstrip())
    return status, text, screen


def killed_at(line: str, script: str, timeout_s: float = 60) -> None:
    """Run a Python script and kill it with all its children, as `kill -9` does, once one of them prints `line`."""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True)

    def kill() -> None:
        os.killpg(process.pid, signal.SIGKILL)

    deadline = threading.Timer(timeout_s, kill)
    deadline.start()
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == line, "the script ended, or was too slow, before it got there"
    finally:
        deadline.cancel()
        kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
