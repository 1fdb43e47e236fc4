"""Takes the screenshot of examples/app.py for the documentation, in a headless browser.

python benchmarks/app_picture.py --model DIR --examples DIR --labels names... --output docs/assets/app.png
Requires `pip install -e ".[app]" playwright` and Chromium, which is found by name or set by --browser.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from PIL import Image

APP = Path(__file__).parents[1] / "examples" / "app.py"
QUIET = [f"--disable-{part}" for part in ("gpu", "quic", "background-networking", "component-update", "sync")]
FLAGS = ["--no-sandbox", "--no-first-run", *QUIET]


@dataclass(frozen=True)
class Settings:
    """Content of the screenshot."""

    model: str
    """folder of a saved model"""
    output: str = "docs/assets/app.png"
    """output file; it has a palette, to keep it small"""
    examples: str = ""
    """as for app.py"""
    labels: tuple[str, ...] = ()
    """as for app.py"""
    example: int = 0
    """index of the example to show"""
    networks: int = 0
    """number of networks after which the screenshot is taken; 0 for all"""
    width: int = 1200
    """width of the window in pixels"""
    height: int = 790
    """minimum height in pixels"""
    dark: bool = False
    """dark colour scheme"""
    browser: str = ""
    """path of the browser"""


def find_browser() -> str | None:
    """The path of Chromium, if it is installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


@contextmanager
def serving(*flags: str, timeout: float = 300) -> Iterator[str]:
    """Run the app in a separate process, and yield its address.

    Raises:
        RuntimeError: it did not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(APP.parents[1]), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, str(APP), "--port", str(port), "--cpu", *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + timeout
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    process.kill()
                    raise RuntimeError(f"the app did not start: {process.communicate()[0]}") from None
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=30)


@contextmanager
def opened(address: str, width: int, height: int = 800, browser: str = "", dark: bool = False) -> Iterator[Any]:
    """Open the page in a headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser or find_browser(), args=FLAGS)
        scheme = "dark" if dark else "light"
        page = chromium.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.goto(address)
        page.wait_for_selector("#answer")
        yield page
        chromium.close()


def main() -> None:
    """Select an example, evaluate the networks one by one, take the screenshot."""
    settings = tyro.cli(Settings, description=__doc__)
    flags = ["--model", settings.model, "--pace", "1" if settings.networks else "0"]
    flags += ["--examples", settings.examples] if settings.examples else []
    flags += ["--labels", *settings.labels] if settings.labels else []
    with (
        serving(*flags) as address,
        opened(address, settings.width, settings.height, browser=settings.browser, dark=settings.dark) as page,
    ):
        page.locator("#examples button.gallery-item").nth(settings.example).click()
        page.wait_for_selector('#answer:not([data-networks="0"])')
        page.click("#walk")
        wanted = f'[data-networks="{settings.networks}"]' if settings.networks else ""
        page.wait_for_selector(f'#answer[data-walking="1"]{wanted}')
        if not settings.networks:
            page.wait_for_timeout(2000)
        file = Path(settings.output)
        file.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=file, full_page=True)
    Image.open(file).convert("RGB").quantize(128).save(file, optimize=True)
    print(f"{file}: {file.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
