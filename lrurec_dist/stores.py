"""The filesystem behind a URL, and what happens when it fails: try again, or say what is wrong.

Credentials and endpoints come from the environment alone; a URL that holds a secret is refused,
since URLs are written to configurations, logs and manifests.
"""

import errno
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from fsspec.core import url_to_fs

from lrurec_dist.errors import ConfigError, TryAgainError

T = TypeVar("T")

# Stores without directories and renames, whose uploads appear when complete; and the extra that has the driver.
OBJECT_STORES = {
    "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure",
}  # fmt: skip
ATTEMPTS = 5
FIRST_WAIT_S = 0.5  # doubled after each attempt, ± half

_SECRET = re.compile(
    r"://[^/@]*:[^/@]*@"  # user:password@
    r"|^(s3a?|gcs|gs)://(?!arn:)[^/]*[:@]"  # no bucket's name has one of these
    r"|[?&;](aws_?|x-amz-|x-goog-)?(access_?key|account_?key|secret|(session_?|security-)?token|password|credential|sig)\w*=",
    re.IGNORECASE,
)
_PASSING = {
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.EIO,
    errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH, errno.EPIPE, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip
# Drivers raise some of these outside OSError; by name, since a driver that is not installed has no classes.
_PASSING_CLASSES = {
    "ClientConnectionError", "ClientPayloadError", "ConnectionError", "HTTPClientError", "IncompleteRead", "IncompleteReadError",
    "ResponseParserError",
    "OperationalError", "ServerError", "ServiceUnavailableError", "TooManyRequestsError",  # of Iceberg catalogues
}  # fmt: skip
_PASSING_STATUS = {408, 409, 425, 429}  # and all from 500 on
_jitter = random.SystemRandom()  # leaves the seeded generators alone


def refuse_secrets(url: str) -> None:
    """Raise a ConfigError, without the secret, if the URL holds one."""
    if "://" in url and _SECRET.search(url):
        raise ConfigError(
            f"{url.partition('://')[0]}://…: a URL holds no credentials, since it is written to logs and files; give them in the "
            "environment, e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )


def scheme_of(url: str) -> str:
    """`s3` of `s3://…`; `file` for a path."""
    return url.partition("://")[0].lower() if "://" in url else "file"


def is_object_store(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether files there are uploaded and cannot be renamed."""
    protocols = [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol
    return any(protocol in OBJECT_STORES for protocol in protocols)


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem of `url` and the path within it; listings are never cached.

    Raises:
        ConfigError: the URL holds credentials, its scheme is unknown, or its driver is missing.
    """
    refuse_secrets(url)
    scheme = scheme_of(url)
    options: dict[str, Any] = {} if scheme == "file" else {"use_listings_cache": False}
    if OBJECT_STORES.get(scheme) == "s3":
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1}}  # s3fs repeats requests and `retried` operations
    try:
        return url_to_fs(url, **options)
    except ImportError as reason:
        extra = OBJECT_STORES.get(scheme)
        way_out = f"pip install 'lrurec_dist[{extra}]'" if extra else "install the driver that the reason names"
        raise ConfigError(f"{url}: no driver for {scheme}:// is installed ({reason}); {way_out}") from None
    except ValueError as reason:
        raise ConfigError(f"{url}: {reason}") from None
    except OSError as reason:
        if scheme != "hdfs":
            raise
        raise ConfigError(
            f"{url}: Hadoop's libraries do not load ({_describe(reason)}); set JAVA_HOME, HADOOP_HOME and CLASSPATH=$(hadoop classpath --glob)"
        ) from None


def retried(doing: str, url: str, operation: Callable[[], T]) -> T:
    """What `operation` returns, after a few attempts if it fails for reasons that pass.

    The operation may be carried out more than once, and after a lost answer though it succeeded.

    Args:
        doing: `read`, `write`, `list` or `remove`, for messages.
        url: what is read or written, for messages.
        operation: is called until it returns or fails for a reason that stays.

    Raises:
        TryAgainError: every attempt failed for a reason that passes.
        ConfigError: the store refuses: no permission, no or wrong credentials, nothing to write into.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return operation()
        except Exception as error:
            reason = _describe(error)
            if isinstance(error, FileNotFoundError) and doing == "write":
                raise ConfigError(f"{url}: cannot be written, the bucket or directory is not there ({reason})") from error
            if isinstance(error, PermissionError) or _is_misconfigured(error):
                raise ConfigError(
                    f"{url}: refuses to {doing} ({reason}); check its rights, and credentials and endpoint in the environment"
                ) from error
            if not is_passing(error):
                raise
            if attempt == ATTEMPTS:
                raise TryAgainError(
                    f"{url}: could not {doing} in {ATTEMPTS} attempts, at last: {reason}; try again later"
                ) from error
        time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1) * _jitter.uniform(0.5, 1.5))
    raise AssertionError("the last attempt returns or raises")


def is_passing(error: BaseException) -> bool:
    """Whether the same operation may succeed later: lost connections, timeouts, throttling, faults of the server."""
    if (status := _http_status(error)) is not None:
        return status >= 500 or status in _PASSING_STATUS or _http_code(error) in {"RequestTimeout", "SlowDown", "Throttling"}
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return (isinstance(error, OSError) and error.errno in _PASSING) or _has_class(error, _PASSING_CLASSES)


def is_unmet_condition(error: BaseException) -> bool:
    """Whether a conditional request found that its condition does not hold."""
    return _http_code(error) in {"PreconditionFailed", "412"} or _http_status(error) == 412


def _is_misconfigured(error: BaseException) -> bool:
    """botocore's own errors but the network's (no credentials, no such profile, no valid endpoint), and a catalogue's refusals."""
    return _has_class(error, {"BotoCoreError", "ForbiddenError", "OAuthError", "UnauthorizedError"}) and not _has_class(
        error, _PASSING_CLASSES
    )


def _has_class(error: BaseException, names: set[str]) -> bool:
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _response(error: BaseException) -> dict[str, Any]:
    """The server's answer that s3fs translated into an OSError; empty if there was none."""
    return getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}


def _http_status(error: BaseException) -> int | None:
    return _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")


def _http_code(error: BaseException) -> str | None:
    return _response(error).get("Error", {}).get("Code")


def _describe(error: BaseException) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def version_of(info: dict[str, Any]) -> str:
    """Text that changes with a file's content: its size with its e-tag or modification time."""
    changed = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if key in info), "")
    return f"{int(info['size'])} bytes, {changed}"
