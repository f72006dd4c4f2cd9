"""Sessions in Redis, which several processes of the service share."""

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import redis

from lrurec_dist.errors import ConfigError, TryAgainError
from lrurec_dist.serve.sessions import Change

PREFIX = "lrurec:session:"
_TIMEOUT_S = 2.0
# One write that nobody comes between. A session is never empty, so an empty text stands for none. The client sends a write
# again if its answer does not come: then the session is there already.
_REPLACE = """
local now = redis.call('GET', KEYS[1]) or ''
if now == ARGV[2] then return 1 end
if now ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
return 1
"""

T = TypeVar("T")


class RedisStore:
    """Sessions under `PREFIX` and the user, until nothing was written for `expire_s` seconds.

    Args:
        url: `redis://…`, `rediss://…` or `unix://…`; may hold a password, and is never part of a message.
        expire_s: whole seconds.
        timeout_s: that an answer may take; it is asked for some times more.

    Raises:
        ConfigError: the URL is none of Redis.
    """

    shared = True

    def __init__(self, url: str, *, expire_s: int, timeout_s: float = _TIMEOUT_S) -> None:
        try:
            self._redis = redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
        except ValueError:
            raise ConfigError("the URL of Redis has to begin with redis://, rediss:// or unix://") from None
        self._expire_s = expire_s
        self._replace = self._redis.register_script(_REPLACE)

    def get_many(self, users: Sequence[str]) -> list[bytes | None]:
        """As `SessionStore`."""
        found = _answered(lambda: self._redis.mget([PREFIX + user for user in users])) if users else []
        return cast(list[bytes | None], found)  # texts come only from a client that is told to decode

    def replace_many(self, changes: Sequence[Change]) -> list[bool]:
        """As `SessionStore`."""

        def replace() -> list[bool]:
            pipeline = self._redis.pipeline(transaction=False)
            for user, before, after in changes:
                self._replace([PREFIX + user], [before or b"", after, self._expire_s], client=pipeline)
            return [bool(made) for made in pipeline.execute()]

        return _answered(replace) if changes else []

    def count(self) -> int:
        """Keys of the whole database, which therefore should hold nothing else."""
        return int(_answered(self._redis.dbsize))


def _answered(call: Callable[[], T]) -> T:
    try:
        return call()
    except redis.RedisError as error:  # its text may name hosts and users
        raise TryAgainError(f"session store: Redis does not answer ({type(error).__name__}); try again") from None
