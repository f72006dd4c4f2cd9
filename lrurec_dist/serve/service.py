"""What the service does with the requests of a moment, all together; knows nothing of HTTP."""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar

from lrurec_dist.errors import LrurecError, RequestError, StateError, TryAgainError
from lrurec_dist.serve.item_keys import ItemKeys, Key
from lrurec_dist.serve.live import LiveRecommender
from lrurec_dist.serve.recommender import Recommendation, Recommender
from lrurec_dist.serve.sessions import Change, Session, SessionStore
from lrurec_dist.serve.user_state import UserState

T = TypeVar("T")
Origin = Literal["stored", "new", "rebuilt", "reset"]
_TRIES = 8  # of a session that other processes write, too
_STORED_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request.

    Attributes:
        user: whose session it is about; None: `events` are the whole history.
        events: item keys, oldest first, on top of the session.
        keep: `events` become part of the session.
        k: items wanted; 0: no list.
        exclude, allow: as `Recommender.recommend`.
    """

    user: str | None = None
    events: Sequence[Key] = ()
    keep: bool = False
    k: int = 0
    exclude: Sequence[Key] = ()
    allow: tuple[Key, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one request gets.

    Attributes:
        version: of the bundle that made all of it.
        item_keys: of that version, with its titles.
        items: best first; empty where no list was wanted.
        unknown_items: of `events`, those that the catalogue does not know.
        state: of the user, after the events; None without a user.
        origin: of that state: `stored`; `new`, there was none; `rebuilt`, another version's, made anew of the item keys
            that were kept; `reset`, another version's, or damaged, with nothing to make it of.
    """

    version: str
    item_keys: ItemKeys
    items: list[Recommendation]
    unknown_items: int
    state: UserState | None = None
    origin: Origin | None = None


class Service:
    """Recommendations and states from the live version, for many requests at once.

    Args:
        live: the version that serves.
        store: of sessions.
        keep_events: item keys of so many last events are kept with a state.

    `answer` may be called from several threads.
    """

    def __init__(self, live: LiveRecommender, store: SessionStore, *, keep_events: int) -> None:
        self.live, self.store = live, store
        self._keep_events = keep_events
        self._counting = threading.Lock()
        self.unknown_items = 0
        self.origins: dict[Origin, int] = {"new": 0, "rebuilt": 0, "reset": 0}  # of sessions that were written

    def answer(self, asks: Sequence[Ask]) -> list[Answer | LrurecError]:
        """An answer to each request, or why there is none; one version answers them all.

        Events of one user in several requests are applied in their order, before any list is made.
        """
        recommender = self.live.current
        answers: list[Answer | LrurecError | None] = [None] * len(asks)
        unknown = [0] * len(asks)
        events: dict[str, list[Key]] = {}
        for place, ask in enumerate(asks):
            try:
                unknown[place] = _check(recommender, ask)
            except RequestError as error:
                answers[place] = error
                continue
            if ask.user is not None:
                events.setdefault(ask.user, []).extend(ask.events if ask.keep else ())
        try:
            sessions = self._advance(recommender, events)
        except TryAgainError as error:
            sessions = {}
            for place, ask in enumerate(asks):
                if ask.user is not None:
                    answers[place] = answers[place] or error
        with self._counting:
            self.unknown_items += sum(unknown)
        open_places = [place for place, answer in enumerate(answers) if answer is None]
        states = self._states(recommender, asks, open_places, sessions)
        lists = _lists(recommender, asks, open_places, states)
        for place in open_places:
            user = asks[place].user
            origin = None if user is None else sessions[user][1]
            answers[place] = Answer(
                version=recommender.version,
                item_keys=recommender.item_keys,
                items=lists.get(place, []),
                unknown_items=unknown[place],
                state=states.get(place),
                origin=origin,
            )
        return [answer for answer in answers if answer is not None]

    def store_states(self, states: Iterable[tuple[Key, UserState]], room: int) -> int:
        """Put states into the store for users who have no session there, at most `room`; how many were put."""
        stored, item_keys = 0, self.live.current.item_keys
        states = iter(states)
        while some := list(islice(states, min(_STORED_AT_ONCE, room - stored))):
            changes = []
            for user, state in some:
                history = tuple(item_keys.keys_of(self._last(state.recent)))
                changes.append(Change(str(user), None, Session(state, history).to_bytes()))
            stored += sum(self.store.replace_many(changes))
        return stored

    def _advance(self, recommender: Recommender, events: dict[str, list[Key]]) -> dict[str, tuple[UserState, Origin]]:
        """The state of each user after more events, stored where it changed."""
        done: dict[str, tuple[UserState, Origin]] = {}
        users, tries = list(events), 0
        while users:
            if tries == _TRIES:
                raise TryAgainError(f"{len(users)} sessions are written by other requests all the time; try again")
            tries += 1
            before = self.store.get_many(users)
            opened = [self._open(recommender, data) for data in before]
            # A state to be rebuilt is the first one after the events that were kept, then the new ones.
            added = [
                [*(history if origin == "rebuilt" else ()), *events[user]]
                for user, (_, history, origin) in zip(users, opened, strict=True)
            ]
            states = recommender.extend_many([state for state, _, _ in opened], added)
            changes = []
            for user, data, state, (_, history, origin) in zip(users, before, states, opened, strict=True):
                done[user] = state, origin
                if events[user] or origin in ("rebuilt", "reset"):
                    session = Session(state, tuple(self._last([*history, *events[user]])))
                    changes.append(Change(user, data, session.to_bytes()))
            made = self.store.replace_many(changes)
            self._count_origins(done[change.user][1] for change, won in zip(changes, made, strict=True) if won)
            users = [change.user for change, won in zip(changes, made, strict=True) if not won]
        return done

    def _open(self, recommender: Recommender, data: bytes | None) -> tuple[UserState, tuple[Key, ...], Origin]:
        """The state to go on from, the events kept with it, and what becomes of it."""
        if data is None:
            return recommender.init_state(), (), "new"
        try:
            session = Session.from_bytes(data)
        except StateError:
            return recommender.init_state(), (), "reset"
        if session.state.version == recommender.version:
            return session.state, session.history, "stored"
        try:
            recommender.item_keys.find(session.history)
        except LrurecError:  # keys of another type
            return recommender.init_state(), (), "reset"
        return recommender.init_state(), session.history, "rebuilt" if session.history else "reset"

    def _states(
        self, recommender: Recommender, asks: Sequence[Ask], places: list[int], sessions: dict[str, tuple[UserState, Origin]]
    ) -> dict[int, UserState]:
        """States by place in `asks`, events that are not to be kept on top of them."""
        states = {place: sessions[user][0] for place in places if (user := asks[place].user) is not None}
        passing = [place for place in states if asks[place].events and not asks[place].keep]
        after = recommender.extend_many([states[place] for place in passing], [asks[place].events for place in passing])
        return states | dict(zip(passing, after, strict=True))

    def _last(self, keys: Sequence[T]) -> Sequence[T]:
        return keys[-self._keep_events :] if self._keep_events else ()

    def _count_origins(self, origins: Iterable[Origin]) -> None:
        with self._counting:
            for origin in origins:
                if origin != "stored":
                    self.origins[origin] += 1


def _check(recommender: Recommender, ask: Ask) -> int:
    """How many events the catalogue does not know; raises RequestError for what cannot be answered."""
    if ask.k > recommender.num_items:
        raise RequestError(f"k={ask.k}: the catalogue has {recommender.num_items:,} items; ask for fewer")
    try:
        known = recommender.item_keys.find(ask.events)
        recommender.item_keys.find(ask.exclude)
        recommender.item_keys.find(ask.allow or ())
    except LrurecError as error:
        raise RequestError(str(error)) from None
    return len(ask.events) - len(known)


def _lists(
    recommender: Recommender, asks: Sequence[Ask], places: list[int], states: dict[int, UserState]
) -> dict[int, list[Recommendation]]:
    """Lists by place in `asks`: users with the same `allow` are ranked together, as deep as one of them wants."""
    groups: dict[tuple[bool, tuple[Key, ...] | None], list[int]] = {}
    for place in places:
        if asks[place].k:
            groups.setdefault((place in states, asks[place].allow), []).append(place)
    lists: dict[int, list[Recommendation]] = {}
    for (by_state, allow), members in groups.items():
        k, exclude = max(asks[place].k for place in members), [asks[place].exclude for place in members]
        if by_state:
            ranked = recommender.recommend_from_states([states[place] for place in members], k, exclude=exclude, allow=allow)
        else:
            ranked = recommender.recommend_many([asks[place].events for place in members], k, exclude=exclude, allow=allow)
        lists |= {place: items[: asks[place].k] for place, items in zip(members, ranked, strict=True)}
    return lists
