"""The documentation as built: pages fit the screens of readers, and load nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("material", "mkdocstrings", "latex2mathml", "playwright.sync_api"):
    pytest.importorskip(needed, reason="the site is built with hierens[docs] and shown by playwright")

from app_picture import FLAGS, find_browser
from static_server import served

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed"),
]
# What sticks out of the page, or is cut by a box that does not scroll.
CUT = """() => {
    const cut = [], width = document.documentElement.clientWidth
    if (document.documentElement.scrollWidth > width) cut.push('the page')
    for (const part of document.querySelectorAll('article :is(pre, table, img, svg, math, .formula)')) {
        let right = part.getBoundingClientRect().right
        for (let box = part; box.tagName != 'ARTICLE'; box = box.parentElement) {
            const scrolls = ['auto', 'scroll'].includes(getComputedStyle(box).overflowX)
            const inside = box.getBoundingClientRect().right
            if (scrolls) right = Math.min(right, inside)
            if (getComputedStyle(box).overflowX == 'hidden' && right > inside + 1) right = Infinity
        }
        if (right > width + 1) cut.push(`${part.tagName} ${part.getAttribute('src') ?? part.textContent.slice(0, 60)}`)
    }
    for (const code of document.querySelectorAll('article pre > code'))
        if (code.scrollWidth > code.clientWidth + 1 && (width >= 1220 || getComputedStyle(code).overflowX != 'auto'))
            cut.push(`code ${code.textContent.slice(0, 60)}`)
    return cut
}"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site, and its address."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with served(folder) as address:
        yield folder, address


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)
        yield chromium
        chromium.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_fits(site, browser, width):
    folder, address = site
    page, requested = browser.new_page(viewport={"width": width, "height": 900}), []
    page.on("request", lambda request: requested.append(request.url))
    files = sorted(file.relative_to(folder) for file in folder.rglob("*.html"))
    assert len(files) > 50
    cut = {}
    for file in files:
        page.goto(f"{address}/{file}")
        if found := page.evaluate(CUT):
            cut[str(file)] = found
    assert not cut
    assert all(url.startswith((address, "data:", "blob:")) for url in requested), "pages load nothing from elsewhere"


def test_formulas_and_graphs_are_drawn_when_the_site_is_built(site, browser):
    _, address = site
    page = browser.new_page()
    page.goto(f"{address}/explanation/method/")
    assert page.locator("article math").count() > 20 and page.locator("article math[display=block]").count() >= 3
    assert "$" not in page.locator("article").inner_text() and page.locator("td math").count() > 5
    page.goto(f"{address}/architecture/")
    arrows = re.findall(r"^  (\w+) --> (\w+)$", (ROOT / "docs" / "architecture.md").read_text(), re.M)
    assert page.locator("svg.graph rect").count() == len({name for arrow in arrows for name in arrow}) > 10
    assert page.locator("svg.graph path").count() == len(arrows)


def test_numbers_are_on_the_right_and_text_on_the_left(site, browser):
    _, address = site
    page = browser.new_page()
    page.goto(f"{address}/results/cifar100/")
    cells = page.locator("article table").first.locator("tbody tr").first.locator("td")
    aligned = cells.evaluate_all("cells => cells.map(cell => getComputedStyle(cell).textAlign)")
    assert aligned[:3] == ["right", "right", "left"]


def test_the_card_for_links(site):
    folder, _ = site
    assert 'property="og:image" content="assets/social.png"' in (folder / "index.html").read_text()
    assert (folder / "assets" / "social.png").read_bytes()[:4] == b"\x89PNG"
