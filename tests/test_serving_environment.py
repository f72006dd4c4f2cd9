"""A serving team's environment: torch, safetensors and pyarrow, with what those require, and the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.serve.recommender import Recommender
from tests.test_bundle import dataset as dataset
from tests.test_bundle import write

ROOT = Path(__file__).resolve().parent.parent
SERVING = ("torch", "safetensors", "pyarrow")
SCRIPT = """
import importlib.util, json, sys
from lrurec_dist.serve.recommender import Recommender
absent = [name for name in ("ray", "deepspeed", "omegaconf", "numpy", "pandas", "tqdm") if importlib.util.find_spec(name) is None]
recommender = Recommender.load(sys.argv[1])
answers = [recommender.recommend(history, k=3) for history in (["i001", "i002"], [], ["i005"])]
print(json.dumps([absent, recommender.num_items, answers]))
for name in absent:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} was imported")
"""


def closure(names: tuple[str, ...]) -> set[str]:
    """The distributions and all that they require in turn on this machine, without extras."""
    found, waiting = set[str](), list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        required = [Requirement(text) for text in distribution(name).requires or []]
        waiting += [one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with those distributions alone, as links to where they are installed here."""
    place = tmp_path_factory.mktemp("serving") / "venv"
    command = [sys.executable, "-m", "venv", "--without-pip", str(place)]
    subprocess.run(command, check=True, timeout=120)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    for name in closure(SERVING):
        for top in top_level(name):
            if not (packages / top.name).exists():
                (packages / top.name).symlink_to(top)
    return place / "bin" / "python"


def top_level(name: str) -> Iterator[Path]:
    """What a distribution put directly into site-packages, its metadata too."""
    found = distribution(name)
    tops = {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}
    assert tops, f"{name} lists no files"
    return (Path(str(found.locate_file(top))) for top in tops)


def test_torch_safetensors_and_pyarrow_are_all_that_a_bundle_needs(
    python: Path, tmp_path: Path, dataset: SequenceDataset
) -> None:
    url = write(str(tmp_path), dataset, table_dtype="int8")
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [str(python), "-c", SCRIPT, url], capture_output=True, text=True, timeout=240, env=environment, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    absent, num_items, answers = json.loads(run.stdout.splitlines()[-1])
    assert absent == ["ray", "deepspeed", "omegaconf", "numpy", "pandas", "tqdm"], "the environment has more than it should"
    here = Recommender.load(url)
    assert num_items == here.num_items
    for theirs, history in zip(answers, (["i001", "i002"], [], ["i005"]), strict=True):
        ours = here.recommend(history, k=3)
        assert [key for key, _ in theirs] == [item.item_key for item in ours]
        assert [score for _, score in theirs] == pytest.approx([item.score for item in ours], abs=1e-5)
