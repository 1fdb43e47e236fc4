"""Takes the picture of examples/web, a page that classifies pictures in the browser, for docs/how-to/export.md.

python benchmarks/web_picture.py MODEL      for a saved model with policy.json, such as that of hierens demo after
                                            hierens calibrate; needs npm and Chromium
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import tyro
from app_picture import FLAGS, find_browser
from PIL import Image
from playwright.sync_api import sync_playwright

from hierens.inference.policies import load_policy
from hierens.models.loading import from_pretrained
from hierens.training.config import DataConfig
from hierens.training.data.builtin import CLASSES, read_built_in

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "assets" / "web_page.png"
READY = "!document.getElementById('files').disabled"


class Quiet(SimpleHTTPRequestHandler):
    """A static server without a log."""

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


def copied(folder: Path) -> Path | None:
    """A copy of examples/web with ONNX Runtime Web; None if npm cannot install it."""
    shutil.copytree(ROOT / "examples" / "web", folder, ignore=shutil.ignore_patterns("node_modules", "exits"))
    npm = shutil.which("npm")
    command = [npm or "", "install", "--no-audit", "--no-fund", "--silent"]
    if npm is None or subprocess.run(command, cwd=folder, timeout=300, check=False).returncode:
        return None
    return folder


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[Any]:
    """The page in a headless Chromium, with its model loaded."""
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server,
        sync_playwright() as playwright,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)
        page = browser.new_page(**options)
        page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
        page.wait_for_function(f"{READY} || document.body.textContent.includes('cannot be loaded')")
        yield page
        browser.close()
        server.shutdown()


def main(model: tyro.conf.Positional[Path]) -> None:
    """Export the model, show it photographs of clothes, and save the picture."""
    images, labels = read_built_in(DataConfig(dataset="clothing"), "validation")
    with tempfile.TemporaryDirectory() as scratch:
        folder = copied(Path(scratch) / "web")
        if folder is None:
            raise SystemExit("error: npm cannot install onnxruntime-web.")
        from_pretrained(model).eval().export(folder / "exits", policy=load_policy(model))
        files = []
        for label in (9, 6, 4, 1, 0):
            files.append(Path(scratch) / f"{CLASSES['clothing'][label]}.png")
            Image.fromarray(images[labels == label][3]).save(files[-1])
        with opened(folder, viewport={"width": 760, "height": 760}) as page:
            page.set_input_files("#files", files)
            page.wait_for_function(f"document.querySelectorAll('#results tr td:nth-child(6)').length == {len(files)}")
            page.screenshot(path=str(PICTURE), full_page=True)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
