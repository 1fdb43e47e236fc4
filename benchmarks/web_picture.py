"""Takes the picture of examples/web, a page that classifies pictures in the browser, for docs/how-to/export.md.

python benchmarks/web_picture.py MODEL      for a saved model with policy.json, such as that of hierens demo after
                                            hierens calibrate; needs npm and Chromium
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tyro
from app_picture import FLAGS, find_browser
from PIL import Image
from playwright.sync_api import sync_playwright
from static_server import served

from hierens.inference.policies import load_policy
from hierens.models.loading import from_pretrained
from hierens.training.config import DataConfig
from hierens.training.data.builtin import CLASSES, read_built_in

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "assets" / "web_page.png"
READY = "!document.getElementById('files').disabled"


def prepared(folder: Path, model: Path) -> Path | None:
    """A copy of examples/web with ONNX Runtime Web and an exported model; None if npm cannot install the former."""
    shutil.copytree(ROOT / "examples" / "web", folder, ignore=shutil.ignore_patterns("node_modules", "exits"))
    npm = shutil.which("npm")
    command = [npm or "", "install", "--no-audit", "--no-fund", "--silent"]
    if npm is None or subprocess.run(command, cwd=folder, timeout=300, check=False).returncode:
        return None
    from_pretrained(model).eval().export(folder / "exits", policy=load_policy(model))
    return folder


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[Any]:
    """The page in a headless Chromium, with its model loaded."""
    with served(folder) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)
        page = browser.new_page(**options)
        page.goto(f"{address}/index.html")
        page.wait_for_function(f"{READY} || document.body.textContent.includes('cannot be loaded')")
        yield page
        browser.close()


def wait_for_results(page: Any, count: int) -> None:
    """Wait until so many pictures are classified."""
    page.wait_for_function(f"document.querySelectorAll('#results tr td:nth-child(6)').length == {count}")


def main(model: tyro.conf.Positional[Path]) -> None:
    """Export the model, show it photographs of clothes, and save the picture."""
    images, labels = read_built_in(DataConfig(dataset="clothing"), "validation")
    with tempfile.TemporaryDirectory() as scratch:
        folder = prepared(Path(scratch) / "web", model)
        if folder is None:
            raise SystemExit("error: npm cannot install onnxruntime-web.")
        files = []
        for label in (9, 6, 4, 1, 0):
            files.append(Path(scratch) / f"{CLASSES['clothing'][label]}.png")
            Image.fromarray(images[labels == label][3]).save(files[-1])
        with opened(folder, viewport={"width": 760, "height": 760}) as page:
            page.set_input_files("#files", files)
            wait_for_results(page, len(files))
            page.screenshot(path=str(PICTURE), full_page=True)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
