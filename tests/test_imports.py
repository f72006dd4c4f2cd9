"""The house stays in order: imports point down only, and heavy packages stay where they belong."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lrurec_dist"
MODULES = sorted(PACKAGE.rglob("*.py"))
FOUNDATION = {
    "errors",
    "config",
    "config_data",
    "config_night",
    "config_serving",
    "config_file",
    "storage",
    "conditional",
    "files",
    "stores",
    "collectives",
    "reporting",
    "run_directory",
    "signals",
    "__init__",
}

# A layer may import itself and the ones named here; everything may import the foundation.
MAY_IMPORT = {
    "foundation": set(),
    "data": set(),
    "model": set(),
    "evaluate": {"data", "model"},
    "train": {"evaluate", "data", "model"},
    "serve": {"evaluate", "data", "model"},
    "ray_session": {"train", "data"},
    "stage_prepare": {"ray_session", "data"},
    "report": set(),
    "run_report": {"report", "data", "model"},
    "stage_evaluate": {"ray_session", "stage_prepare", "run_report", "serve", "train", "evaluate", "data", "model"},
    "stage_publish": {"ray_session", "stage_prepare", "stage_evaluate", "serve", "evaluate", "data"},
    "stage_recommend": {"ray_session", "serve", "data"},
    "stage_states": {"stage_recommend", "ray_session", "serve", "data"},
    "stages": {
        "ray_session",
        "stage_prepare",
        "stage_evaluate",
        "stage_publish",
        "stage_recommend",
        "stage_states",
        "serve",
        "train",
        "evaluate",
        "data",
        "model",
    },
    "nightly": {"stages", "stage_evaluate", "stage_prepare", "run_report", "serve", "data"},
}

# Third-party packages that only these modules (or whole layers) may import.
ONLY_IN = {
    "ray": {
        "data",
        *(f"train/{name}.py" for name in ("launch", "attempts", "failures", "heartbeats", "placing", "trackers")),
        "evaluate/dataset_evaluation.py",
        "evaluate/neighbours.py",
        "serve/app.py",
        "ray_session.py",
        "stages.py",
    },
    "deepspeed": {"train/engine.py", "train/deepspeed_config.py"},
    "omegaconf": {"config_file.py"},
    "deltalake": {"data/delta.py"},
    "pyiceberg": {"data/iceberg.py"},
    "triton": {"model/scan_triton.py"},
    **{name: {"serve/export.py"} for name in ("onnx", "onnxruntime", "onnxscript")},
    "tqdm": {"reporting.py"},
    "fastapi": {"serve/http_api.py"},
    "starlette": {"serve/http_api.py"},
    "pydantic": {"serve/http_models.py", "train/deepspeed_config.py"},
    "uvicorn": {"serve/http_server.py"},
    "prometheus_client": {"serve/service_metrics.py"},
    "redis": {"serve/redis_store.py"},
}


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    if len(parts) == 1:
        return "foundation" if path.stem in FOUNDATION else path.stem
    return parts[0]


def test_every_module_is_looked_at() -> None:
    assert len(MODULES) > 20
    assert {layer_of(path) for path in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_only(path: Path) -> None:
    layer = layer_of(path)
    for name in imported_modules(path):
        top, _, rest = name.partition(".")
        if top != "lrurec_dist" or not rest:
            continue
        target = rest.split(".")[0]
        if (PACKAGE / target).is_dir():
            assert target == layer or target in MAY_IMPORT[layer], f"{layer} must not import {name}"
        elif (PACKAGE / f"{target}.py").exists() and target not in FOUNDATION:
            assert target in MAY_IMPORT[layer], f"{layer} must not import {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_stay_where_they_belong(path: Path) -> None:
    relative = path.relative_to(PACKAGE).as_posix()
    for name in imported_modules(path):
        allowed = ONLY_IN.get(name.split(".")[0])
        assert allowed is None or relative in allowed or relative.split("/")[0] in allowed, f"{relative} must not import {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").glob("*.py")), ids=lambda path: path.name)
def test_the_model_needs_torch_and_nothing_else(path: Path) -> None:
    third_party = {name.split(".")[0] for name in imported_modules(path)} - {"lrurec_dist"} - set(sys.stdlib_module_names)
    assert third_party <= {"torch", "triton"}


@pytest.mark.parametrize(
    "path",
    [PACKAGE / "data" / f"{name}.py" for name in ("events", "catalogue", "sequences", "splits", "audit")],
    ids=lambda path: path.name,
)
def test_preparation_does_without_torch(path: Path) -> None:
    assert not any(name.split(".")[0] == "torch" for name in imported_modules(path))


def test_the_recommender_loads_neither_ray_nor_deepspeed_nor_omegaconf() -> None:
    script = "import sys, lrurec_dist.serve.service, lrurec_dist.serve.state_files; print(*{'ray', 'deepspeed', 'omegaconf', 'pandas', 'fastapi', 'redis'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.split() == []


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.name)
def test_jobs_define_nothing(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350
