"""Channels that move by compare-and-swap, on local disk and S3: races, paused and killed publishers, rollback, gc, the command."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lrurec_dist import storage
from lrurec_dist.errors import BundleError, ChannelMovedError, ConfigError, DataNotReadyError, IntegrityError
from lrurec_dist.serve import registry
from lrurec_dist.serve.channels import CANDIDATE, CHAMPION, Channel, begin_decision, decision_url, move, read_channel
from lrurec_dist.serve.gate import Check
from lrurec_dist.serve.registry import LEFTOVER_S, Outcome, collect, list_versions, offer, rollback, version_url
from lrurec_dist.serve.registry_command import main
from tests.processes import killed_at

FINE, POOR = Check("recall@10", 0.3, 0.1, True), Check("ndcg@10", 0.05, 0.1, False, "below its floor")


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty registry on each store that can hold one."""
    return f"{tmp_path}/registry" if request.param == "local" else request.getfixturevalue("bucket")


@pytest.fixture
def local(tmp_path: Path) -> str:
    return f"{tmp_path}/registry"


def write_version(registry_url: str, version: str, recall: float = 0.25) -> str:
    """A committed directory with what lists show of a bundle."""
    url = version_url(registry_url, version)
    storage.write_json(storage.join(url, "metrics.json"), {"model": {"recall@10": recall, "ndcg@10": recall / 2}})
    storage.write_bytes(storage.join(url, "model.safetensors"), version.encode() * 100)
    storage.commit(url, {"version": version, "num_items": 1200})
    return version


def publish(registry_url: str, version: str, *checks: Check) -> Outcome:
    return offer(registry_url, version, lambda _: (checks or [FINE], {"users": 7}), {"run": "here"})


def champion(registry_url: str) -> str | None:
    pointer = read_channel(registry_url, CHAMPION).pointer
    return pointer and pointer.version


def record(registry_url: str, name: str) -> dict[str, Any]:
    return dict(storage.read_json(decision_url(registry_url, name)))


def test_versions_follow_each_other_and_every_decision_stays_on_record(place: str) -> None:
    for number in range(1, 4):
        version = write_version(place, f"2026-11-2{number}-abc")
        outcome = publish(place, version)
        assert outcome.pointer is not None
        assert (outcome.pointer.generation, outcome.decision) == (number, f"{version}-1")
        manifest_url = storage.join(version_url(place, version), storage.MANIFEST)
        assert outcome.pointer.manifest_sha256 == storage.file_sha256(manifest_url)
        assert read_channel(place, CHAMPION).pointer == outcome.pointer
    assert outcome.pointer.previous == ["2026-11-22-abc", "2026-11-21-abc"]
    found = record(place, "2026-11-22-abc-1")
    assert (found["result"], found["users"], found["run"]) == ("accepted", 7, "here")
    assert found["champion"] == {"version": "2026-11-21-abc", "generation": 1}
    assert found["checks"] == [{"name": "recall@10", "value": 0.3, "limit": 0.1, "passed": True, "reason": ""}]


def test_a_refused_version_leaves_the_champion_and_its_numbers(place: str) -> None:
    publish(place, write_version(place, "good"))
    before = read_channel(place, CHAMPION)
    outcome = publish(place, write_version(place, "poor"), FINE, POOR)
    assert outcome.pointer is None
    assert read_channel(place, CHAMPION) == before
    pointer = read_channel(place, CANDIDATE).pointer
    assert pointer is not None
    assert (pointer.version, pointer.decision) == ("poor", "poor-1")
    found = record(place, "poor-1")
    assert found["result"] == "refused"
    assert [check["passed"] for check in found["checks"]] == [True, False]
    assert publish(place, "poor").decision == "poor-2", "a second decision, beside the first"


def test_of_fifty_publishers_at_once_exactly_one_wins_each_generation(place: str) -> None:
    publishers, generations = 50, 3
    versions = [f"v{number:02d}" for number in range(publishers)]
    begun = threading.Barrier(publishers)

    def race(version: str) -> list[bool]:
        won = []
        for _ in range(generations):
            begun.wait(60)
            seen = read_channel(place, CHAMPION)
            begun.wait(60)  # all have seen the same generation
            try:
                move(seen, version, "sha", f"{version}-1", seen.versions)
                won.append(True)
            except ChannelMovedError:
                won.append(False)
        return won

    with ThreadPoolExecutor(publishers) as pool:
        won = list(pool.map(race, versions))
    winners = [[version for version, of_version in zip(versions, won, strict=True) if of_version[g]] for g in range(generations)]
    assert [len(of_generation) for of_generation in winners] == [1] * generations
    pointer = read_channel(place, CHAMPION).pointer
    assert pointer is not None
    assert pointer.generation == generations
    assert [pointer.version, *pointer.previous] == [of_generation[0] for of_generation in reversed(winners)]


def test_a_publisher_that_wakes_up_late_is_refused_and_its_record_says_so(place: str) -> None:
    publish(place, write_version(place, "first"))
    write_version(place, "slow")
    write_version(place, "fast")

    def examine(_: Channel) -> tuple[list[Check], dict[str, Any]]:
        publish(place, "fast")  # while the other one is paused
        return [FINE], {}

    with pytest.raises(ChannelMovedError, match=r"was at generation 1 when this began and is at 2 \(fast\) now"):
        offer(place, "slow", examine, {})
    assert champion(place) == "fast"
    found = record(place, "slow-1")
    assert found["result"] == "broken off"
    assert found["error"].startswith("ChannelMovedError")


def test_versions_offered_at_once_all_get_records_of_their_own(place: str) -> None:
    write_version(place, "same")
    begun = threading.Barrier(8)

    def claim(_: int) -> str:
        begun.wait(60)
        return begin_decision(place, "same", "publish").name

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(claim, range(8))) == [f"same-{number}" for number in range(1, 9)]


KILLED = {
    "before the record is begun": "registry.begin_decision = stop",
    "before the candidate's channel moves": "registry.move_candidate = stop",
    "before the checks": "examine = stop",
    "before the record is written": "channels.Decision.write = stop",
    "before the champion's channel moves": "registry.move = stop",
    "while the champion's channel is written": "storage.write_bytes = stop_at_champion",
    "while it is put in place": "os.replace = stop_at_champion",
}


@pytest.mark.parametrize("patch", KILLED.values(), ids=KILLED)
def test_a_publisher_that_is_killed_between_two_steps_leaves_the_old_version_serving(local: str, patch: str) -> None:
    publish(local, write_version(local, "old"))
    before = read_channel(local, CHAMPION)
    write_version(local, "new")
    killed_at(
        "here",
        f"""
import os, time
from lrurec_dist import storage
from lrurec_dist.serve import channels, registry
from lrurec_dist.serve.gate import Check

def stop(*_, **__):
    print("here", flush=True)
    time.sleep(600)

write_bytes, replace = storage.write_bytes, os.replace

def stop_at_champion(first, second):
    if "champion" in str(first):
        stop()
    return (replace if isinstance(second, str) else write_bytes)(first, second)

examine = lambda _: ([Check("x", 1.0, 0.0, True)], {{}})
{patch}
registry.offer({local!r}, "new", examine, {{}})
""",
    )
    assert read_channel(local, CHAMPION) == before
    assert [version.version for version in list_versions(local) if CHAMPION in version.channels] == ["old"]
    assert "new" not in {removal.version for removal in collect(local, keep=1)}
    outcome = publish(local, "new")
    assert outcome.pointer is not None
    assert (outcome.pointer.generation, champion(local)) == (2, "new")


@pytest.mark.usefixtures("no_wait")
def test_a_promotion_whose_answer_is_lost_is_a_promotion(s3: Any, bucket: str) -> None:
    publish(bucket, write_version(bucket, "old"))
    write_version(bucket, "new")
    s3.order({"request": "PUT .*champion", "times": 6, "action": "lose the answer"})
    outcome = publish(bucket, "new")
    assert outcome.pointer is not None
    assert (outcome.pointer.generation, champion(bucket)) == (2, "new")


def test_a_version_that_changes_while_it_is_examined_is_not_promoted(local: str) -> None:
    write_version(local, "new")

    def examine(_: Channel) -> tuple[list[Check], dict[str, Any]]:
        write_version(local, "new", recall=0.9)
        return [FINE], {}

    with pytest.raises(BundleError, match="changed while it was examined"):
        offer(local, "new", examine, {})
    assert champion(local) is None


def test_rolling_back_twice_goes_back_twice_and_on_record(place: str) -> None:
    for version in ("a", "b", "c"):
        publish(place, write_version(place, version))
    assert (rollback(place).version, rollback(place).version) == ("b", "a")
    pointer = read_channel(place, CHAMPION).pointer
    assert pointer is not None
    assert (pointer.generation, pointer.previous, pointer.decision) == (5, [], "a-2")
    assert record(place, "a-2")["kind"] == "rollback"
    assert record(place, "a-2")["champion"] == {"version": "b", "generation": 4}
    with pytest.raises(DataNotReadyError, match="a has no champion before it"):
        rollback(place)
    assert rollback(place, "c").previous == ["a"], "forward again, on request"


def test_what_cannot_be_rolled_back_to_is_refused(local: str) -> None:
    with pytest.raises(DataNotReadyError, match="has no champion to roll back from"):
        rollback(local)
    for version in ("2026-11-20-a", "2026-11-21-b"):
        publish(local, write_version(local, version))
    with pytest.raises(ConfigError, match="has no whole version '2026-11-20-b'; there are 2026-11-2"):
        rollback(local, "2026-11-20-b")
    with pytest.raises(ConfigError, match="is champion already"):
        rollback(local, "2026-11-21-b")
    (Path(version_url(local, "2026-11-20-a")) / "model.safetensors").write_bytes(b"changed")
    with pytest.raises(BundleError, match="changed after the commit"):
        rollback(local)
    assert champion(local) == "2026-11-21-b"


def test_a_channel_that_is_no_pointer_is_named(local: str) -> None:
    storage.write_bytes(storage.join(local, "channels", "champion.json"), b'{"version": "a"}')
    with pytest.raises(IntegrityError, match=r"champion\.json is no pointer to a version: KeyError"):
        read_channel(local, CHAMPION)


def test_gc_removes_what_nothing_needs_and_only_when_told(place: str) -> None:
    for version in ("a", "b", "c"):
        publish(place, write_version(place, version))
    for version in ("d", "e", "f", "g"):
        write_version(place, version)
    publish(place, "e", POOR)
    begin_decision(place, "f", "publish")
    names = storage.list_names(storage.join(place, "versions"))
    would = collect(place, keep=1)
    assert [removal.version for removal in would] == ["d"], "g is new, f is being decided on, e is candidate, c b a are champions"
    assert storage.list_names(storage.join(place, "versions")) == names
    assert collect(place, keep=1, remove=True) == would
    assert storage.list_names(storage.join(place, "versions")) == [name for name in names if name != "d"]
    assert collect(place, keep=1) == []


def test_gc_forgets_champions_beyond_the_memory_of_the_channel_and_decisions_that_were_broken_off(
    local: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrurec_dist.serve.channels.PREVIOUS_KEPT", 1)
    for version in ("a", "b", "c"):
        publish(local, write_version(local, version))
    pending = begin_decision(local, "a", "publish")
    assert collect(local, keep=0) == []
    pending.write(started=time.time() - 25 * 3600)
    assert [removal.version for removal in collect(local, keep=0)] == ["a"]


def test_gc_asks_again_just_before_it_removes(local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("a", "b"):
        write_version(local, version)
    find = registry._leftovers

    def meanwhile(url: str) -> Any:
        publish(local, "a")
        return find(url)

    monkeypatch.setattr(registry, "_leftovers", meanwhile)  # after the outdated ones were found
    assert collect(local, keep=1, remove=True) == []
    assert champion(local) == "a"
    assert {version.version for version in list_versions(local)} == {"a", "b"}


def test_gc_removes_leftovers_of_uploads_after_a_day_and_no_upload_that_goes_on(local: str) -> None:
    for version in ("going on", "broken off"):
        storage.write_bytes(storage.join(version_url(local, version), "model.safetensors"), b"half")
    long_ago = time.time() - LEFTOVER_S - 60
    os.utime(Path(version_url(local, "broken off")) / "model.safetensors", (long_ago, long_ago))
    assert [removal.version for removal in collect(local, keep=0, remove=True)] == ["broken off"]
    assert storage.list_names(storage.join(local, "versions")) == ["going on"]


def test_the_command_lists_shows_rolls_back_and_collects(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> list[str]:
        assert main(arguments, description="") == 0
        return capsys.readouterr().out.splitlines()

    assert run("list", place) == [f"{place} has no versions"]
    for version in ("2026-11-20-a", "2026-11-21-b"):
        publish(place, write_version(place, version))
    publish(place, write_version(place, "2026-11-22-c", recall=0.5), POOR)
    table = [line.split() for line in run("list", place)[2:]]
    assert {row[0]: (row[-5:-2], row[-1]) for row in table} == {
        "2026-11-20-a": (["0.25000", "0.12500", "1,200"], "previous"),
        "2026-11-21-b": (["0.25000", "0.12500", "1,200"], "champion"),
        "2026-11-22-c": (["0.50000", "0.25000", "1,200"], "candidate"),
    }
    shown = "\n".join(run("show", place, "candidate"))
    assert "2026-11-22-c-1: publish against 2026-11-21-b, generation 2: refused" in shown
    assert "below its floor" in shown
    assert "model.safetensors" in shown
    assert run("rollback", place) == ["2026-11-20-a is champion, generation 3; it was 2026-11-21-b"]
    assert "would remove 1" in run("gc", place, "--keep", "0")[-1]
    assert "removed 1" in run("gc", place, "--keep", "0", "--remove")[-1]
    assert run("gc", place, "--keep", "0")[0].startswith("nothing to remove")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["show", "{}", "2026-11-20-x"], 30, "has no whole version '2026-11-20-x'; there are 2026-11-20-a"),
        (["show", "{}", "champion"], 20, "has no champion; publish a version"),
        (["rollback", "{}"], 20, "has no champion to roll back from"),
        (["list", "memory://registry"], 30, "no conditional writes"),
    ],
)
def test_what_is_not_there_ends_with_one_line_and_its_code(
    local: str, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    write_version(local, "2026-11-20-a")
    assert main([argument.format(local) for argument in arguments], description="") == code
    (line,) = capsys.readouterr().out.splitlines()
    assert message in line


def test_pointers_are_plain_json(local: str) -> None:
    publish(local, write_version(local, "a"))
    values = json.loads((Path(local) / "channels" / "champion.json").read_text())
    assert {"version", "manifest_sha256", "previous", "generation", "decision"} <= values.keys()
