"""What the service makes of requests: sessions that advance, survive a swap and are shared; lists as the recommender's."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from lrurec_dist.errors import RequestError, TryAgainError
from lrurec_dist.serve.live import LiveRecommender
from lrurec_dist.serve.recommender import Recommender
from lrurec_dist.serve.registry import version_url
from lrurec_dist.serve.service import Answer, Ask, Service
from lrurec_dist.serve.sessions import Change, MemoryStore, Session, SessionStore
from tests.services import redis_server, write_versions

HISTORY = ["i001", "i007", "i002"]


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """URLs of three bundles."""
    registry, names = write_versions(tmp_path_factory.mktemp("service"), 3)
    return [version_url(registry, name) for name in names]


@pytest.fixture(params=["in this process", "in Redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SessionStore]:
    if request.param == "in this process":
        yield MemoryStore(1000)
        return
    with redis_server(tmp_path) as url:
        from lrurec_dist.serve.redis_store import RedisStore

        yield RedisStore(url, expire_s=60, timeout_s=30)


def one(service: Service, **ask: object) -> Answer:
    (answer,) = service.answer([Ask(**ask)])  # type: ignore[arg-type]
    assert isinstance(answer, Answer), answer
    return answer


def test_a_session_advances_with_its_events_and_is_ranked_from_its_state(versions: list[str], store: SessionStore) -> None:
    service, recommender = Service(LiveRecommender(versions[0]), store, keep_events=10), Recommender.load(versions[0])
    assert one(service, user="u", k=5).origin == "new"
    assert store.count() == 0, "who only asks gets no session"
    first = one(service, user="u", events=HISTORY[:2], keep=True)
    assert (first.origin, first.items, first.unknown_items) == ("new", [], 0)
    second = one(service, user="u", events=["never seen", HISTORY[2]], keep=True, k=5)
    assert (second.origin, second.unknown_items) == ("stored", 1)
    (expected,) = recommender.encode([HISTORY])
    assert second.state is not None
    torch.testing.assert_close(second.state.recurrent, expected.recurrent, rtol=1e-5, atol=1e-6)
    assert second.state.events == 3
    assert [item.item_key for item in second.items] == [
        item.item_key for item in recommender.recommend_from_states([expected], 5)[0]
    ]
    assert store.count() == 1


def test_events_beside_a_user_are_not_kept_unless_wanted(versions: list[str]) -> None:
    service = Service(LiveRecommender(versions[0]), MemoryStore(10), keep_events=10)
    one(service, user="u", events=HISTORY[:2], keep=True)
    passing, kept = one(service, user="u", events=HISTORY[2:], k=5), one(service, user="u", k=5)
    assert passing.state is not None
    assert kept.state is not None
    assert (passing.state.events, kept.state.events) == (3, 2)
    assert passing.items == one(service, user="v", events=HISTORY, keep=True, k=5).items
    assert passing.items != kept.items


def test_requests_of_all_kinds_together_get_what_each_gets_alone(versions: list[str]) -> None:
    asks = [
        Ask(events=HISTORY, k=5),
        Ask(user="u", k=3),
        Ask(events=["i001"], k=2, exclude=["i003", "i004"]),
        Ask(user="v", k=4, allow=("i010", "i011")),
        Ask(events=[5], k=3),
        Ask(events=HISTORY, k=61),
        Ask(user="w", events=HISTORY, k=7, exclude=["i020"]),
        Ask(events=[], k=4, allow=("i011", "i010")),
    ]

    def service() -> Service:
        found = Service(LiveRecommender(versions[0]), MemoryStore(10), keep_events=10)
        one(found, user="u", events=HISTORY, keep=True)
        return found

    together = service().answer(asks)
    for ask, answer in zip(asks, together, strict=True):
        (alone,) = service().answer([ask])
        if isinstance(alone, RequestError):
            assert str(answer) == str(alone)
            continue
        assert isinstance(answer, Answer)
        assert isinstance(alone, Answer)
        assert [item.item_key for item in answer.items] == [item.item_key for item in alone.items]
        assert len(answer.items) == min(ask.k, 2 if ask.allow else 60)
    assert [isinstance(answer, RequestError) for answer in together] == [False] * 4 + [True] * 2 + [False] * 2


def test_events_of_one_user_in_several_requests_count_once_each_in_their_order(versions: list[str]) -> None:
    service = Service(LiveRecommender(versions[0]), MemoryStore(10), keep_events=10)
    answers = service.answer([Ask(user="u", events=[key], keep=True) for key in HISTORY])
    (expected,) = Recommender.load(versions[0]).encode([HISTORY])
    for answer in answers:
        assert isinstance(answer, Answer)
        assert answer.state is not None
        torch.testing.assert_close(answer.state.recurrent, expected.recurrent, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("keep_events", "origin", "left"), [(10, "rebuilt", 4), (2, "rebuilt", 3), (0, "reset", 1)])
def test_after_a_swap_a_state_is_made_anew_of_the_events_kept_with_it(
    versions: list[str], store: SessionStore, keep_events: int, origin: str, left: int
) -> None:
    live = LiveRecommender(versions[0])
    service = Service(live, store, keep_events=keep_events)
    one(service, user="u", events=HISTORY, keep=True)
    live.swap(versions[1])
    answer = one(service, user="u", events=["i009"], keep=True, k=5)
    assert (answer.origin, answer.version) == (origin, live.current.version)
    (expected,) = Recommender.load(versions[1]).encode([[*HISTORY, "i009"][-left:]])
    assert answer.state is not None
    torch.testing.assert_close(answer.state.recurrent, expected.recurrent, rtol=1e-5, atol=1e-6)
    again = one(service, user="u", k=5)
    assert (again.origin, again.items) == ("stored", answer.items), "it was stored as the new version's"
    assert service.origins[origin] == 1  # type: ignore[index]


def test_a_damaged_session_is_begun_anew(versions: list[str], store: SessionStore) -> None:
    service = Service(LiveRecommender(versions[0]), store, keep_events=10)
    one(service, user="u", events=HISTORY, keep=True)
    (data,) = store.get_many(["u"])
    assert data is not None
    for damage in (b"x", data[:-5], data[:50] + bytes([data[50] ^ 1]) + data[51:]):
        (before,) = store.get_many(["u"])
        assert store.replace_many([Change("u", before, damage)]) == [True]
        answer = one(service, user="u", events=["i009"], keep=True)
        assert answer.state is not None
        assert (answer.origin, answer.state.events) == ("reset", 1)


def test_no_event_is_lost_when_two_processes_write_one_session(versions: list[str], store: SessionStore) -> None:
    services = [Service(LiveRecommender(versions[0]), store, keep_events=100) for _ in range(2)]

    def send(service: Service) -> None:
        for _ in range(25):
            while isinstance(service.answer([Ask(user="u", events=["i001"], keep=True)])[0], TryAgainError):
                pass  # the other one was faster all the time

    threads = [threading.Thread(target=send, args=(service,)) for service in services]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answer = one(services[0], user="u", k=1)
    assert answer.state is not None
    assert answer.state.events == 50


def test_the_least_recently_used_session_goes_first(versions: list[str]) -> None:
    service = Service(LiveRecommender(versions[0]), MemoryStore(2), keep_events=10)
    for user in ("a", "b"):
        one(service, user=user, events=HISTORY, keep=True)
    one(service, user="a", k=1)
    one(service, user="c", events=HISTORY, keep=True)
    assert [one(service, user=user, k=1).origin for user in ("a", "b", "c")] == ["stored", "new", "stored"]
    assert service.store.count() == 2


def test_stored_states_start_users_who_have_no_session_and_survive_a_swap(versions: list[str], store: SessionStore) -> None:
    live, recommender = LiveRecommender(versions[0]), Recommender.load(versions[0])
    service = Service(live, store, keep_events=10)
    one(service, user="u1", events=["i030"], keep=True)
    states = zip(["u0", "u1", "u2", 3], recommender.encode([HISTORY] * 4), strict=True)
    assert service.store_states(states, 1 << 62) == 3
    found = {user: one(service, user=user, k=1).state for user in ("u0", "u1", "3")}
    assert {user: state and state.events for user, state in found.items()} == {"u0": 3, "u1": 1, "3": 3}
    live.swap(versions[1])
    assert one(service, user="u2", k=4).items == [
        *Recommender.load(versions[1]).recommend_from_states(live.current.encode([HISTORY]), 4)[0]
    ]


def test_no_more_states_are_stored_than_there_is_room_for(versions: list[str]) -> None:
    service = Service(LiveRecommender(versions[0]), MemoryStore(1000), keep_events=10)
    state = service.live.current.init_state()
    assert service.store_states(((f"u{user}", state) for user in range(700)), 600) == 600


def test_a_write_whose_answer_was_lost_counts_once(versions: list[str], store: SessionStore) -> None:
    state = Recommender.load(versions[0]).init_state()
    change = Change("u", None, Session(state, ()).to_bytes())
    assert store.replace_many([change]) == [True]
    if store.shared:  # as a client repeats it
        assert store.replace_many([change]) == [True]
    other = Change("u", None, Session(state, ()).to_bytes())
    assert store.replace_many([other]) == [False], "the same session, written by somebody else"


class ContendedStore(MemoryStore):
    """A store in which somebody else is faster so many times."""

    losses = 0

    def replace_many(self, changes: Sequence[Change]) -> list[bool]:
        self.losses -= 1
        return [False] * len(changes) if self.losses >= 0 else super().replace_many(changes)


@pytest.mark.parametrize(("losses", "kept"), [(7, 1), (8, 0)])
def test_a_request_is_refused_only_if_its_events_were_not_kept(versions: list[str], losses: int, kept: int) -> None:
    store = ContendedStore(10)
    service = Service(LiveRecommender(versions[0]), store, keep_events=10)
    store.losses = losses
    (answer,) = service.answer([Ask(user="u", events=["i001"], keep=True)])
    assert isinstance(answer, Answer if kept else TryAgainError)
    now = one(service, user="u", k=1).state
    assert now is not None
    assert now.events == kept


class GoneStore(MemoryStore):
    """A store that nobody reaches."""

    def get_many(self, users: Sequence[str]) -> list[bytes | None]:
        raise TryAgainError(f"{len(users)} users: gone")


def test_without_the_store_those_with_a_history_are_answered_and_the_others_told(versions: list[str]) -> None:
    service = Service(LiveRecommender(versions[0]), GoneStore(1), keep_events=10)
    found = service.answer([Ask(events=HISTORY, k=3), Ask(user="u", k=3), Ask(user="v", k=99)])
    assert [type(answer) for answer in found] == [Answer, TryAgainError, RequestError]


def test_a_session_is_the_same_after_bytes(versions: list[str]) -> None:
    (state,) = Recommender.load(versions[0]).encode([HISTORY])
    session = Session.from_bytes(Session(state, ("ключ", "i001")).to_bytes())
    assert session.history == ("ключ", "i001")
    assert session.state.to_bytes() == state.to_bytes()
