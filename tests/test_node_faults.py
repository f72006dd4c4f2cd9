"""Lost nodes, drained nodes, hung ranks, stopped jobs, full disks, on clusters of several nodes: `make faults`."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.errors import StorageError, WorkersError
from lrurec_dist.reporting import METRICS, MetricsFile
from lrurec_dist.train.launch import launch_training
from tests.clusters import ENVIRONMENT, RAY, Cluster, cluster, training_workers, wait_for
from tests.datasets import chain_sequences, write_dataset
from tests.stores import S3Server
from tests.test_attempts import NUM_ITEMS, configure, last_files, losses, notes, reached, records, when

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parent.parent
STEPS = 1000


@pytest.fixture(scope="module")
def dataset_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(str(tmp_path_factory.mktemp("faults")), chain_sequences(100, NUM_ITEMS), NUM_ITEMS, shards=4).url


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, s3_environment: object) -> Iterator[Cluster]:  # noqa: ARG001
    """A cluster whose nodes have the S3 server's environment."""
    with cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture
def two(nodes: Cluster) -> Cluster:
    """The cluster with exactly two nodes that hold a worker each."""
    nodes.have(2)
    return nodes


def settings(run: Path, dataset_url: str, *overrides: str) -> Config:
    return configure(
        run, dataset_url, "train.cpus_per_worker=1", f"train.max_steps={STEPS}", "train.validate_every=200", *overrides
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, dataset_url: str, nodes: Cluster) -> Path:
    run = tmp_path_factory.mktemp("undisturbed")
    nodes.have(2)
    launch_training(settings(run, dataset_url))
    return run


def attempts(run: Path) -> list[str]:
    return [line for line in notes(run).splitlines() if line.startswith("attempt")]


def assert_as_undisturbed(run: Path, undisturbed: Path) -> None:
    """Every step has the loss it would have had, and the weights are equal to the bit."""
    assert losses(run) == losses(undisturbed)
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
    assert last_files(run) == last_files(undisturbed)


def test_a_lost_node_is_replaced_by_a_spare_one(tmp_path: Path, dataset_url: str, two: Cluster, undisturbed: Path) -> None:
    two.have(3)
    acting = when(lambda: reached(tmp_path, 220), lambda: two.die_under_a_worker())
    launch_training(settings(tmp_path, dataset_url))
    acting.join()
    assert re.search(
        r"attempt 2: rank \d on node \S+ (was lost with its node|died).*2 workers go on from step 200", attempts(tmp_path)[0]
    )
    assert_as_undisturbed(tmp_path, undisturbed)


def test_a_drained_node_costs_no_step(tmp_path: Path, dataset_url: str, two: Cluster, undisturbed: Path) -> None:
    two.have(3)
    acting = when(lambda: reached(tmp_path, 20), lambda: two.drain_under_a_worker())
    launch_training(settings(tmp_path, dataset_url, "train.max_failures=0"))
    acting.join()
    assert re.search(r"attempt 2: the node of rank \d is being taken away; 2 workers go on", attempts(tmp_path)[0])
    assert attempts(tmp_path)[0].endswith(", 0 steps are repeated")
    assert len(records(tmp_path, "train")) == STEPS
    assert_as_undisturbed(tmp_path, undisturbed)


def test_a_hung_rank_is_named_and_replaced(tmp_path: Path, dataset_url: str, two: Cluster, undisturbed: Path) -> None:
    stopped = []

    def stop() -> None:
        stopped.append(training_workers(two.nodes[-1].pid)[0])
        stopped[0].send_signal(signal.SIGSTOP)

    acting = when(lambda: reached(tmp_path, 220), stop)
    launch_training(settings(tmp_path, dataset_url, "train.collective_timeout_s=30"))
    acting.join()
    said = attempts(tmp_path)[0]
    assert re.search(
        rf"attempt 2: rank \d on node \S+ \(process {stopped[0].pid}\) hung after step 2\d\d, .*silent for \d+ s", said
    ), said
    assert not stopped[0].is_running(), "nothing is left of it"
    assert_as_undisturbed(tmp_path, undisturbed)


def test_a_worker_that_the_kernel_ends_for_lack_of_memory_is_replaced(
    tmp_path: Path, dataset_url: str, two: Cluster, undisturbed: Path
) -> None:
    group, limit = memory_group()
    acting = when(lambda: reached(tmp_path, 220), lambda: exhaust(training_workers(two.nodes[-1].pid)[0], group, limit))
    try:
        launch_training(settings(tmp_path, dataset_url))
        acting.join()
    finally:
        group.rmdir()
    said = attempts(tmp_path)[0]
    assert re.search(
        r"attempt 2: rank \d on node \S+ died \(killed from outside, .*for lack of memory.*go on from step 200", said
    ), said
    assert_as_undisturbed(tmp_path, undisturbed)


def memory_group() -> tuple[Path, str]:
    """An empty control group of this test's own, and its file for how much memory it may have."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root) / f"lrurec-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            if (group / limit).exists():
                return group, limit
            group.rmdir()
    pytest.skip("making a control group for memory needs rights that this process lacks")


def exhaust(worker: psutil.Process, group: Path, limit: str) -> None:
    """Let the kernel run out of memory in a group of the worker and a process that takes more and more: it ends the larger."""
    (group / limit).write_text(str(64 << 20))
    (group / "cgroup.procs").write_text(str(worker.pid))
    take = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); held = [b'x' * (i << 20) for i in range(1, 40)]"
    subprocess.run([sys.executable, "-c", take, str(group / "cgroup.procs")], check=False)
    wait_for("the worker's end", lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


def test_without_a_spare_node_fewer_workers_go_on_and_more_again_when_it_is_back(
    tmp_path: Path, dataset_url: str, two: Cluster
) -> None:
    def lose_and_bring_back() -> None:
        two.die_under_a_worker()
        wait_for("one worker", lambda: "1 worker goes on from step 200" in notes(tmp_path), 300)
        before = max(losses(tmp_path))
        wait_for("steps of one worker", lambda: records(tmp_path, "train")[-1]["step"] > 230 and before, 300)
        two.add_node()

    acting = when(lambda: reached(tmp_path, 220), lose_and_bring_back)
    launch_training(
        settings(
            tmp_path, dataset_url, "train.min_workers=1", "train.wait_for_workers_s=6", "train.max_steps=6000", "model.dropout=0"
        )
    )
    acting.join()
    first, second = attempts(tmp_path)[:2]
    assert "1 worker goes on from step 200" in first
    assert re.search(r"attempt 3: there is room for more workers; 2 workers go on from step [\d,]+, 0 steps are repeated", second)


def test_without_room_for_the_workers_the_job_says_so_and_may_be_sent_again(
    tmp_path: Path, dataset_url: str, two: Cluster
) -> None:
    with pytest.raises(WorkersError, match=r"train\.workers=3: the cluster has room for 2 workers of 1 CPU") as caught:
        launch_training(settings(tmp_path, dataset_url, "train.workers=3", "train.wait_for_workers_s=6"))
    assert caught.value.exit_code == 75
    assert len(two.nodes) >= 2


def test_a_store_that_fails_in_two_attempts_and_then_works(bucket: str, s3: S3Server, two: Cluster, dataset_url: str) -> None:  # noqa: ARG001
    options = ["train.max_steps=60", "train.validate_every=20", "train.report_every=10"]
    plain = settings(Path("/"), dataset_url, *options)
    launch_training(replace(plain, run_dir=f"{bucket}/undisturbed"))
    metrics = MetricsFile(f"{bucket}/run/{METRICS}")
    down = {"request": "PUT .*run/checkpoints/step_000040", "times": 10**6, "action": "refuse", "status": 503, "code": "SlowDown"}
    s3.order(down)
    acting = when(lambda: any("attempt 3" in record.get("text", "") for record in metrics.read()), s3.order)
    launch_training(replace(plain, run_dir=f"{bucket}/run"))
    acting.join()
    said = [record["text"] for record in metrics.read() if record.get("text", "").startswith("attempt")]
    assert len(said) == 2
    for text in said:
        assert re.search(
            r"rank 0: .*step_000040.*could not write in 5 attempts.*go on from step 20, \d+ steps are repeated", text
        )
    undisturbed = MetricsFile(f"{bucket}/undisturbed/{METRICS}").read()
    ends = [
        {record["step"]: record["loss"] for record in run if record["kind"] == "train"} for run in (undisturbed, metrics.read())
    ]
    assert ends[0] == ends[1]


@pytest.mark.usefixtures("two")
def test_a_full_disk_ends_training_at_once_and_the_same_command_goes_on_when_there_is_room(
    tmp_path: Path, dataset_url: str, undisturbed: Path
) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs rights that this process lacks")
    filler = tmp_path / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass

    try:
        acting = when(lambda: reached(tmp_path, 220), fill)
        with pytest.raises(StorageError, match="no room to write") as full:
            launch_training(settings(tmp_path, dataset_url))
        acting.join()
        assert full.value.exit_code == 70
        filler.unlink()
        launch_training(settings(tmp_path, dataset_url))
        assert_as_undisturbed(tmp_path, undisturbed)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_stopped_job_leaves_a_checkpoint_and_a_second_submission_finishes_it(tmp_path: Path, two: Cluster) -> None:
    environment = {**os.environ, **ENVIRONMENT, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{two.dashboard}"}
    environment.pop("RAY_ADDRESS", None)
    run = tmp_path / "run"
    small = ["synthetic.users=300", "synthetic.items=100", "dataset.shards=2", "model.dim=8", "model.hidden=8"]
    steps = [f"train.max_steps={STEPS}", "train.validate_every=500", "train.report_every=1", "train.cpus_per_worker=1"]
    entry = [sys.executable, "jobs/train.py", "configs/quickstart.yaml", f"run_dir={run}", *small, *steps]

    def job(*arguments: str) -> str:
        done = subprocess.run(
            [RAY, "job", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        return done.stdout + done.stderr

    submitted = job("submit", "--no-wait", "--submission-id", "first", "--working-dir", ".", "--", *entry)
    assert "'first' submitted successfully" in submitted, submitted
    wait_for("steps of the first submission", lambda: reached(run, 20), 300)
    job("stop", "first")
    status = storage.read_json(str(run / "status.json"))
    assert (status["result"], status["exit_code"], status["stage"]) == ("stopped", 75, "train")
    at = max(losses(run))
    assert 20 <= at < 500
    job("submit", "--submission-id", "second", "--working-dir", ".", "--", *entry)
    assert storage.read_json(str(run / "status.json"))["result"] == "done"
    assert [record["step"] for record in records(run, "train")] == list(range(1, STEPS + 1)), "no step was lost or made twice"
