"""examples/web: the answers in the browser are those of ONNX Runtime in Python."""

import json

import numpy as np
import pytest
from PIL import Image

for needed in ("playwright.sync_api", "onnxruntime", "sklearn"):
    pytest.importorskip(needed, reason="the page is opened by playwright, and compared with ONNX Runtime")

import onnxruntime
from app_picture import find_browser
from sklearn.datasets import load_digits
from web_picture import ROOT, opened, prepared, wait_for_results

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed"),
]
MODEL = ROOT / "models" / "digits-tree"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page with an exported model."""
    made = prepared(tmp_path_factory.mktemp("web") / "page", MODEL)
    if made is None:
        pytest.skip("npm cannot install onnxruntime-web")
    return made


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Digits as pictures of the model's size, and blends of two, of which the model is less certain."""
    scratch, images = tmp_path_factory.mktemp("digits"), load_digits().images[:24] * 255 / 16
    images = np.concatenate([images, (images[:12] + images[12:]) / 2])
    files = []
    for number, pixels in enumerate(images):
        files.append(scratch / f"{number:02}.png")
        Image.fromarray(pixels.astype(np.uint8)).resize((16, 16), Image.Resampling.BILINEAR).save(files[-1])
    return files


def in_python(folder, files):
    about = json.loads((folder / "exits" / "export.json").read_text())
    session = onnxruntime.InferenceSession(folder / "exits" / "model.onnx", providers=["CPUExecutionProvider"])
    pixels = np.stack([np.asarray(Image.open(file), np.float32)[None] / 255 for file in files])
    pixels = (pixels - about["preprocessing"]["mean"][0]) / about["preprocessing"]["std"][0]
    outputs = [session.run(None, {"images": one[None].astype(np.float32)}) for one in pixels]
    return np.concatenate([one[0] for one in outputs]), [int(one[1][0]) for one in outputs]


def shown(page, count):
    wait_for_results(page, count)
    rows = page.locator("#results tr").all()[::-1]  # the newest is on top
    logits = np.array([json.loads(row.get_attribute("data-logits")) for row in rows])
    return logits, [int(row.get_attribute("data-networks")) for row in rows], [row.inner_text() for row in rows]


def test_the_browser_gives_the_answers_of_python(folder, digits):
    logits, networks = in_python(folder, digits)
    assert len(set(networks)) > 1
    with opened(folder) as page:
        page.set_input_files("#files", digits)
        seen, used, texts = shown(page, len(digits))
    assert used == networks
    np.testing.assert_allclose(seen, logits, atol=1e-3, rtol=1e-4)
    assert all(f"{count} of 8" in text for count, text in zip(networks, texts, strict=True))


def test_a_dropped_picture_is_classified(folder, digits):
    logits, networks = in_python(folder, digits[:1])
    drop = """(bytes) => {
        const transfer = new DataTransfer()
        transfer.items.add(new File([new Uint8Array(bytes)], 'digit.png', { type: 'image/png' }))
        document.getElementById('drop').dispatchEvent(new DragEvent('drop', { dataTransfer: transfer }))
    }"""
    with opened(folder) as page:
        page.evaluate(drop, list(digits[0].read_bytes()))
        seen, used, _ = shown(page, 1)
    assert used == networks
    np.testing.assert_allclose(seen, logits, atol=1e-3, rtol=1e-4)


def test_what_is_no_picture_and_a_missing_model_end_in_a_sentence(folder, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    with opened(folder) as page:
        page.set_input_files("#files", text)
        page.wait_for_selector("#results td[colspan]")
        assert "notes.txt cannot be classified" in page.locator("#results").inner_text()
        page.goto(page.url + "?model=elsewhere/")
        page.wait_for_function("document.body.textContent.includes('cannot be loaded')")
        assert "there is no elsewhere/export.json: run hierens export" in page.locator("#about").inner_text()
