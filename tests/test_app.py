"""The page as a visitor uses it, in a real browser, and what it shows without one."""

import io

import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason="the page needs Gradio")

import app
from app_picture import find_browser, opened, serving
from app_view import Answer, drawing, page, percent, quantity

import hierens
from hierens.core.tree import Tree
from hierens.training.data.builtin import CLASSES
from support.made_up import jpeg
from support.networks import tiny_tree

NAMES = ("cat", "dog & co", "owl")
DROPPED = """bytes => {
    const files = new DataTransfer()
    files.items.add(new File([new Uint8Array(bytes)], 'photo.jpg', {type: 'image/jpeg'}))
    return files
}"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """Networks that are unlike each other, so that the answer changes with their number."""
    model = tiny_tree(num_classes=3)
    model.pretrained_cfg.update(input_size=(1, 16, 16), mean=(0.5,), std=(0.25,), crop_pct=1.0)
    # The first leaf says cat, two dog, all owl, against the last.
    for leaf, bias in zip(model.classifier, ([5.0, 0, 0], [0, 9, 0], [0, 0, 20], [5, 0, 0]), strict=True):
        leaf.fc.bias.data.copy_(torch.tensor(bias))
    folder = tmp_path_factory.mktemp("models") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def demo(model_dir):
    return app.Demo(app.Settings(str(model_dir), labels=NAMES, cpu=True))


@pytest.fixture
def image():
    return Image.open(io.BytesIO(jpeg(1)))


def test_answers_are_the_models(demo, model_dir, image):
    model, x = hierens.from_pretrained(model_dir), demo.transform(image.convert("L"))[None]
    walked = list(demo.walk(image))
    assert [len(answer.votes) for answer in walked] == [1, 2, 3, 4]
    for answer in (*walked, *(demo.at_depth(image, depth) for depth in range(3))):
        leaves = len(answer.votes)
        assert answer.probabilities == pytest.approx(model(x, leaves=leaves).softmax(-1)[0].tolist(), abs=1e-5)
        assert list(answer.votes) == model(x, leaves=leaves, reduce=False).argmax(-1)[0].tolist()
        assert answer.macs == model.tree.cost(model.branch_macs((1, 16, 16)), leaves)
        assert answer.full_macs == model.macs((1, 16, 16))[-1] and answer.milliseconds > 0
    assert [NAMES[demo.at_depth(image, depth).best] for depth in range(3)] == ["cat", "dog & co", "owl"]


def test_the_drawing_highlights_the_evaluated_branches():
    answer = Answer([0.2, 0.7, 0.1], [1, 0, 1], 30, 40, 1.5, walking=True)
    drawn = drawing(Tree.binary(3), answer, NAMES)
    assert drawn.count('<path class="off"') == 1 and drawn.count('<path class="on new"') == 3
    assert drawn.count('<path class="on"') == 3, "of seven branches one is dark, and three lead to the newest network"
    assert drawn.count("on other") == 1 and "network 2: cat" in drawn and "3 of them evaluated" in drawn
    shown = page(answer, Tree.binary(3), NAMES)
    assert "dog &amp; co" in shown and "dog & co" not in shown and "75 % of the tree" in shown and "2 of 3" in shown
    assert drawing(Tree((1, 3, 2), leaves=5)).count('<path class="off"') == 9
    assert drawing(Tree.binary(10)) == "", "too many to see"


def test_numbers_as_people_write_them():
    assert [quantity(n) for n in (26_951_520, 4_100_000_000, 1234, 7)] == ["27 M", "4.1 G", "1.23 k", "7"]
    assert (percent(0.9996), percent(0.25)) == ("&gt; 99.9 %", "25.0 %")


@pytest.mark.parametrize("name", ["clothing", "digits"])
def test_examples_are_images_of_the_models_classes(name, model_dir, demo, monkeypatch):
    settings = app.Settings(str(model_dir))
    assert app.example_images(settings, demo) == [], "of cats there are none"
    monkeypatch.setattr(demo, "names", list(CLASSES[name]))
    monkeypatch.setattr(demo, "gains_most", lambda images, label: label)
    assert len(app.example_images(settings, demo)) == 10


def test_bad_settings_are_named(model_dir, demo, tmp_path):
    with pytest.raises(ValueError, match="2 names, but the model 3 classes"):
        app.Demo(app.Settings(str(model_dir), labels=("a", "b")))
    for examples, message in (("/nowhere", "does not exist"), (str(tmp_path), "no image in")):
        with pytest.raises(ValueError, match=message):
            app.example_images(app.Settings(str(model_dir), examples=examples), demo)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken.png cannot be read"):
        app.example_images(app.Settings(str(model_dir), examples=str(tmp_path)), demo)


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")
def test_in_a_browser(model_dir, tmp_path):
    pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    (tmp_path / "broken.jpg").write_bytes(b"<html>404 not found</html>")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "a.jpg").write_bytes(jpeg(2))
    flags = ["--model", str(model_dir), "--labels", *NAMES, "--pace", "0.2", "--examples", str(tmp_path / "examples")]
    macs = [str(count) for count in hierens.from_pretrained(model_dir).macs()]
    with serving(*flags) as address, opened(address, 390) as shown:
        outside = []
        shown.on("request", lambda request: outside.append(request.url))
        shown.reload()

        def expect(**facts):
            wanted = "".join(f'[data-{name}="{value}"]' for name, value in facts.items())
            shown.wait_for_selector(f"#answer{wanted}", timeout=20_000)

        expect(networks=0)
        shown.click("#walk")
        shown.get_by_text("Drop an image first").wait_for()
        dropped = shown.evaluate_handle(DROPPED, list(jpeg(1)))
        shown.dispatch_event("#image .wrap", "drop", {"dataTransfer": dropped})
        expect(networks=4, macs=macs[2], answer="owl")
        slider = shown.locator("#depth input[type=range]")
        slider.focus()
        slider.press("Home")
        expect(networks=1, macs=macs[0], answer="cat")
        track = slider.bounding_box()
        middle = track["y"] + track["height"] / 2
        shown.mouse.move(track["x"] + 5, middle)
        shown.mouse.down()
        shown.mouse.move(track["x"] + track["width"] / 2, middle, steps=5)
        shown.mouse.up()
        expect(networks=2, macs=macs[1], answer="dog & co")
        shown.click("#walk")
        for networks in (1, 2, 3, 4):
            expect(networks=networks, walking=1)
        assert slider.input_value() == "2", "the slider goes along"
        slider.press("Home")
        expect(networks=1, macs=macs[0], walking=0)
        assert shown.evaluate("document.documentElement.scrollWidth") <= 390, "nothing sticks out of a phone"
        shown.locator("#image button[aria-label*='emove'], #image button[aria-label*='lear']").first.click()
        expect(networks=0)
        shown.set_input_files("#image input[type=file]", tmp_path / "broken.jpg")
        shown.get_by_text("broken.jpg cannot be read: it is no image").wait_for()
        shown.locator("#examples button.gallery-item").first.click()
        expect(networks=1)
        assert outside and all(url.startswith((address, "data:", "blob:")) for url in outside), "nobody is told"
