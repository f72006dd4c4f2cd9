"""Nodes for data and nodes for training: what runs where, on a cluster whose nodes are told apart by custom resources."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray._private.state import state
from ray.cluster_utils import Cluster

from lrurec_dist.data import passes
from lrurec_dist.errors import WorkersError
from lrurec_dist.stages import run_job
from lrurec_dist.train.launch import launch_training
from tests.clusters import wait_for
from tests.datasets import chain_sequences, write_dataset
from tests.trainings import NUM_ITEMS, configure

# Ray's own test cluster leaves the sockets to the garbage collector by which it looked for free ports.
pytestmark = [
    pytest.mark.faults,  # a cluster of two nodes: minutes on a busy machine
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
QUICKSTART = str(Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml")
SMALL = ["synthetic.users=60", "synthetic.items=30", "dataset.shards=2"]


@pytest.fixture(scope="module")
def data_node() -> Iterator[str]:
    """The id of a node for data; the other one, where the driver is and Ray would go first, stands for one with a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_raylet_start_wait_time_s", "120")  # a machine in heavy use does not meet Ray's 30 s
        patch.setenv("RAY_health_check_timeout_ms", "60000")  # nor, always, 10 s, after which what a node owned is lost
        temporary = f"/tmp/lp{os.getpid()}"  # of its own: what Ray keeps in /tmp/ray would be the whole machine's
        head = {"num_cpus": 2, "resources": {"gpu_node": 1}, "include_dashboard": False, "temp_dir": temporary}
        made = Cluster(initialize_head=True, head_node_args=head)
        made.add_node(num_cpus=2, resources={"data_node": 1})
        ray.init(address=made.address, logging_level="ERROR", log_to_driver=False)
        (found,) = (node["NodeID"] for node in ray.nodes() if "data_node" in node["Resources"])
        yield found
        ray.shutdown()
        made.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)


def places() -> dict[str, set[str]]:
    """Ids of the nodes on which tasks ran, by the tasks' names."""
    found: dict[str, set[str]] = {}
    for event in state._get_all_task_events():  # the public way needs a dashboard
        if event.state_updates.node_id:
            found.setdefault(event.task_info.name, set()).add(event.state_updates.node_id.hex())
    return found


def test_data_tasks_stay_on_the_nodes_for_data(data_node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "LOCAL_BYTES", 0)
    overrides = [f"run_dir={tmp_path}", *SMALL, "dataset.resources={data_node: 0.01}"]
    assert run_job(overrides, stages=("prepare",), description="", default_config=QUICKSTART) == 0
    wait_for("Ray to know of all tasks", lambda: {"_read_task", "_merge_task", "_each_task"} <= places().keys())
    assert set().union(*places().values()) == {data_node}


@pytest.mark.usefixtures("data_node")
def test_training_workers_ask_for_what_their_nodes_have(tmp_path: Path) -> None:
    dataset = write_dataset(str(tmp_path / "dataset"), chain_sequences(20, NUM_ITEMS), NUM_ITEMS, shards=2).url
    two = ["train.workers=2", "train.resources={gpu_node: 1}", "train.wait_for_workers_s=1"]
    with pytest.raises(WorkersError, match=r"has room for 1 workers of 0\.5 CPU, 1 gpu_node"):
        launch_training(configure(tmp_path / "run", dataset, *two))
