"""An S3 server on loopback whose faults a test can order: `python -m tests.s3_server` prints its port.

moto answers the requests, one at a time, so that a conditional write is as atomic as the real
store's. `POST /-/faults` takes a list of faults, each used up after `times` matching requests, of
which the first `after` go well; `POST /-/requests` returns what was asked since the last time.
"""

import json
import re
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

Answer = Iterable[bytes]


class Faulty:
    """moto behind a lock and a list of faults."""

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._one_at_a_time = threading.Lock()
        self._faults: list[dict[str, Any]] = []
        self._requests: list[str] = []

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        if environ["PATH_INFO"].startswith("/-/"):
            return self._ordered(environ, start_response)
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        self._requests.append(f"{request} {environ.get('HTTP_RANGE', '')}".rstrip())
        fault = next((fault for fault in self._faults if fault["times"] > 0 and re.search(fault["request"], request)), None)
        if fault is not None and fault.get("after", 0) > 0:
            fault["after"] -= 1
            fault = None
        if fault is not None:
            fault["times"] -= 1
            if fault["action"] == "refuse":
                start_response(f"{fault['status']} Fault", [("Content-Type", "application/xml"), ("Connection", "close")])
                text = f"<Error><Code>{fault['code']}</Code><Message>ordered by a test</Message></Error>".encode()
                return [] if environ["REQUEST_METHOD"] == "HEAD" else [text]
            if fault["action"] == "drop":
                return self._dropped(environ)
        with self._one_at_a_time:
            answer = list(self._moto(environ, start_response))
        if fault is not None and fault["action"] == "lose the answer":
            return self._dropped(environ)
        if fault is not None and fault["action"] == "cut the answer":  # which a HEAD has none of
            if environ["REQUEST_METHOD"] != "HEAD":
                head = b"HTTP/1.0 200 OK\r\nContent-Length: 1000000\r\n\r\n"
                environ["werkzeug.socket"].sendall(head + b"".join(answer)[:10])
            return self._dropped(environ)
        return answer

    def _ordered(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        seen = self._requests
        if environ["PATH_INFO"] == "/-/faults":
            self._faults = json.loads(body)
        self._requests = []
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(seen).encode()]

    @staticmethod
    def _dropped(environ: dict[str, Any]) -> Answer:
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionError("ordered by a test")


class Quiet(WSGIRequestHandler):
    """Logs nothing: lost connections are ordered here."""

    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002, ARG002
        return


def main() -> None:
    """Serve until killed."""
    server = make_server("127.0.0.1", 0, Faulty(), threaded=True, request_handler=Quiet)
    print(server.port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
