import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lrurec_dist import storage
from lrurec_dist.conditional import create_if_absent, read_with_version, replace_if_unchanged
from lrurec_dist.errors import ConfigError

PROCESSES, INCREMENTS, CREATED = 3, 4, 6


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty directory's URL on each store with conditional writes."""
    return f"{tmp_path}/place" if request.param == "local" else request.getfixturevalue("bucket")


def in_processes(function: Callable[..., Any], url: str) -> list[Any]:
    """What `function(url, process, barrier)` returns in each of several processes that start it together."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(PROCESSES) as pool:
        barrier = manager.Barrier(PROCESSES)
        return pool.starmap_async(function, [(url, process, barrier) for process in range(PROCESSES)], 1).get(120)


def create(url: str, process: int, barrier: Any) -> list[bool]:
    won = []
    for number in range(CREATED):
        barrier.wait(60)
        won.append(create_if_absent(storage.join(url, str(number)), f"process {process}".encode()))
    return won


def increment(url: str, process: int, barrier: Any) -> int:
    lost = 0
    barrier.wait(60)
    for number in range(INCREMENTS):
        while True:
            data, version = read_with_version(url)
            count = json.loads(data)["count"]
            if replace_if_unchanged(url, json.dumps({"count": count + 1, "by": [process, number]}).encode(), version):
                break
            lost += 1
    return lost


def test_of_several_processes_exactly_one_creates_a_file(place):
    won = in_processes(create, place)
    for number in range(CREATED):
        winners = [process for process in range(PROCESSES) if won[process][number]]
        assert len(winners) == 1
        assert storage.read_bytes(storage.join(place, str(number))) == f"process {winners[0]}".encode()


def test_no_replacement_of_several_processes_is_lost(place):
    url = storage.join(place, "counter")
    create_if_absent(url, json.dumps({"count": 0}).encode())
    in_processes(increment, url)
    assert storage.read_json(url)["count"] == PROCESSES * INCREMENTS


def test_what_was_replaced_in_between_is_not_replaced(place):
    url = storage.join(place, "file")
    assert create_if_absent(url, b"first")
    data, version = read_with_version(url)
    assert data == b"first"
    assert replace_if_unchanged(url, b"second", version)
    assert not replace_if_unchanged(url, b"third", version)
    assert not create_if_absent(url, b"fourth")
    assert storage.read_bytes(url) == b"second"


def test_what_is_not_there_is_not_replaced(place):
    url = storage.join(place, "file")
    create_if_absent(url, b"first")
    _, version = read_with_version(url)
    storage.remove_tree(url)
    assert not replace_if_unchanged(url, b"second", version)
    assert not storage.exists(url)
    with pytest.raises(FileNotFoundError):
        read_with_version(url)


def test_conditional_writes_leave_nothing_that_counts_as_a_file(place):
    url = storage.join(place, "file")
    create_if_absent(url, b"first")
    create_if_absent(url, b"other")
    replace_if_unchanged(url, b"second", read_with_version(url)[1])
    assert storage.list_files(place) == ["file"]


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize("times", [1, 6])  # 6: more than s3fs repeats a request by itself
def test_a_write_whose_answer_is_lost_is_known_to_be_ours(s3, bucket, times):
    url = storage.join(bucket, "file")
    s3.order({"request": "PUT .*/file", "times": times, "action": "lose the answer"})
    assert create_if_absent(url, b"mine")
    _, version = read_with_version(url)
    s3.order({"request": "PUT .*/file", "times": times, "action": "lose the answer"})
    assert replace_if_unchanged(url, b"mine, too", version)
    assert storage.read_bytes(url) == b"mine, too"


def test_a_store_without_conditional_writes_is_refused():
    with pytest.raises(ConfigError, match="no conditional writes"):
        create_if_absent("memory://place/file", b"")
