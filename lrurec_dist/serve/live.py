"""A recommender that is replaced by the next version while requests run."""

import threading

from lrurec_dist.serve.recommender import RECENT_ITEMS, Recommender


class LiveRecommender:
    """The version that serves now.

    A request takes `current` once and works with that from beginning to end; what it took goes on to answer after a swap,
    and is freed with the last request that holds it.
    """

    def __init__(self, url: str, *, recent_items: int = RECENT_ITEMS) -> None:
        self._recent_items = recent_items
        self._swapping = threading.Lock()
        self._current = Recommender.load(url, recent_items=recent_items)

    @property
    def current(self) -> Recommender:
        """The recommender of the version that serves now."""
        return self._current

    def swap(self, url: str) -> str:
        """Serve from another bundle once it is loaded, verified and checked, and return its version.

        Requests go on meanwhile, from the version before; swaps come one after the other. States of the version before are
        refused from then on (`StateVersionError`): their users' histories make new ones.

        Raises:
            LrurecError: as `Recommender.load`; the version before goes on serving.
        """
        with self._swapping:
            self._current = Recommender.load(url, recent_items=self._recent_items)
            return self._current.version
