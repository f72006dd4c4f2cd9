"""The service goes where the registry's champion goes."""

import threading
import time

from lrurec_dist import storage
from lrurec_dist.errors import BundleError, DataNotReadyError, LrurecError
from lrurec_dist.reporting import say
from lrurec_dist.serve.channels import CHAMPION, Pointer, read_channel
from lrurec_dist.serve.live import LiveRecommender
from lrurec_dist.serve.registry import version_url

_LONGEST_PAUSE_S = 600.0  # between two tries of a champion that cannot be loaded


def champion_of(registry_url: str) -> Pointer:
    """Where the champion's channel points.

    Raises:
        DataNotReadyError: nowhere yet.
        LrurecError: as `read_channel`.
    """
    pointer = read_channel(registry_url, CHAMPION).pointer
    if pointer is None:
        raise DataNotReadyError(
            f"bundle.registry={registry_url}: has no champion; publish a version with jobs/publish.py, or name a bundle in serve.bundle"
        )
    return pointer


def bundle_of_champion(registry_url: str, pointer: Pointer) -> str:
    """URL of the version that a pointer means.

    Raises:
        BundleError: it is not there, or its manifest is not the one that passed the gate.
    """
    url = version_url(registry_url, pointer.version)
    try:
        found = storage.file_sha256(storage.join(url, storage.MANIFEST))
    except FileNotFoundError:
        raise BundleError(f"{url} is missing, and is champion; restore it, or roll back with jobs/registry.py") from None
    if found != pointer.manifest_sha256:
        raise BundleError(f"{url}: another manifest than the one that became champion; roll back with jobs/registry.py")
    return url


class ChampionFollower:
    """Looks at the champion's channel every so often and swaps when it moved; what cannot be loaded changes nothing.

    Args:
        live: what is swapped.
        registry_url: whose champion is followed.
        poll_s: seconds between two looks. A champion that cannot be loaded is tried again after as long, then after twice
            as long, and so on up to ten minutes.
    """

    def __init__(self, live: LiveRecommender, registry_url: str, *, poll_s: float) -> None:
        self._live, self._registry_url, self._poll_s = live, registry_url, poll_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="champion-follower", daemon=True)
        self._failed = ""  # id of the last move that could not be followed
        self._pause_s, self._retry_at = poll_s, 0.0
        self.swaps = 0
        self.failures = 0

    def start(self) -> None:
        """Follow from now on, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Follow no longer; a bundle that is being loaded is not waited for."""
        self._stopping.set()

    def look(self) -> None:
        """Follow the champion once; a failure is counted and said."""
        try:
            pointer = champion_of(self._registry_url)
        except LrurecError as error:
            self._fail(error)
            return
        if pointer.version == self._live.current.version:
            self._failed = ""
            return
        if pointer.id == self._failed and time.monotonic() < self._retry_at:
            return
        try:
            version = self._live.swap(bundle_of_champion(self._registry_url, pointer))
        except (LrurecError, MemoryError) as error:
            self._fail(error)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S) if pointer.id == self._failed else self._poll_s
            self._failed, self._retry_at = pointer.id, time.monotonic() + self._pause_s
            return
        self.swaps += 1
        say(f"serve: version {version} serves now, generation {pointer.generation}")

    def _fail(self, error: Exception) -> None:
        self.failures += 1
        say(f"serve: version {self._live.current.version} goes on; {type(error).__name__}: {error}")

    def _follow(self) -> None:
        while not self._stopping.wait(self._poll_s):
            try:
                self.look()
            except Exception as error:  # whatever happens to the registry, the service goes on and looks again
                self._fail(error)
