"""A registry with bundles of random models, and the service in a process of its own."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import uvicorn

from lrurec_dist import storage
from lrurec_dist.config_serving import ServeConfig
from lrurec_dist.evaluate.ranking import top_k
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.serve.bundle import GoldenAnswers, save_bundle
from lrurec_dist.serve.channels import CHAMPION, move, read_channel
from lrurec_dist.serve.http_door import token_digest
from lrurec_dist.serve.http_server import Plan, build_application
from lrurec_dist.serve.registry import version_url
from tests.datasets import write_dataset

ROOT = Path(__file__).resolve().parent.parent
NUM_ITEMS, MAX_LENGTH = 60, 8
SHAPE = {"num_items": NUM_ITEMS, "dim": 8, "hidden": 8, "blocks": 2, "dropout": 0.0, "ring": [0.8, 0.99]}


def write_versions(place: Path, count: int = 2, titles: Mapping[str, str] | None = None) -> tuple[str, list[str]]:
    """A registry whose versions answer differently, the first one champion: its URL, and the versions."""
    dataset = write_dataset(f"{place}/dataset", [[1, 2, 3], [4]], NUM_ITEMS)
    catalogue = dataset.catalogue.table
    if titles:
        found = [titles.get(key) for key in dataset.catalogue.keys.to_pylist()]
        catalogue = catalogue.append_column("title", pa.array(found, pa.large_string()))
    registry, versions = f"{place}/registry", []
    for seed in range(count):
        torch.manual_seed(seed)
        model = LRURec(**SHAPE)
        with torch.no_grad():
            model.table.weight.mul_(30)
        model = model.eval().requires_grad_(False)
        ids, scores = top_k(
            model.encode(torch.tensor([[1, 2, 3]])),
            model.item_rows(),
            model.table.bias,
            10,
            torch.zeros(3).long(),
            torch.arange(1, 4),
        )
        url = save_bundle(
            registry,
            date="2026-01-02",
            model=model,
            model_arguments=SHAPE,
            max_length=MAX_LENGTH,
            exclude_history=True,
            catalogue=catalogue,
            catalogue_fingerprint=dataset.catalogue.fingerprint,
            golden=GoldenAnswers([dataset.catalogue.keys_of([1, 2, 3])], ids, scores),
            metrics={"model": {"recall@10": 0.5}, "popularity": {"recall@10": 0.1}, "users": 2, "largest_decay_modulus": 0.99},
            lineage={"interactions": 4, "users": 2, "sources": {}, "step": seed},
        )
        versions.append(url.rsplit("/", 1)[1])
    promote(registry, versions[0])
    return registry, versions


def promote(registry: str, version: str) -> None:
    """Make a version champion, without asking a gate."""
    sha256 = storage.file_sha256(storage.join(version_url(registry, version), storage.MANIFEST))
    move(read_channel(registry, CHAMPION), version, sha256, "by hand", [])


@contextmanager
def running(
    place: Path, registry: str, *settings: str, timeout_s: float = 90, **environment: str
) -> Iterator[tuple[str, list[str]]]:
    """The service as a user runs it, on a free port: its address, and the lines it writes; stopped in the end by SIGTERM."""
    command = [sys.executable, str(ROOT / "jobs" / "serve.py"), f"run_dir={place}/run", f"bundle.registry={registry}"]
    process = subprocess.Popen(
        [*command, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | environment,
        cwd="/",
    )
    deadline = threading.Timer(timeout_s, process.kill)
    deadline.start()
    lines: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith("serve: http://"):
                break
        else:
            raise AssertionError("the service did not start:\n" + "\n".join(lines))
        reader = threading.Thread(target=lambda: lines.extend(line.rstrip() for line in process.stdout or ()))
        reader.start()
        yield lines[-1].removeprefix("serve: ").rstrip("/"), lines
        process.terminate()
        reader.join()
        assert process.wait() == 0, "\n".join(lines)
    finally:
        deadline.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def in_thread(registry: str, token: str = "", **settings: Any) -> Iterator[str]:
    """The service behind a real server in a thread of this process: its address."""
    plan = Plan(ServeConfig(**settings), registry, token_digest(token) if token else None)
    server = uvicorn.Server(uvicorn.Config(build_application(plan), log_level="warning", access_log=False))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def call(url: str, body: object = None, token: str = "") -> tuple[int, Any]:
    """Status and JSON of a request."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url, data, headers)  # noqa: S310  # our own server
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@contextmanager
def redis_server(place: Path) -> Iterator[str]:
    """The URL of a Redis of the test's own, which keeps nothing."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed; apt-get install redis-server enables this")
    path = place / "redis.sock"
    command = [program, "--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no", "--dir", str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert any("eady to accept connections" in line for line in process.stdout), "Redis did not start"
            yield f"unix://{path}"
        finally:
            process.terminate()
