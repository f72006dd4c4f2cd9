"""The service as a user runs it: a process that survives a swap under load, refuses what is unsafe, and stops when told."""

import threading
from pathlib import Path

import pytest

from lrurec_dist.config import Config
from lrurec_dist.config_file import load_config
from lrurec_dist.config_serving import ServeConfig
from lrurec_dist.errors import ConfigError, DataNotReadyError
from lrurec_dist.serve.http_server import plan_service
from tests.clusters import free_port
from tests.services import call, promote, redis_server, running, write_versions

REQUESTS = 600  # of all clients, at least
KEPT = 5000  # events of a user that outlive a swap
KEEP = f"serve.keep_events={KEPT}"
TOKEN = "a token that nobody guesses"  # noqa: S105
# Ray kills a proxy that is not there after five seconds, which a busy machine needs to import it.
PATIENCE = {f"RAY_SERVE_PROXY_{check}_TIMEOUT_S": "200" for check in ("READY_CHECK", "HEALTH_CHECK")}


def swap_under_load(url: str, registry: str, versions: list[str]) -> None:
    """Four clients, each with a user of its own, while the champion moves: every request is answered, and no event is lost."""
    found: list[tuple[int, str]] = []
    sent = [0] * 4
    both_seen, halfway = threading.Event(), threading.Event()

    def send(client: int) -> None:
        asked = 0
        while asked < REQUESTS // 4 or not both_seen.is_set():
            asked += 1
            path, body = (
                ("/recommend", {"events": ["i001", "i002"], "k": 5}),
                ("/events", {"user": f"u{client}", "events": ["i003"]}),
                ("/recommend", {"user": f"u{client}", "k": 5}),
            )[asked % 3]
            status, answer = call(url + path, body, TOKEN)
            found.append((status, answer.get("version", answer)))
            sent[client] += path == "/events"
            if len(found) > REQUESTS // 4:
                halfway.set()
            if answer.get("version") == versions[1] or status != 200:
                both_seen.set()

    clients = [threading.Thread(target=send, args=(client,)) for client in range(4)]
    for client in clients:
        client.start()
    assert halfway.wait(120)
    promote(registry, versions[1])
    for client in clients:
        client.join()
    assert {status for status, _ in found} == {200}
    assert {version for _, version in found} == set(versions)
    assert len(found) >= REQUESTS
    states = [call(f"{url}/recommend", {"user": f"u{client}", "k": 1}, TOKEN)[1]["state"] for client in range(4)]
    assert [state["events"] for state in states] == [min(events, KEPT) for events in sent], "the swap kept what users did"


def test_a_swap_under_load_fails_no_request(tmp_path: Path) -> None:
    registry, versions = write_versions(tmp_path)
    settings = ("serve.runner=process", "serve.port=0", "serve.poll_s=0.05", "serve.token_variable=OUR_TOKEN", KEEP)
    with running(tmp_path, registry, *settings, timeout_s=250, OUR_TOKEN=TOKEN) as (url, lines):
        swap_under_load(url, registry, versions)
    assert f"serve: version {versions[1]} serves now, generation 2" in lines
    assert lines[-1] == "serve: stopped"
    assert not any(secret in line for line in lines for secret in (TOKEN, "i001", "u0"))


@pytest.mark.faults
def test_replicas_that_share_redis_swap_one_by_one_under_load_and_fail_no_request(tmp_path: Path) -> None:
    registry, versions = write_versions(tmp_path)
    settings = (f"serve.port={free_port()}", "serve.poll_s=0.05", "serve.token_variable=OUR_TOKEN", KEEP)
    more = ("serve.replicas=3", "serve.redis_variable=OUR_REDIS")
    with redis_server(tmp_path) as redis:
        secrets = {"OUR_TOKEN": TOKEN, "OUR_REDIS": redis}
        with running(tmp_path, registry, *settings, *more, timeout_s=280, **secrets, **PATIENCE) as (url, _):
            swap_under_load(url, registry, versions)


def test_ray_serve_answers_and_stops(tmp_path: Path) -> None:
    registry, versions = write_versions(tmp_path, 1)
    settings = (f"serve.port={free_port()}", "serve.token_variable=OUR_TOKEN")
    with running(tmp_path, registry, *settings, timeout_s=280, OUR_TOKEN=TOKEN, **PATIENCE) as (url, _):
        assert call(f"{url}/readyz") == (200, {"status": "ready", "version": versions[0]})
        assert call(f"{url}/recommend", {"events": ["i001"]})[0] == 401
        status, answer = call(f"{url}/recommend", {"events": ["i001", "i002"], "k": 3}, TOKEN)
        assert (status, len(answer["items"]), answer["version"]) == (200, 3, versions[0])
        assert call(f"{url}/events", {"user": "anna", "events": ["i001"]}, TOKEN)[1]["state"]["events"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, r"serve\.host=0\.0\.0\.0: .*serve\.token_variable"),  # noqa: S104
        ({"host": "recommender.example"}, r"serve\.host="),
        ({"host": "::"}, r"serve\.host="),
        ({"replicas": 2}, r"serve\.replicas=2: .*serve\.redis_variable"),
        ({"replicas": 2, "redis_variable": "REDIS", "runner": "process"}, r"serve\.replicas=2"),
        ({"port": 0}, r"serve\.port=0"),
        ({"port": 70_000, "runner": "process"}, r"serve\.port=70000"),
        ({"poll_s": 0.0}, r"serve\.poll_s=0\.0"),
        ({"max_k": 0}, r"serve\.max_k=0"),
        ({"keep_events": -1}, r"serve\.keep_events=-1"),
    ],
)
def test_unsafe_or_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServeConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "::1"},
        {"host": "127.0.0.2"},
        {"host": "localhost"},
        {"host": "0.0.0.0", "token_variable": "T"},  # noqa: S104
        {"host": "0.0.0.0", "allow_open": True},  # noqa: S104
    ],
)
def test_safe_settings_are_not_refused(settings: dict[str, object]) -> None:
    ServeConfig(**settings)  # type: ignore[arg-type]


def plan(*settings: str) -> object:
    config: Config = load_config(None, list(settings))
    return plan_service(config)


def test_what_is_not_there_is_named_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, _ = write_versions(tmp_path, 1)
    monkeypatch.setenv("EMPTY", "")
    for name in ("EMPTY", "NOWHERE_SET"):
        for setting in ("token_variable", "redis_variable"):
            with pytest.raises(ConfigError, match=rf"serve\.{setting}={name}: .*is not set, or empty"):
                plan(f"bundle.registry={registry}", f"serve.{setting}={name}")
    monkeypatch.setenv("REDIS", "http://:secret@somewhere")
    with pytest.raises(ConfigError, match="redis://") as refused:
        plan(f"bundle.registry={registry}", "serve.redis_variable=REDIS")
    assert "secret" not in str(refused.value)
    with pytest.raises(DataNotReadyError, match="has no champion"):
        plan(f"bundle.registry={tmp_path}/none")
    monkeypatch.setenv("TOKEN", TOKEN)
    assert TOKEN not in repr(plan(f"bundle.registry={registry}", "serve.token_variable=TOKEN"))
