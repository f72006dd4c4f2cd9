"""A real browser, driven over the WebDriver protocol."""

import base64
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_WAIT = """
const [text, done] = arguments, holds = new Function("return " + text)
const look = () => holds() ? done(true) : setTimeout(look, 20)
look()
"""


class Browser:
    """One window of headless Chromium."""

    def __init__(self, driver_url: str, program: str) -> None:
        self._url = f"{driver_url}/session"
        options = {
            "binary": program,
            "args": ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"],
        }
        capabilities = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        self._url += f"/{self._post('', capabilities=capabilities)['sessionId']}"
        self._post("/timeouts", script=60_000, pageLoad=60_000)

    def open(self, url: str) -> None:
        """Load a page."""
        self._post("/url", url=url)

    def run(self, script: str, *arguments: object) -> Any:
        """What a script returns."""
        return self._post("/execute/sync", script=script, args=arguments)

    def wait(self, condition: str) -> None:
        """Until an expression holds in the page; a minute at most."""
        self._post("/execute/async", script=_WAIT, args=[condition])

    def type(self, selector: str, text: str) -> None:
        """Put a text into a field, key by key, instead of what is there."""
        self.run("document.querySelector(arguments[0]).select()", selector)
        self._post(f"/element/{self._find(selector)}/value", text=text)

    def click(self, selector: str) -> None:
        """Click on the first such element."""
        self._post(f"/element/{self._find(selector)}/click")

    def texts(self, selector: str) -> list[str]:
        """What such elements say."""
        return list(self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.innerText.trim())", selector))

    def complaints(self) -> list[str]:
        """What the console of the browser says: errors of scripts, and what a page's policy forbids."""
        return [entry["message"] for entry in self._post("/se/log", type="browser")]

    def save_screenshot(self, path: Path, width: int, height: int) -> None:
        """A PNG of the window at this size."""
        self._post("/window/rect", width=width, height=height)
        path.write_bytes(base64.b64decode(self._call("/screenshot")))

    def close(self) -> None:
        """End the browser."""
        self._call("", "DELETE")

    def _find(self, selector: str) -> str:
        found: str = next(iter(self._post("/element", using="css selector", value=selector).values()))
        return found

    def _post(self, path: str, **values: object) -> Any:
        return self._call(path, "POST", json.dumps(values).encode())

    def _call(self, path: str, method: str = "GET", data: bytes | None = None) -> Any:
        request = urllib.request.Request(self._url + path, data, {"content-type": "application/json"}, method=method)  # noqa: S310
        with urllib.request.urlopen(request, timeout=90) as answer:  # noqa: S310  # on loopback
            return json.loads(answer.read())["value"]


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser of the test's own."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed; apt-get install chromium chromium-driver enables this")
    with subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            port = next(found[1] for line in process.stdout if (found := re.search(r"started successfully on port (\d+)", line)))
            window = Browser(f"http://127.0.0.1:{port}", program)
            try:
                yield window
            finally:
                window.close()
        finally:
            process.terminate()
