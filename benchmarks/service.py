"""The HTTP service under load from another process, with a swap to another version in the middle.

    python benchmarks/service.py [ITEMS] [--clients 8] [--seconds 10] [--runner process|ray] [--replicas 1] [--redis]

Random models (dim 64, hidden 128, two blocks). Each client keeps one connection and sends its next request when the one
before is answered: in turns an event of its user, a list for that user, and a list for a history of 50 items. Half-way
the champion moves. Latency is what a client sees; processor time is the service's own (of one process), swap included, which other
work on the machine does not change. `--redis` keeps sessions in a redis-server of its own, which several replicas need.
"""

import argparse
import http.client
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow as pa
import torch

from lrurec_dist import storage
from lrurec_dist.evaluate.ranking import top_k
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.reporting import format_table, say
from lrurec_dist.serve.bundle import GoldenAnswers, save_bundle
from lrurec_dist.serve.channels import CHAMPION, move, read_channel
from lrurec_dist.serve.registry import version_url

SHAPE = {"dim": 64, "hidden": 128, "blocks": 2, "dropout": 0.0, "ring": [0.8, 0.99]}
HISTORY, K, MAX_LENGTH = 50, 10, 200
KINDS = ("event", "list of a user", "list of a history")
ROOT = Path(__file__).resolve().parent.parent


def write_version(registry: str, items: int, seed: int) -> str:
    """A bundle of a random model."""
    torch.manual_seed(seed)
    arguments = {"num_items": items, **SHAPE}
    model = LRURec(**arguments).eval().requires_grad_(False)
    keys = [f"item-{item:07d}" for item in range(1, items + 1)]
    none = torch.empty(0, dtype=torch.int64)
    ids, scores = top_k(model.encode(torch.tensor([[1, 2, 3]])), model.item_rows(), model.table.bias, K, none, none)
    url = save_bundle(
        registry,
        date="2026-01-02",
        model=model,
        model_arguments=arguments,
        max_length=MAX_LENGTH,
        exclude_history=False,
        catalogue=pa.table({"item_id": range(1, items + 1), "item_key": pa.array(keys, pa.large_string())}),
        catalogue_fingerprint="none",
        golden=GoldenAnswers([keys[:3]], ids, scores),
        metrics={"model": {}, "popularity": {}, "users": 0, "largest_decay_modulus": 0.99},
        lineage={"interactions": 0, "users": 0, "sources": {}, "step": seed},
    )
    return url.rsplit("/", 1)[1]


def promote(registry: str, version: str) -> None:
    """Make a version champion."""
    sha256 = storage.file_sha256(storage.join(version_url(registry, version), storage.MANIFEST))
    move(read_channel(registry, CHAMPION), version, sha256, "benchmark", [])


def send(port: int, client: int, items: int, until: float, seen: list[tuple[int, float, str]], errors: list[str]) -> None:
    """Requests of one client until a time: kind, seconds and version of each."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    turn = 0
    while time.perf_counter() < until:
        kind, first = turn % 3, (client * 7919 + turn * 104729) % items
        keys = [f"item-{(first + place) % items + 1:07d}" for place in range(HISTORY)]
        path, body = (
            ("/events", {"user": f"u{client}", "events": keys[:1]}),
            ("/recommend", {"user": f"u{client}", "k": K}),
            ("/recommend", {"events": keys, "k": K}),
        )[kind]
        started = time.perf_counter()
        try:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            answer = connection.getresponse()
            found = json.loads(answer.read())
            if answer.status != 200:
                errors.append(f"{answer.status} {found}")
            else:
                seen.append((kind, time.perf_counter() - started, found["version"]))
        except (OSError, http.client.HTTPException) as error:
            errors.append(repr(error))
            connection.close()
        turn += 1
    connection.close()


@contextmanager
def redis_in(place: str) -> Iterator[str]:
    """The URL of a Redis that keeps nothing."""
    program = shutil.which("redis-server")
    assert program is not None, "--redis: redis-server is not installed; apt-get install redis-server"
    command = [program, "--port", "0", "--unixsocket", f"{place}/redis.sock", "--save", "", "--appendonly", "no", "--dir", place]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            assert process.stdout is not None
            assert any("eady to accept connections" in line for line in process.stdout), "Redis did not start"
            yield f"unix://{place}/redis.sock"
        finally:
            process.terminate()


def processor_s(pid: int) -> float:
    """Seconds of processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", type=int, nargs="?", default=50_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--runner", choices=("process", "ray"), default="process")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--redis", action="store_true", help="sessions in Redis")
    options = parser.parse_args()
    with ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory())
        registry = f"{place}/registry"
        versions = [write_version(registry, options.items, seed) for seed in range(2)]
        promote(registry, versions[0])
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        settings = [f"run_dir={place}/run", f"bundle.registry={registry}", f"serve.runner={options.runner}", f"serve.port={port}"]
        settings += ["serve.poll_s=0.5", f"serve.replicas={options.replicas}"]
        environment = dict(os.environ)
        if options.redis:
            environment["BENCHMARK_REDIS"] = stack.enter_context(redis_in(place))
            settings.append("serve.redis_variable=BENCHMARK_REDIS")
        command = [sys.executable, str(ROOT / "jobs" / "serve.py"), *settings]
        service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)  # noqa: S603  # our own job
        try:
            assert service.stdout is not None
            told = []
            for line in service.stdout:
                told.append(line)
                if line.startswith("serve: http"):
                    break
            else:
                raise SystemExit(f"the service did not start: {''.join(told)}")
            seen: list[tuple[int, float, str]] = []
            errors: list[str] = []
            send(port, 0, options.items, time.perf_counter() + 1, [], [])
            started, taken_before = time.perf_counter(), processor_s(service.pid)
            arguments = (options.items, started + options.seconds, seen, errors)
            clients = [threading.Thread(target=send, args=(port, client, *arguments)) for client in range(options.clients)]
            for client in clients:
                client.start()
            time.sleep(options.seconds / 2)
            promote(registry, versions[1])
            for client in clients:
                client.join()
            seconds, taken_s = time.perf_counter() - started, processor_s(service.pid) - taken_before
        finally:
            service.terminate()
            service.wait()
    rows, figures = [], {}
    for kind, name in enumerate(KINDS):
        times = sorted(taken * 1000 for which, taken, _ in seen if which == kind)
        p50, p99 = statistics.median(times), times[int(0.99 * len(times))]
        rows.append([name, f"{len(times) / seconds:,.0f}", f"{p50:.1f}", f"{p99:.1f}"])
        figures[name] = {"p50_ms": round(p50, 2), "p99_ms": round(p99, 2)}
    shares = [sum(version == each for _, _, version in seen) for each in versions]
    say(format_table(["request", "per second", "p50 ms", "p99 ms"], rows))
    say(
        f"{len(seen):,} requests, {len(errors)} errors {errors[:3]}; answered by the version before the swap {shares[0]:,}, after {shares[1]:,}"
    )
    facts: dict[str, object] = {
        "items": options.items,
        "clients": options.clients,
        "runner": options.runner,
        "replicas": options.replicas,
        "redis": options.redis,
        "cpus": os.cpu_count(),
    }
    if options.runner == "process":  # a Ray replica is a process of its own
        facts["processor_ms_per_request"] = round(1000 * taken_s / len(seen), 2)
    rate = round(len(seen) / seconds, 1)
    say(json.dumps({**facts, "requests_per_s": rate, "errors": len(errors), "by_version": shares, "latency": figures}))


if __name__ == "__main__":
    main()
