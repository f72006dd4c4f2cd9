"""Ray clusters of several nodes on this machine: each node processes of its own, ended by process id."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import ray

RAY = str(Path(sys.executable).with_name("ray"))
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, holds: Callable[[], object], timeout_s: float = 120) -> None:
    """Return once `holds()` is true; fail with `what` if it never is."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.1)


def training_workers(under: int) -> list[psutil.Process]:
    """The processes of Ray Train's workers among the descendants of a process."""
    workers = []
    for process in psutil.Process(under).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                workers.append(process)
        except psutil.Error:  # ended while we looked
            continue
    return workers


class Node:
    """One `ray start --block`, with all it starts."""

    def __init__(self, log: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        command = [RAY, "start", "--block", "--object-store-memory=100000000", "--disable-usage-stats", *arguments]
        inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env={**inherited, **ENVIRONMENT, **(environment or {})},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def die(self) -> None:
        """As by a power cut: every process at once, none can say a word."""
        try:
            processes = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            processes = []
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()

    def drain(self) -> None:
        """As when a machine is being taken back: SIGTERM to what runs in its foreground."""
        os.kill(self.pid, signal.SIGTERM)


class Cluster:
    """A head without CPUs, where the driver is, and nodes with one CPU each; every one has a temporary directory of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.temporary = Path("/tmp") / f"lf{os.getpid()}-{free_port()}"  # Ray's sockets need a short path
        self.port, self.dashboard = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.nodes: list[Node] = []
        self.temporaries = [self.temporary]
        self.head = Node(
            folder / "head.log",
            "--head",
            f"--port={self.port}",
            f"--dashboard-port={self.dashboard}",
            f"--dashboard-agent-listen-port={free_port()}",  # or a Ray beside this one has it, and no job is started
            "--num-cpus=0",
            f"--temp-dir={self.temporary}",
        )

    def add_node(self, *arguments: str, **environment: str) -> Node:
        """Start a node and wait until it is there; one after the other, as Ray's nodes of one machine share names.

        `arguments` are more of `ray start`, such as its resources.

        Ray gives a node 30 s to start, which a machine in heavy use may not meet at once.
        """
        cpus = ray.cluster_resources().get("CPU", 0)
        for _ in range(3):
            log = self._folder / f"node-{len(self.temporaries)}.log"
            self.temporaries.append(Path(f"{self.temporary}-{len(self.temporaries)}"))
            place = f"--temp-dir={self.temporaries[-1]}"
            node = Node(log, f"--address={self.address}", "--num-cpus=1", place, *arguments, environment=environment)
            self.nodes.append(node)
            wait_for("a node", lambda node=node: node.process.poll() is not None or ray.cluster_resources().get("CPU", 0) > cpus)
            if node.process.poll() is None:
                return node
        raise AssertionError(log.read_text())

    def have(self, count: int) -> None:
        """Start or end nodes until exactly so many are alive."""
        self.nodes = [node for node in self.nodes if node.process.poll() is None]
        for node in self.nodes[count:]:
            node.die()
        self.nodes = self.nodes[:count]
        wait_for("dead nodes to be gone", lambda: ray.cluster_resources().get("CPU", 0) == len(self.nodes))
        while len(self.nodes) < count:
            self.add_node()

    def die_under_a_worker(self) -> None:
        self._under_a_worker().die()

    def drain_under_a_worker(self) -> None:
        self._under_a_worker().drain()

    def _under_a_worker(self) -> Node:
        return next(node for node in self.nodes if node.process.poll() is None and training_workers(node.pid))

    def connect(self) -> None:
        wait_for(
            "the head",
            lambda: (
                not subprocess.run(
                    [RAY, "health-check", "--address", self.address],
                    env={**os.environ, **ENVIRONMENT},
                    capture_output=True,
                    check=False,
                ).returncode
            ),
        )
        ray.init(address=self.address, logging_level="ERROR", log_to_driver=False)

    def close(self) -> None:
        for node in [*self.nodes, self.head]:
            node.die()
        for temporary in self.temporaries:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster this process is connected to."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    made = Cluster(folder)
    try:
        made.connect()
        yield made
    finally:
        ray.shutdown()
        made.close()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
