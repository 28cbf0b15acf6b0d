"""How long from the key press to the new chart, in a real browser: the attention lab against a bare page.

    python -m tests.benchmarks.slider_latency [--presses 40] [--model smollm2-135m-q4]

Both are served by the same Streamlit and drawn by the same headless Chromium on the same machine, in turns. The clock
starts at the browser's keydown event and stops in the first frame in which the heat map's pixels are others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TEXT = (
    "When Mary and John went to the store, John gave a drink to Mary because she was very thirsty "
    "after the long walk from the old house on the green hill"
)
WATCH = """
(chart) => {
  const pixels = () => document.querySelector(`${chart} .heatmaplayer image`)?.href.baseVal
  window.latency = null
  document.addEventListener("keydown", () => {
    const start = performance.now(), before = pixels()
    const look = () => {
      const now = pixels()
      if (now && now !== before) window.latency = performance.now() - start
      else requestAnimationFrame(look)
    }
    requestAnimationFrame(look)
  }, { capture: true })
}
"""


@contextmanager
def served(script: Path, folder: Path) -> Iterator[str]:
    """Serve a Streamlit script on a free port; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", str(script), "--server.port", str(port)]
    server = subprocess.Popen(
        [*command, "--server.headless", "true", "--browser.gatherUsageStats", "false"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(150):
            try:
                urllib.request.urlopen(f"http://localhost:{port}/_stcore/health", timeout=1)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        yield f"http://localhost:{port}"
    finally:
        server.terminate()
        server.wait(20)


def settled(page: Page) -> None:
    """Wait until the script has run and nothing is under way."""
    page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]", timeout=120_000)
    page.wait_for_function("!document.querySelector('[data-testid=stProgress], [data-testid=stSkeleton]')")
    time.sleep(0.25)


def prepared(browser: Browser, address: str, chart: str) -> Page:
    """A page with its chart drawn and the clock attached."""
    page = browser.new_page(viewport={"width": 1440, "height": 900}, reduced_motion="reduce")
    page.goto(address)
    page.wait_for_selector(f"{chart} .heatmaplayer image", timeout=120_000)
    settled(page)
    page.evaluate(WATCH, chart)
    return page


def pressed(page: Page, slider: str, presses: int) -> list[float]:
    """Milliseconds from each of `presses` key presses on the slider with that key to the new chart."""
    page.bring_to_front()  # a page behind another draws no frames
    handle = page.locator(f".st-key-{slider} input[type=range]")
    times = []
    for press in range(presses):
        page.evaluate("window.latency = null")
        handle.focus()
        page.keyboard.press("ArrowRight" if press % 2 == 0 else "ArrowLeft")
        page.wait_for_function("window.latency !== null", timeout=20_000)
        times.append(page.evaluate("window.latency"))
        settled(page)
    return times


def line(name: str, times: list[float]) -> tuple[float, float]:
    """Print and return the median and the 95th percentile."""
    median, high = statistics.median(times), statistics.quantiles(times, n=20)[-1]
    print(f"{name:<34}{median:>8.0f} ms{high:>10.0f} ms{len(times):>8}")
    return median, high


def main() -> int:
    """Measure both pages in turns and print the table; returns 1 if the lab misses its target."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--presses", type=int, default=40)
    arguments.add_argument("--model", default="storyteller")
    given = arguments.parse_args()
    presses = given.presses
    settings = {"text": TEXT, "view": "One head", "model": given.model, "layer": 3}  # a layer with one on either side
    query = urllib.parse.urlencode({f"attention_{name}": value for name, value in settings.items()})
    times: dict[str, list[float]] = {"floor": [], "Temperature": [], "Layer": []}
    with (
        served(ROOT / "tests/benchmarks/bare_page.py", ROOT / "tests/benchmarks") as floor,
        served(ROOT / "app.py", ROOT) as app,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        bare = prepared(browser, floor, ".st-key-map")
        lab = prepared(browser, f"{app}/attention?{query}", ".st-key-attention_Onehead")
        tokens = lab.evaluate("document.querySelector('.st-key-attention_Onehead .js-plotly-plot').data[0].z.shape")
        for page, slider in ((bare, "seed"), (lab, "attention_temperature"), (lab, "attention_layer")):
            pressed(page, slider, 5)
        for _ in range(4):
            times["floor"] += pressed(bare, "seed", presses // 4)
            times["Temperature"] += pressed(lab, "attention_temperature", presses // 4)
            times["Layer"] += pressed(lab, "attention_layer", presses // 4)
        chromium = browser.version
        browser.close()
    print(
        f"{given.model}, map of {tokens} · {os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        end=" · ",
    )
    print(f"Chromium {chromium} · streamlit {version('streamlit')} · plotly {version('plotly')}")
    print(f"{'key press to new chart':<34}{'median':>11}{'95th':>13}{'presses':>8}")
    floor_median, floor_high = line("bare page, one slider, one map", times["floor"])
    good = True
    for slider in ("Temperature", "Layer"):
        median, high = line(f"attention lab, {slider.lower()}", times[slider])
        good &= median <= 1.5 * floor_median and high <= 2 * floor_high
        print(f"{'':<4}× floor{median / floor_median:>31.2f}{high / floor_high:>13.2f}")
    print(json.dumps({name: [round(time, 1) for time in found] for name, found in times.items()}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
