"""Recommendations from a bundle, from histories or from states; needs torch, safetensors and pyarrow, nothing of training."""

import threading
from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from typing import NamedTuple

import torch
from torch import Tensor

from lrurec_dist import PAD_ID
from lrurec_dist.errors import BundleError, LrurecError, StateError
from lrurec_dist.evaluate.ranking import top_k
from lrurec_dist.model.shortlist import Shortlist
from lrurec_dist.model.stepping import Stepper
from lrurec_dist.serve.bundle import GOLDEN_TOLERANCE as SCORE_TOLERANCE
from lrurec_dist.serve.bundle import Bundle, load_bundle
from lrurec_dist.serve.encoding import extend_states, initial_states
from lrurec_dist.serve.item_keys import ItemKeys, Key
from lrurec_dist.serve.user_state import UserState

RECENT_ITEMS = 500  # as many bytes, four each, as two blocks of 128 hidden units


class Recommendation(NamedTuple):
    """An item and its score."""

    item_key: Key
    score: float


class Recommender:
    """Answers from one bundle, to any number of threads at once.

    There are two ways to ask. A history is encoded as evaluation does it: its last `max_length` items, from an empty state
    (`recommend`, `recommend_many`). A state is carried on for ever, one cheap `step` an event (`recommend_from_states`); how
    far the two may be apart is in the bundle's model card.

    Args:
        bundle: loaded and verified.
        recent_items: ids of how many last items a state keeps, to leave them out of the candidates.

    Item keys that the catalogue does not know are skipped; those in histories and events are counted in `unknown_items`.
    Ties are broken by item_id.
    """

    def __init__(self, bundle: Bundle, *, recent_items: int = RECENT_ITEMS) -> None:
        if recent_items < 0:
            raise LrurecError(f"recent_items={recent_items}: cannot be negative; 0 keeps none")
        self._bundle, self._recent_items = bundle, recent_items
        self._item_rows, self._bias = bundle.model.item_rows(), bundle.candidate_bias
        self._stepper = Stepper(bundle.model)
        self._shortlist: Shortlist | None = None
        self._keys = ItemKeys(bundle.item_keys, bundle.item_titles)
        states, vectors = initial_states(bundle.model, 1)
        self._initial = UserState(bundle.version, states[0], vectors[0], (), 0)
        self._counting = threading.Lock()
        self._unknown_items = 0
        self.version = bundle.version
        self.num_items = len(bundle.item_keys)
        self.max_length = bundle.max_length

    @classmethod
    def load(cls, url: str, *, recent_items: int = RECENT_ITEMS) -> "Recommender":
        """Load, verify and check a bundle: every file, and every golden request.

        Raises:
            BundleError: a file is missing or changed, or the loaded model does not give the
                answers that the trained one gave.
        """
        recommender = cls(load_bundle(url), recent_items=recent_items)
        recommender.check_golden()
        if Shortlist.usable(recommender._item_rows):
            recommender._shortlist = Shortlist(recommender._item_rows, recommender._bias)
        return recommender

    @property
    def unknown_items(self) -> int:
        """Items of histories and events skipped so far because the catalogue does not know them."""
        return self._unknown_items

    @property
    def item_keys(self) -> ItemKeys:
        """The catalogue of this version; what is looked up there is not counted."""
        return self._keys

    def recommend(
        self, history: Sequence[Key], k: int = 10, *, exclude: Iterable[Key] = (), allow: Iterable[Key] | None = None
    ) -> list[Recommendation]:
        """The k best items after a history, best first; fewer where candidates run out.

        Args:
            history: item keys, oldest first; may be empty. Left out of the candidates if the model was evaluated that way.
            k: how many, up to the size of the catalogue.
            exclude: more item keys to leave out.
            allow: only these are candidates; None: all.

        Raises:
            LrurecError: k is outside of 1..num_items, or a key is not of the catalogue's type.
        """
        return self.recommend_many([history], k, exclude=[exclude], allow=allow)[0]

    def recommend_many(
        self,
        histories: Sequence[Sequence[Key]],
        k: int = 10,
        *,
        exclude: Sequence[Iterable[Key]] | None = None,
        allow: Iterable[Key] | None = None,
    ) -> list[list[Recommendation]]:
        """`recommend` for many users at once: `exclude` names items for each of them, `allow` for all."""
        return self._named(*self.top_ids(histories, k, exclude=exclude, allow=allow))

    def recommend_from_states(
        self,
        states: Sequence[UserState],
        k: int = 10,
        *,
        exclude: Sequence[Iterable[Key]] | None = None,
        allow: Iterable[Key] | None = None,
    ) -> list[list[Recommendation]]:
        """`recommend_many` for users of whom there is a state; nothing is encoded.

        A state's own `recent` items are left out of the candidates if the model was evaluated that way. Older ones are not in
        it: name them in `exclude`.

        Raises:
            StateError: a state is of other shapes than the bundle's, or StateVersionError: another bundle made it.
            LrurecError: as `recommend`.
        """
        self._check(states)
        vectors = torch.stack([state.vector for state in states]) if states else self._initial.vector.new_empty(0, self._dim)
        return self._named(*self._rank(vectors, k, [state.recent for state in states], exclude, allow))

    @torch.inference_mode()
    def top_ids(
        self,
        histories: Sequence[Sequence[Key]],
        k: int,
        *,
        exclude: Sequence[Iterable[Key]] | None = None,
        allow: Iterable[Key] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`recommend_many` as (histories, k) int64 item ids and float32 scores; `PAD_ID` and -inf where candidates run out."""
        known = [self._known_ids(history) for history in histories]
        length = max(1, min(self._bundle.max_length, max(map(len, known), default=0)))
        item_ids = torch.full((len(known), length), PAD_ID)
        for row, history in enumerate(known):
            recent = history[-length:]
            item_ids[row, length - len(recent) :] = torch.tensor(recent, dtype=torch.int64)
        return self._rank(self._bundle.model.encode(item_ids), k, known, exclude, allow)

    def init_state(self) -> UserState:
        """The state of a user without history."""
        return self._initial

    def step(self, state: UserState, item_key: Key) -> UserState:
        """The state after one more event, at the same cost whatever came before; the same one if the item is unknown.

        Raises:
            StateError: as `recommend_from_states`.
            LrurecError: the key is not of the catalogue's type.
        """
        self._check([state])
        if not (known := self._known_ids([item_key])):
            return state
        vectors, recurrent = self._stepper.step(torch.tensor(known), state.recurrent[None])
        return UserState(self.version, recurrent[0], vectors[0], self._recent(state.recent, known), state.events + 1)

    def extend(self, state: UserState, item_keys: Sequence[Key]) -> UserState:
        """The state after more events, oldest first: that of as many steps, within float32 rounding; raises as `step`."""
        return self.extend_many([state], [item_keys])[0]

    def extend_many(self, states: Sequence[UserState], item_keys: Sequence[Sequence[Key]]) -> list[UserState]:
        """`extend` for many users at once: item_keys[i] are events of the user of states[i]."""
        self._check(states)
        known = [self._known_ids(keys) for _, keys in zip(states, item_keys, strict=True)]
        if not states:
            return []
        before = torch.stack([state.recurrent for state in states]), torch.stack([state.vector for state in states])
        ids = [torch.tensor(each, dtype=torch.int64) for each in known]
        recurrent, vectors = extend_states(self._bundle.model, *before, ids)
        return [
            UserState(self.version, rows.clone(), vector.clone(), self._recent(state.recent, new), state.events + len(new))
            if new
            else state
            for state, rows, vector, new in zip(states, recurrent, vectors, known, strict=True)
        ]

    def encode(self, histories: Sequence[Sequence[Key]]) -> list[UserState]:
        """States of users with these histories, oldest first and as long as they are; memory does not grow with them."""
        return self.extend_many([self._initial] * len(histories), histories)

    def _check(self, states: Sequence[UserState]) -> None:
        """Whoever writes to a store of states can write a version beside numbers of another shape, which a kernel would trust."""
        for state in states:
            state.check_version(self.version)
            if state.recurrent.shape != self._initial.recurrent.shape or state.vector.shape != self._initial.vector.shape:
                raise StateError(
                    f"user state: shapes {tuple(state.recurrent.shape)} and {tuple(state.vector.shape)}, version {self.version} has "
                    f"{tuple(self._initial.recurrent.shape)} and {tuple(self._initial.vector.shape)}; "
                    "make a new one from the user's history"
                )

    @property
    def _dim(self) -> int:
        return self._item_rows.shape[1]

    def _recent(self, before: Sequence[int], new: Sequence[int]) -> tuple[int, ...]:
        return (*before, *new)[-self._recent_items :] if self._recent_items else ()

    def _known_ids(self, keys: Sequence[Key]) -> list[int]:
        known = self._keys.find(keys)
        if len(known) < len(keys):
            with self._counting:
                self._unknown_items += len(keys) - len(known)
        return known

    @torch.inference_mode()
    def _rank(
        self,
        vectors: Tensor,
        k: int,
        seen: Sequence[Sequence[int]],
        exclude: Sequence[Iterable[Key]] | None,
        allow: Iterable[Key] | None,
    ) -> tuple[Tensor, Tensor]:
        """Ids and scores (users, k) of the best candidates of each user."""
        if not 1 <= k <= self.num_items:
            raise LrurecError(f"k={k}: has to be in 1..{self.num_items}, the size of the catalogue")
        more = repeat((), len(seen)) if exclude is None else (self._keys.find(keys) for keys in exclude)
        dropped = [[*(items if self._bundle.exclude_history else ()), *extra] for items, extra in zip(seen, more, strict=True)]
        if allow is None and self._shortlist and (found := self._shortlist.top_k(vectors, k, dropped)):
            return found
        rows = torch.arange(len(dropped)).repeat_interleave(torch.tensor([len(ids) for ids in dropped], dtype=torch.int64))
        ids = torch.tensor([*chain.from_iterable(dropped)], dtype=torch.int64)
        if allow is None:
            return top_k(vectors, self._item_rows, self._bias, k, rows, ids)
        # A catalogue of these alone, in the order of their ids, so that ties fall as in the whole one.
        allowed = torch.tensor([PAD_ID, *sorted(set(self._keys.find(allow)))])
        place = torch.searchsorted(allowed, ids).clamp(max=len(allowed) - 1)
        among = allowed[place] == ids
        best, scores = top_k(vectors, self._item_rows[allowed], self._bias[allowed], k, rows[among], place[among])
        return allowed[best], scores

    def _named(self, ids: Tensor, scores: Tensor) -> list[list[Recommendation]]:
        return [
            [
                Recommendation(self._keys.key_of(item_id), score)
                for item_id, score in zip(row_ids, row_scores, strict=True)
                if item_id != PAD_ID
            ]
            for row_ids, row_scores in zip(ids.tolist(), scores.tolist(), strict=True)
        ]

    def check_golden(self) -> float:
        """Replay the golden requests and return the largest difference in score.

        Raises:
            BundleError: a score differs by more than `SCORE_TOLERANCE`, relative to the larger of
                it and one, or another item stands in a place that no such difference explains.
        """
        depth = min(self._bundle.golden.item_ids.shape[1], self.num_items)  # there is nothing beyond
        golden = self._bundle.golden
        expected_ids, expected = golden.item_ids[:, :depth], golden.scores[:, :depth]
        ids, scores = self.top_ids(golden.histories, depth)
        present = expected_ids != PAD_ID
        if not torch.equal(present, ids != PAD_ID):
            raise BundleError(f"bundle {self.version}: a golden request gets another number of items")
        allowed = SCORE_TOLERANCE * expected.abs().clamp_min(1)
        difference = torch.where(present, (scores - expected).abs(), 0)
        if not (difference <= allowed)[present].all():
            raise BundleError(
                f"bundle {self.version}: a golden request differs by {float(difference.max()):.2g} in a score, "
                f"allowed {SCORE_TOLERANCE:g} relative; the export is wrong"
            )
        # Items may change places only where their scores are as good as equal; the last place may
        # tie with an item beyond the list.
        gap = torch.where(present[:, 1:], (expected[:, :-1] - expected[:, 1:]).abs(), torch.inf)
        end = torch.zeros(len(ids), 1)
        tied = torch.minimum(torch.cat([gap, end], 1), torch.cat([torch.full_like(end, torch.inf), gap], 1)) <= 2 * allowed
        if not (tied | ~present)[ids != expected_ids].all():
            raise BundleError(f"bundle {self.version}: a golden request gets other items at the same scores; the export is wrong")
        return float(difference.max())
