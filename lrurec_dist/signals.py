"""SIGTERM, answered in the process's main thread."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def interrupt() -> None:
    """Break off what the main thread does, as Ctrl-C would; Ray's waiting calls let no other exception through."""
    raise KeyboardInterrupt


@contextmanager
def on_sigterm(answer: Callable[[], None]) -> Iterator[None]:
    """Call `answer` in the main thread at each SIGTERM while the context is open; elsewhere than there, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: answer())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
