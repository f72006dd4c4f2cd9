"""The service over HTTP: answers, limits, token, descriptions, figures; a real server in a thread."""

import http.client
import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from lrurec_dist.serve.recommender import Recommender
from lrurec_dist.serve.registry import version_url
from tests.services import call, in_thread, write_versions

HISTORY = ["i001", "i007", "i002"]
TOKEN = "a token that nobody guesses"  # noqa: S105


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    return write_versions(tmp_path_factory.mktemp("http"), 1, {"i002": "Alpha Centauri", "i041": "Beta"})


@pytest.fixture(scope="module")
def recommender(registry: tuple[str, list[str]]) -> Recommender:
    return Recommender.load(version_url(registry[0], registry[1][0]))


@pytest.fixture(scope="module")
def service(registry: tuple[str, list[str]]) -> Iterator[str]:
    with in_thread(registry[0], max_k=20, max_events=50, max_filter=30, max_body_bytes=4000) as url:
        yield url


@pytest.fixture(scope="module")
def guarded(registry: tuple[str, list[str]]) -> Iterator[str]:
    with in_thread(registry[0], TOKEN) as url:
        yield url


def test_answers_are_those_of_the_recommender(service: str, recommender: Recommender) -> None:
    status, answer = call(f"{service}/recommend", {"events": [*HISTORY, "never seen"], "k": 4, "exclude": ["i003"]})
    expected = recommender.recommend(HISTORY, 4, exclude=["i003"])
    assert status == 200
    assert [item["item_key"] for item in answer["items"]] == [item.item_key for item in expected]
    assert [item["score"] for item in answer["items"]] == pytest.approx([item.score for item in expected], rel=1e-4)
    facts = {name: answer[name] for name in ("version", "unknown_items", "rebuilt", "state")}
    titles = {
        item["item_key"]: item["title"]
        for item in call(f"{service}/recommend", {"events": [], "allow": ["i002", "i003"]})[1]["items"]
    }
    assert titles == {"i002": "Alpha Centauri", "i003": None}
    assert facts == {"version": recommender.version, "unknown_items": 1, "rebuilt": False, "state": None}


def test_events_advance_a_user_who_then_gets_a_list_from_the_state(service: str, recommender: Recommender) -> None:
    for key, events in zip(HISTORY, (1, 2, 3), strict=True):
        status, answer = call(f"{service}/events", {"user": "anna", "events": [key]})
        assert (status, answer["state"]["events"]) == (200, events)
    _, answer = call(f"{service}/recommend", {"user": "anna", "k": 4, "allow": ["i010", "i011", "i002"]})
    (state,) = recommender.encode([HISTORY])
    expected = recommender.recommend_from_states([state], 4, allow=["i010", "i011", "i002"])[0]
    assert [item["item_key"] for item in answer["items"]] == [item.item_key for item in expected]
    assert answer["state"]["norms"] == pytest.approx(state.recurrent.flatten(1).norm(dim=1).tolist(), rel=1e-4)
    assert answer["state"]["origin"] == "stored"


def test_many_clients_at_once_get_what_each_gets_alone(service: str, recommender: Recommender) -> None:
    histories = [[f"i{first:03d}", f"i{first + 1:03d}"] for first in range(1, 41)]
    with ThreadPoolExecutor(10) as clients:
        found = list(clients.map(lambda history: call(f"{service}/recommend", {"events": history, "k": 3}), histories))
    for history, (status, answer) in zip(histories, found, strict=True):
        assert status == 200
        assert [item["item_key"] for item in answer["items"]] == [item.item_key for item in recommender.recommend(history, 3)]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/recommend", {}, "neither user nor events"),
        ("/recommend", {"events": [], "k": 21}, "k=21: exceeds serve.max_k=20"),
        ("/recommend", {"events": [], "k": 0}, "body.k: "),
        ("/recommend", {"events": [], "K": 3}, "body.K: "),
        ("/recommend", {"events": ["a"] * 51}, "events: 51 item keys exceed serve.max_events=50"),
        ("/recommend", {"events": [], "exclude": ["a"] * 31}, "exclude: 31 item keys exceed serve.max_filter=30"),
        ("/recommend", {"events": [], "allow": ["a"] * 31}, "allow: 31 item keys exceed serve.max_filter=30"),
        ("/recommend", {"events": [7]}, "item keys have to be large_string"),
        ("/recommend", {"events": [True]}, "body.events.0"),
        ("/recommend", {"events": ["\ud800"]}, "body.events.0"),
        ("/events", {"user": "\ud800", "events": ["i001"]}, "body.user"),
        ("/events", {"user": "anna", "events": []}, "body.events: "),
        ("/events", {"events": ["i001"]}, "body.user: "),
    ],
)
def test_an_impossible_request_is_refused_with_its_reason(service: str, path: str, body: object, message: str) -> None:
    status, answer = call(service + path, body)
    assert status == 422
    assert answer["error"].startswith(message)


def sent(service: str, body: object, headers: dict[str, str]) -> tuple[int, str]:
    connection = http.client.HTTPConnection(urlsplit(service).netloc, timeout=30)
    try:
        connection.request("POST", "/recommend", body, headers)  # type: ignore[arg-type]
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_a_body_that_is_too_large_is_refused_whether_its_length_is_announced_or_not(service: str) -> None:
    for length in ({"content-length": "4001"}, {"content-length": "9" * 12}):
        status, text = sent(service, None, length)
        assert (status, "serve.max_body_bytes=4,000" in text) == (413, True)
    status, text = sent(service, iter([b" " * 1000] * 5), {})  # chunked
    assert (status, "serve.max_body_bytes=4,000" in text) == (413, True)
    padded = json.dumps({"events": HISTORY}).encode().ljust(4000)
    assert sent(service, padded, {"content-type": "application/json"})[0] == 200


@pytest.mark.parametrize("body", [b"{", b"[" * 3000, b"\xff", b'{"events": [1e999]}', b"null", b""])
def test_what_is_no_request_is_refused(service: str, body: bytes) -> None:
    status, text = sent(service, body, {"content-type": "application/json"})
    assert status in (400, 422)
    assert json.loads(text)["error"]


def test_json_from_a_page_of_somebody_else_is_refused(service: str) -> None:
    """A browser sends text/plain anywhere without asking; JSON needs leave, which nobody gives."""
    assert sent(service, json.dumps({"events": HISTORY}).encode(), {"content-type": "text/plain"})[0] == 422


@pytest.mark.parametrize("path", ["/recommend", "/events", "/items", "/version", "/metrics", "/openapi.json", "/nothing"])
def test_without_the_token_there_is_no_answer(guarded: str, path: str) -> None:
    body = {"user": "anna", "events": HISTORY} if path in ("/recommend", "/events") else None
    for token in ("", "another token", TOKEN + "x", TOKEN[:-1]):
        status, answer = call(guarded + path, body, token)
        assert status == 401
        assert "Bearer" in answer["error"]
        assert TOKEN not in answer["error"]


def test_with_the_token_there_is_and_some_paths_need_none(guarded: str) -> None:
    assert call(f"{guarded}/recommend", {"events": HISTORY}, TOKEN)[0] == 200
    assert [call(f"{guarded}/{path}")[0] for path in ("healthz", "readyz")] == [200, 200]
    with urllib.request.urlopen(f"{guarded}/", timeout=30) as page:  # noqa: S310
        assert page.status == 200
        assert "default-src 'none'" in page.headers["content-security-policy"]
    description = call(f"{guarded}/openapi.json", token=TOKEN)[1]
    assert description["components"]["securitySchemes"] == {"HTTPBearer": {"type": "http", "scheme": "bearer"}}


def test_the_description_names_every_path_and_describes_every_field(service: str) -> None:
    description = call(f"{service}/openapi.json")[1]
    assert set(description["paths"]) == {"/recommend", "/events", "/items", "/healthz", "/readyz", "/version", "/metrics"}
    assert all(operation.get("description") for path in description["paths"].values() for operation in path.values())
    schemas = description["components"]["schemas"]
    assert {"RecommendRequest", "RecommendAnswer", "EventsRequest", "EventsAnswer", "StateView", "Problem"} <= set(schemas)
    assert "oldest first" in schemas["RecommendRequest"]["properties"]["events"]["description"]
    assert description["paths"]["/recommend"]["post"]["responses"]["413"]


def test_items_are_found_by_key_and_title_those_that_begin_so_first(service: str) -> None:
    def found(text: str, limit: int = 20) -> list[tuple[str, str | None]]:
        items = call(f"{service}/items?search={text}&limit={limit}")[1]["items"]
        return [(item["item_key"], item["title"]) for item in items]

    assert found("I04", 3) == [("i040", None), ("i041", "Beta"), ("i042", None)]
    assert found("cent") == [("i002", "Alpha Centauri")]
    assert found("b") == [("i041", "Beta")]
    assert [key for key, _ in found("10")] == ["i010"]
    assert [key for key, _ in found("", 2)] == ["i001", "i002"]
    assert found("nowhere") == []


def test_figures_count_what_happened(registry: tuple[str, list[str]]) -> None:
    with in_thread(registry[0]) as url:
        call(f"{url}/events", {"user": "anna", "events": ["i001", "never seen"]})
        call(f"{url}/recommend", {"user": "anna", "k": 0})
        call(f"{url}/recommend", {"user": "anna", "k": 3})
        call(f"{url}/never/{'x' * 50}")
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:  # noqa: S310
            lines = answer.read().decode().splitlines()
            assert answer.headers["content-type"].startswith("text/plain")
    for line in (
        'lrurec_requests_total{path="/recommend",status="200"} 1.0',
        'lrurec_requests_total{path="/recommend",status="422"} 1.0',
        'lrurec_requests_total{path="other",status="404"} 1.0',
        'lrurec_request_seconds_bucket{le="+Inf",path="/recommend"} 2.0',
        "lrurec_unknown_items_total 1.0",
        "lrurec_batched_requests_total 2.0",
        "lrurec_states_new_total 1.0",
        "lrurec_states_held 1.0",
        "lrurec_swaps_total 0.0",
        f'lrurec_bundle{{version="{registry[1][0]}"}} 1.0',
    ):
        assert line in lines
