"""Web demo of a saved model: drop an image, set the depth, and watch the prediction change network by network.

pip install -e ".[app]"                                                               what it needs
python examples/app.py --model DIR
python examples/app.py --model user/name --examples FOLDER --labels cat dog owl       a folder of images
python examples/app.py --model DIR --examples DIR                                     Fashion-MNIST's idx files
"""

from __future__ import annotations

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which would send statistics

import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import tyro
from app_view import Answer, page, placeholder
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions

import hierens
from hierens.core.install import install_command
from hierens.training.config import DataConfig
from hierens.training.data.builtin import CLASSES, fashion_mnist, read_built_in
from hierens.training.data.decoding import DecodingError, create_decoder, decode
from hierens.training.data.transforms import create_transform
from hierens.training.preprocessing import data_config, label_names

try:
    import gradio as gr
except ImportError:
    sys.exit(f"error: the page is made with Gradio: {install_command('app')}.")

STYLE = Path(__file__).with_name("app.css")
_PIXELS = "#image img, #examples img { image-rendering: pixelated; }"  # for models with small input images
_MOST_EXAMPLES = 15
_TRIED = 50  # images considered of each class


@dataclass(frozen=True)
class Settings:
    """Settings of the demo."""

    model: str
    """folder of a saved model, or user/name on the Hub"""
    port: int = 7860
    """port of the page"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 allows other machines"""
    examples: str = ""
    """folder of example images, or of Fashion-MNIST's idx files; by default images that come with hierens, if the model
    has their class names (the photographs of clothes, the digits)"""
    labels: tuple[str, ...] = ()
    """names of the classes; by default those in the model's config"""
    pace: float = 0.5
    """seconds for which each network is shown; not included in the displayed time"""
    cpu: bool = False
    """use the CPU"""


class Demo:
    """A model that predicts one image at a time.

    Args:
        settings: settings of the demo.

    Raises:
        ValueError: the model cannot be loaded, or the number of labels is not the number of classes.
    """

    def __init__(self, settings: Settings) -> None:
        self.model, self.pace = hierens.from_pretrained(settings.model), settings.pace
        if not isinstance(self.model, hierens.HierarchicalEnsemble):
            raise ValueError(f"{settings.model} is not a tree: the page can only show hierarchical ensembles.")
        self.tree, classes = self.model.tree, self.model.num_classes
        if settings.labels and len(settings.labels) != classes:
            raise ValueError(f"--labels has {len(settings.labels)} names, but the model {classes} classes.")
        self.names = list(settings.labels) or label_names(self.model) or [f"class {c}" for c in range(classes)]
        self.device = torch.device("cuda" if torch.cuda.is_available() and not settings.cpu else "cpu")
        self.model.to(self.device)
        config = data_config(self.model, settings.model)
        self.size, self.mode = config.input_size, "L" if config.input_size[0] == 1 else "RGB"
        self.decode, self.transform = create_decoder(config), create_transform(config, training=False)
        self.full_macs = self.model.macs(self.size)[-1]
        self._lock = threading.Lock()  # one request at a time, so that displayed times are not affected by others
        blank = Image.new(self.mode, self.size[:0:-1])
        for depth in range(self.tree.depths):  # warm-up: the first call of each depth is slow
            self.at_depth(blank, depth)
        list(self.walk(blank))

    def at_depth(self, image: Image.Image, depth: int) -> Answer:
        """The prediction of the first 2^depth networks."""
        x, leaves = self._prepared(image), self.tree.leaves_at(int(depth))
        with self._lock, torch.inference_mode():
            began = time.perf_counter()
            logits = self.model(x, leaves=leaves, reduce=False)[0].double().cpu()
            taken = time.perf_counter() - began
        macs = int(self.tree.cost(self.model.branch_macs(self.size), leaves))
        p = logits.mean(0).softmax(-1).tolist()
        return Answer(p, logits.argmax(-1).tolist(), macs, self.full_macs, 1e3 * taken)

    def walk(self, image: Image.Image) -> Iterator[Answer]:
        """The predictions after every network."""
        steps, votes, taken = self.model.anytime(self._prepared(image)), [], 0.0
        for _ in range(self.tree.leaves):
            with self._lock:
                began = time.perf_counter()
                step = next(steps)
                p = step.logits[0].double().softmax(-1).tolist()
                taken += time.perf_counter() - began
            votes.append(int(step.newest[0].argmax()))
            yield Answer(p, list(votes), step.macs, self.full_macs, 1e3 * taken, walking=True)

    def show_depth(self, image: Image.Image | None, depth: int) -> str:
        """HTML of the prediction at the depth of the slider."""
        return placeholder(self.tree) if image is None else page(self.at_depth(image, depth), self.tree, self.names)

    def show_walk(self, image: Image.Image | None) -> Iterator[tuple[str, Any]]:
        """HTML of the prediction after every network, with pauses, and the position of the slider.

        Raises:
            gr.Error: there is no image.
        """
        if image is None:
            raise gr.Error("Drop an image first, or choose one of the examples.", print_exception=False)
        depths = {self.tree.leaves_at(depth): depth for depth in range(self.tree.depths)}
        for answer in self.walk(image):
            networks = len(answer.votes)
            yield page(answer, self.tree, self.names), depths.get(networks, gr.skip())
            if networks < self.tree.leaves:
                time.sleep(self.pace)

    @torch.inference_mode()
    def gains_most(self, images: list[Image.Image], label: int) -> int:
        """The index of the image whose label gains most in probability from the first network to all networks."""
        label = min(label, len(self.names) - 1)  # the images may have other classes than the model
        logits = self.model(torch.cat([self._prepared(image) for image in images]), reduce=False)
        first, whole = (mean.softmax(-1)[:, label] for mean in (logits[:, 0], logits.mean(1)))
        return int((whole - first).argmax())

    def _prepared(self, image: Image.Image) -> torch.Tensor:
        return self.transform(self.decode(image))[None].to(self.device)


def example_images(settings: Settings, demo: Demo) -> list[Image.Image]:
    """The example images: one per class, the first ones of a folder, or none.

    Raises:
        ValueError: the folder does not exist, or contains no readable image.
    """
    folder = Path(settings.examples)
    if not settings.examples:
        for name in ("clothing", "digits") if find_spec("sklearn") else ("clothing",):
            if demo.names == list(CLASSES[name]):
                return _one_of_each(demo, *read_built_in(DataConfig(dataset=name), "validation"))
        return []
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} does not exist: give --examples a folder of images.")
    if any(folder.glob("t10k-images-idx3-ubyte*")):
        return _one_of_each(demo, *fashion_mnist(DataConfig(data_dir=settings.examples), training=False))
    kinds = get_img_extensions(as_set=True)
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in kinds)[:_MOST_EXAMPLES]
    if not files:
        raise ValueError(f"there is no image in {folder} or below: give --examples a folder of images.")
    found = []
    for file in files:
        try:
            found.append(decode(file, "RGB"))
        except DecodingError as error:
            raise ValueError(f"the example {file} cannot be read: {error}.") from error
    return found


def build(demo: Demo, examples: list[Image.Image], folder: Path) -> gr.Blocks:
    """The page.

    Args:
        demo: the model.
        examples: example images.
        folder: folder from which the example images are served.
    """
    tree, backbone = demo.tree, demo.model._model_args.get("backbone")
    files = [folder / f"{number}.png" for number in range(len(examples))]
    for image, file in zip(examples, files, strict=True):
        image.thumbnail((512, 512))
        image.save(file)
    with gr.Blocks(title="hierens", analytics_enabled=False) as blocks:
        gr.HTML(
            f"<h1>One model, every budget</h1><p>{tree.leaves} networks ({backbone}) in one tree: "
            "run as many as there is time for.</p>",
            elem_id="title",
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                image = gr.Image(
                    type="pil",
                    image_mode=demo.mode,
                    sources=["upload", "clipboard"],
                    show_label=False,
                    label="image",
                    height=300,
                    elem_id="image",
                    buttons=[],
                )
                image.preprocess = uploaded(demo.decode)
                depth = gr.Slider(
                    0,
                    max(tree.depths - 1, 1),
                    value=tree.depths - 1,
                    step=1,
                    label="Depth",
                    info="the first 2^depth networks are evaluated",
                    elem_id="depth",
                    visible=tree.depths > 1,
                )
                button = gr.Button("Watch it sharpen", variant="primary", elem_id="walk")
                if files:
                    gr.Examples([[str(file)] for file in files], image, label="Examples", elem_id="examples")
            with gr.Column(scale=3, min_width=320):
                result = gr.HTML(placeholder(tree), elem_id="result")
        walk = button.click(demo.show_walk, image, [result, depth], show_progress="hidden", concurrency_limit=None)
        gr.on(
            [image.change, depth.input],
            demo.show_depth,
            [image, depth],
            result,
            cancels=walk,
            show_progress="hidden",
            trigger_mode="always_last",
            concurrency_limit=None,
        )
    return blocks


def main() -> None:
    """Serve the page until Ctrl-C."""
    settings = tyro.cli(Settings, description=__doc__)
    demo = Demo(settings)
    style = STYLE.read_text() + (_PIXELS if max(demo.size[1:]) <= 64 else "")
    fonts = ["system-ui", "Segoe UI", "Helvetica Neue", "Liberation Sans", "sans-serif"]
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=["monospace"])
    theme = theme.set(body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # deletes uploaded images
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        build(demo, example_images(settings, demo), Path(folder)).launch(
            server_name=settings.host,
            server_port=settings.port,
            share=False,
            ssr_mode=False,
            theme=theme,
            head=f"<style>{style}</style>",
            footer_links=[],
            max_file_size="32mb",
        )


def uploaded(decode: Callable[[str], Image.Image]) -> Callable[[Any], Image.Image | None]:
    """A function that decodes uploads instead of Gradio, which treats bit depth and orientation differently."""

    def read(payload: Any) -> Image.Image | None:
        if payload is None:
            return None
        try:
            return decode(payload.path)
        except DecodingError as error:
            name = payload.orig_name or "This file"
            sentence = f"{name} cannot be read: {error}. Try a PNG or a JPEG."
            raise gr.Error(sentence, print_exception=False) from error

    return read


def _one_of_each(demo: Demo, images: Any, labels: Any) -> list[Image.Image]:
    """Of the first images of every class, the one for which further networks help most."""
    chosen = []
    for label in sorted(set(labels.tolist()))[:_MOST_EXAMPLES]:
        first = [Image.fromarray(image) for image in images[labels == label][:_TRIED]]
        chosen.append(first[demo.gains_most(first, label)])
    return chosen


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
