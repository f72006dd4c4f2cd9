"""Compiling and finding the C kernels."""

import ctypes
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lrurec_dist.model import native

PROGRAM = """
import torch
from lrurec_dist.model import native
from lrurec_dist.model.scan import best_form
assert native.load() is not None
print(best_form(torch.device("cpu")))
"""


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a loader that has not loaded anything yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.load.cache_clear()
    yield tmp_path
    native.load.cache_clear()


def test_the_library_is_compiled_once_into_a_private_directory(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(native.load(), ctypes.CDLL)
    (library,) = (fresh / "cache" / "lrurec_dist").iterdir()
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    native.load.cache_clear()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert isinstance(native.load(), ctypes.CDLL)


def test_processes_that_start_together_all_get_it(fresh: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(fresh / "cache")}
    running = [subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate(timeout=120)[0].split() for process in running] == [[b"native"]] * 3
    assert len(list((fresh / "cache" / "lrurec_dist").iterdir())) == 1, "no unfinished file is left behind"


@pytest.mark.parametrize("compiler", ["no-such-compiler", "/bin/false"])
def test_without_a_working_compiler_there_is_none_and_a_broken_one_is_named(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compiler: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.WARNING):
        assert native.load() is None
    assert ("do not compile here" in caplog.text) == (compiler == "/bin/false")
    folder = fresh / "cache" / "lrurec_dist"
    assert not folder.exists() or not list(folder.iterdir())


def test_the_exponential_is_exact_to_a_few_units_in_the_last_place() -> None:
    scores = torch.linspace(-100, 0, 100_001).view(-1, 1)
    highest, tile = torch.zeros(1), scores.clone()
    native.softmax_tile(tile, torch.zeros(len(scores)), highest, None, None)
    exact = torch.exp(scores.double())
    above = scores > -87
    assert float(((tile.double() - exact) / exact)[above].abs().max()) < 4e-7
    assert float(tile[~above].max()) < 1.7e-38
