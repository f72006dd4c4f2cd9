"""What every request passes before it is looked at: token, size of the body, and the clock."""

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/healthz", "/readyz")  # the page holds no data, and asks for the token
_BODY_TIMEOUT_S = 30.0


def token_digest(token: str) -> bytes:
    """What the service keeps of a token: enough to know it again, not enough to tell it."""
    return hashlib.sha256(token.encode()).digest()


class Door:
    """An ASGI application in front of another one.

    Refuses with 401 who lacks the token, with 413 a body that is too large, before a byte of it is parsed, and with 408 one
    that does not arrive. Tokens are compared in constant time.

    Args:
        app: gets what passes.
        digest: `token_digest` of the token; None: none is asked for.
        max_body_bytes: of a request.
        seen: told of each request: path, status, seconds.
    """

    def __init__(
        self, app: Application, *, digest: bytes | None, max_body_bytes: int, seen: Callable[[str, int, float], None]
    ) -> None:
        self._app, self._digest, self._max_body_bytes, self._seen = app, digest, max_body_bytes, seen

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._let_in(scope, receive, noted)
        finally:
            self._seen(scope["path"], status, time.perf_counter() - started)

    async def _let_in(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._digest is not None and scope["path"] not in OPEN_PATHS and not self._knows(headers.get(b"authorization", b"")):
            challenge = (b"www-authenticate", b"Bearer")
            await _refuse(send, 401, "needs the header Authorization: Bearer <token>, with this service's token", challenge)
            return
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                body = await self._read(headers.get(b"content-length", b""), receive)
        except TimeoutError:
            await _refuse(send, 408, f"the body did not arrive within {_BODY_TIMEOUT_S:g} s")
            return
        if body is None:
            await _refuse(send, 413, f"the body exceeds serve.max_body_bytes={self._max_body_bytes:,}; send less at a time")
            return
        given = False

        async def replayed() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replayed, send)

    def _knows(self, authorization: bytes) -> bool:
        scheme, _, token = authorization.partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        return hmac.compare_digest(digest, self._digest or b"") and scheme.lower() == b"bearer"

    async def _read(self, announced: bytes, receive: Receive) -> bytes | None:
        """The body; None if it is too large."""
        if announced.isdigit() and int(announced[:20]) > self._max_body_bytes:
            return None
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                return None
            if not message.get("more_body", False):
                return body


async def _refuse(send: Send, status: int, reason: str, *headers: tuple[bytes, bytes]) -> None:
    body = json.dumps({"error": reason}).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": [*head, *headers]})
    await send({"type": "http.response.body", "body": body})
