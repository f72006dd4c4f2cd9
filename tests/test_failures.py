"""What an attempt's end is called, and whether another one follows."""

import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError
from ray.train import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.preemption import PreemptionInfo

from lrurec_dist.errors import CatalogueError, DivergenceError, LrurecError, StorageError, TryAgainError
from lrurec_dist.train.failures import Failure, diagnose
from lrurec_dist.train.heartbeats import Pulse
from lrurec_dist.train.presence import FAILED, TRAINING, WAITING

GLOO = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
DIED = WorkerHealthCheckFailedError("A worker health check failed.", RayActorError(error_msg="The actor died unexpectedly."))
PULSES = [Pulse(0, "10.0.0.2", 11, 437, TRAINING, 0.1, 2.0), Pulse(1, "10.0.0.3", 12, 437, TRAINING, 9.0, 9.5)]


def diagnosed(failures: dict[int, BaseException], pulses: list[Pulse] = PULSES, hung: tuple[Pulse, ...] = ()) -> Failure:
    return diagnose(WorkerGroupError("…", failures), pulses, hung, 600)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [DivergenceError("loss is nan"), CatalogueError("other ids"), StorageError("no room")])
def test_a_deliberate_error_is_final_and_keeps_its_class_whatever_it_did_to_others(error: LrurecError) -> None:
    final = diagnosed({0: GLOO, 1: error}).final
    assert type(final) is type(error)
    assert str(final) == f"rank 1: {error}"


def test_an_error_of_the_code_is_final() -> None:
    failure = diagnosed({0: GLOO, 1: TypeError("unsupported operand")})
    assert str(failure.final) == "rank 1 failed: TypeError: unsupported operand"


@pytest.mark.parametrize("others", [{}, {0: GLOO}])
def test_a_dead_worker_is_named_with_its_node_and_not_those_that_lost_it(others: dict[int, BaseException]) -> None:
    failure = diagnosed({**others, 1: DIED})
    assert failure.text.startswith("rank 1 on node 10.0.0.3 died (killed from outside")
    assert (failure.final, failure.preempted, failure.memory, failure.step) == (None, False, False, 437)


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("Task was killed due to the node running low on memory. Memory on the node was 15.2GB / 16GB"),
        MemoryError("Unable to allocate 3 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
    ],
)
def test_lack_of_memory_is_said_and_tried_again(error: BaseException) -> None:
    failure = diagnosed({0: GLOO, 1: error})
    assert failure.memory
    assert failure.final is None
    assert failure.text.startswith("rank 1 on node 10.0.0.3 died for lack of memory")


def test_a_store_that_fails_in_passing_is_tried_again() -> None:
    failure = diagnosed({0: TryAgainError("s3://b/x: could not write in 5 attempts")})
    assert (failure.text, failure.final) == ("rank 0: s3://b/x: could not write in 5 attempts", None)


def test_a_node_that_is_taken_away_is_told_apart() -> None:
    taken = WorkerHealthCheckFailedError("failed", RayActorError(error_msg="node died", preempted=True))
    assert diagnosed({0: GLOO, 1: taken}).preempted
    info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [1], "b": [2]})
    failure = diagnose(PreemptionError(info), PULSES, (), 600)
    assert failure.preempted
    assert failure.text == "ranks 1, 2 lost a node that was taken away"


@pytest.mark.parametrize(
    ("late", "said"),
    [
        (
            Pulse(1, "n1", 12, 437, TRAINING, 600.0, 601.0),
            "rank 1 on node n1 (process 12) hung after step 437, training, silent for 600 s",
        ),
        (
            Pulse(1, "n1", 12, 436, TRAINING, 0.2, 600.0),
            "rank 1 on node n1 (process 12) hung after step 436, training, unmoved for 600 s",
        ),
        (Pulse(1, "n1", 12, 437, WAITING, 0.2, 600.0), "hung after step 437, waiting for data, unmoved for 600 s"),
    ],
)
def test_a_timeout_names_the_rank_that_did_not_arrive(late: Pulse, said: str) -> None:
    # the one that failed falls silent too, and is not the one that hung
    waited = Pulse(0, "n0", 11, 437, FAILED, 5.0, 5.0)
    timeout = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 600000ms for recv operation to complete")
    failure = diagnosed({0: timeout}, [waited, late])
    assert said in failure.text
    assert failure.final is None
    assert "rank 0" not in failure.text


def test_a_rank_that_we_ended_hung_whatever_ray_says_of_its_death() -> None:
    assert "rank 1 on node 10.0.0.3 (process 12) hung" in diagnosed({0: GLOO, 1: DIED}, PULSES, (PULSES[1],)).text


def test_workers_that_did_not_start_are_tried_again() -> None:
    failure = diagnose(ControllerError(RuntimeError("timed out\nno placement")), [], (), 600)
    assert (failure.text, failure.final, failure.step) == ("workers did not start: no placement", None, 0)


def test_an_unreachable_actor_is_a_lost_one() -> None:
    assert diagnosed({1: ActorUnavailableError("keepalive timeout", None)}).final is None
