"""The app as learners meet it: served by Streamlit, drawn by the system's Chromium, or by Playwright's.

Everything here lives as long as this folder's tests and not longer: Playwright's event loop would be in the way of
tests that start their own, and the server's workers in the way of those that measure.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60_000  # milliseconds; the first page waits for the workers to import torch

# What Streamlit asks for below a deep link before it asks at the root, where it is answered.
STREAMLIT_PROBES = {"health", "host-config"}

QUIET = """() =>
  document.querySelector("[data-testid=stApp][data-test-script-state=notRunning]")
  && !document.querySelector("[class*='st-key-_cancel_'], [data-testid=stSkeleton], [data-testid=stSpinner]")
  && !document.querySelector("[data-stale=true]")
  && document.getAnimations().every((animation) => animation.playState !== "running")
"""

PIXEL = """([key, x, y]) => {
  const plot = document.querySelector(`.st-key-${key} .js-plotly-plot`)
  const { xaxis, yaxis } = plot._fullLayout
  const box = plot.querySelector(".main-svg").getBoundingClientRect()
  return [box.left + xaxis._offset + xaxis.d2p(x), box.top + yaxis._offset + yaxis.d2p(y)]
}"""


class Visitor:
    """One window on the app.

    Attributes:
        page: the window.
        faults: what went wrong in it: errors on the console, failed requests, requests that left this machine.
    """

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address, self.faults = page, address, []
        page.set_default_timeout(PATIENCE)
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.faults.append(f"exception: {error}"))
        page.on("request", lambda request: self._check_host(request.url))
        page.on("websocket", lambda stream: self._check_host(stream.url))
        page.on("requestfailed", self._note_failed)
        page.on("response", self._note_refused)

    def _hear(self, message) -> None:
        if message.type == "error" and not self._is_streamlit_probe(message.location["url"]):
            self.faults.append(f"console: {message.text} ({message.location['url']})")

    def _check_host(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob", "file") and parts.hostname != "localhost":
            self.faults.append(f"left this machine: {url}")

    def _note_failed(self, request) -> None:
        if request.failure != "net::ERR_ABORTED":  # the page was left before the answer came
            self.faults.append(f"failed: {request.url} ({request.failure})")

    def _note_refused(self, response) -> None:
        if response.status >= 400 and not self._is_streamlit_probe(response.url):
            self.faults.append(f"{response.status}: {response.url}")

    def _is_streamlit_probe(self, url: str) -> bool:
        page, *rest = urlsplit(url).path.strip("/").split("/")
        return page != "_stcore" and rest[:1] == ["_stcore"] and set(rest[1:]) <= STREAMLIT_PROBES

    def open(self, path: str = "/", **settings: object) -> None:
        """Go to a page of the app and wait until all of it is there; `settings` are its URL parameters."""
        prefix = path.strip("/")
        query = urlencode({f"{prefix}_{name}": str(value) for name, value in settings.items()})
        self.page.goto(f"{self.address}{path}{'?' if query else ''}{query}")
        expect(self.page.get_by_role("heading", level=1)).to_be_visible(timeout=PATIENCE)
        self.settle()

    def settle(self) -> None:
        """Wait until no script runs, no job is under way and nothing moves."""
        self.page.wait_for_function(QUIET, timeout=PATIENCE)

    def setting(self, name: str) -> str | None:
        """A URL parameter of the attention lab."""
        return parse_qs(urlsplit(self.page.url).query, keep_blank_values=True).get(f"attention_{name}", [None])[0]

    def slider(self, name: str) -> Locator:
        return self.page.locator(f".st-key-attention_{name} input[type=range]")

    def chart(self, key: str) -> Locator:
        return self.page.locator(f".st-key-attention_{key} .js-plotly-plot")

    def pixels(self, key: str) -> str:
        """The picture of a heat map, as a data URI."""
        image = self.chart(key).locator(".heatmaplayer image")
        image.wait_for()
        return image.evaluate("(image) => image.href.baseVal")

    def press(self, name: str, key: str) -> None:
        """Press a key on a slider and wait until the address says so and everything is drawn."""
        before = self.page.url
        self.slider(name).focus()
        self.page.keyboard.press(key)
        expect(self.page).not_to_have_url(before)
        self.settle()

    def click_cell(self, key: str, x: int, y: int) -> None:
        """Click what a heat map shows at column `x` and row `y`."""
        self.chart(key).scroll_into_view_if_needed()
        left, top = self.page.evaluate(PIXEL, [f"attention_{key}", x, y])
        self.page.mouse.move(left, top)
        self.chart(key).locator(".hoverlayer .hovertext").wait_for()  # Plotly clicks on what it hovers over
        self.page.mouse.click(left, top)


@contextmanager
def serve(log: Path) -> Iterator[str]:
    """Serve the app on a free port; yields its address before anybody has asked it for anything."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("w") as output:
        command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)]
        server = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 60
        while not _accepts(port):
            assert server.poll() is None, f"the server ended:\n{log.read_text()}"
            assert time.monotonic() < end, f"the server did not start:\n{log.read_text()}"
            time.sleep(0.1)
        yield f"http://localhost:{port}"
    finally:
        server.terminate()
        server.wait(30)


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("localhost", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        path = CHROMIUM or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no Chromium on this machine: `apt-get install chromium` or `make browser`")
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="package")
def address(browser, tmp_path_factory) -> Iterator[str]:
    """Where the app is served for all tests."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serve(log) as address:
        yield address
        assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture
def visit(browser, request):
    """Opens a window: `visit()`, or `visit(color_scheme="dark", address=…)`; nothing may have gone wrong in it."""
    visitors = []

    def open_window(address: str | None = None, **options: object) -> Visitor:
        options = {"viewport": {"width": 1440, "height": 900}, "reduced_motion": "reduce"} | options
        context = browser.new_context(**options)
        visitors.append(Visitor(context.new_page(), address or request.getfixturevalue("address")))
        return visitors[-1]

    yield open_window
    for visitor in visitors:
        visitor.page.context.close()
    assert not [fault for visitor in visitors for fault in visitor.faults]


@pytest.fixture
def lab(visit):
    """Opens the attention lab with these settings in its address."""

    def open_lab(**settings: object) -> Visitor:
        visitor = visit()
        visitor.open("/attention", **settings)
        return visitor

    return open_lab
