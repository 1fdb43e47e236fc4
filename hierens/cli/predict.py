"""`hierens predict`: predictions of a saved model for images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from hierens.cli.command import Command, UsageError
from hierens.cli.output import json_output, print_table, print_to_stderr
from hierens.core.errors import first_line
from hierens.core.progress import with_progress

if TYPE_CHECKING:
    from torch import Tensor

    from hierens.inference.policies import Policy
    from hierens.models.adaptive import Adaptive


@dataclass(frozen=True)
class PredictSettings:
    """The model, the images, and how much to compute."""

    model: tyro.conf.Positional[str]
    """folder of a saved model, or user/name on the Hub"""
    images: tyro.conf.Positional[tuple[str, ...]]
    """image files, and folders, of which all images are classified, with those of their subfolders"""
    depth: int | None = None
    """evaluate the first 2^depth networks, and ignore the policy"""
    policy: str = ""
    """a policy.json, or its folder; by default the one beside the model, else all networks are evaluated"""
    top: int = 5
    """number of classes to show"""
    json: bool = False
    """print one JSON object instead of a table"""


def predict(arguments: Sequence[str]) -> None:
    """Classify images one by one; each unreadable one has a line on stderr, and the exit code is then 1."""
    settings = PREDICT.parse(arguments)
    if not settings.images:
        raise UsageError("give at least one image or folder: hierens predict MODEL IMAGE...")
    if settings.depth is not None and settings.policy:
        raise UsageError("give --depth or --policy, not both.")
    if settings.top < 1:
        raise UsageError(f"--top must be at least 1, got {settings.top}.")

    from hierens.core.labels import check_classes
    from hierens.training.data.decoding import create_decoder
    from hierens.training.data.splits import images_below
    from hierens.training.data.transforms import create_transform
    from hierens.training.preprocessing import data_config, label_names

    files = [file for name in settings.images for file in (images_below(name) if Path(name).is_dir() else [name])]
    answers: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    with json_output(settings.json) as write_json:
        model, policy = _loaded(settings)
        check_classes(model, "hierens predict")
        names, data = label_names(model), data_config(model, settings.model)
        decode, transform = create_decoder(data), create_transform(data, training=False)
        for file in with_progress(files, len(files), "predicting"):
            try:
                image = _read(file, decode, transform)
            except ValueError as error:
                failed.append({"image": file, "error": str(error)})
                print_to_stderr(f"error: {file}: {error}")
            else:
                answers.append({"image": file, **_answer(model, policy, image, settings.top, names)})
        if settings.json:
            write_json({"model": settings.model, "policy": policy.to_dict(), "answers": answers, "failed": failed})
        elif answers:
            print_table(("image", "class", "probability (%)", model.unit, "MACs"), _rows(answers))
    if failed:
        raise SystemExit(1)


def _loaded(settings: PredictSettings) -> tuple[Adaptive, Policy]:
    """The model, and the depth or policy of the flags, else the policy beside the model, else all networks."""
    from hierens.inference.policies import FixedDepth, load_policy
    from hierens.models.loading import from_pretrained, load_with_policy

    if settings.depth is not None:
        model = from_pretrained(settings.model)
        model.leaves_at(settings.depth)
        return model, FixedDepth(settings.depth)
    if settings.policy:
        return from_pretrained(settings.model), load_policy(settings.policy)
    model, saved = load_with_policy(settings.model)
    return model, saved or FixedDepth()


def _read(file: str, decode: Callable[[str], Any], transform: Callable[[Any], Tensor]) -> Tensor:
    """An image as input of the model, (1, C, H, W).

    Raises:
        ValueError: it cannot be read.
    """
    from hierens.training.data.decoding import DecodingError

    try:
        return transform(decode(file))[None]
    except DecodingError as error:
        raise ValueError(f"{error}.") from error
    except Exception as error:  # transforms do not support every size
        raise ValueError(f"it cannot be prepared ({first_line(error)}).") from error


def _answer(model: Adaptive, policy: Policy, image: Tensor, top: int, names: list[str] | None) -> dict[str, Any]:
    found = policy(model, image)
    best, classes = found.logits[0].double().softmax(-1).topk(min(top, model.num_classes))
    likely = [
        {"class": index, **({"name": names[index]} if names else {}), "probability": probability}
        for index, probability in zip(classes.tolist(), best.tolist(), strict=True)
    ]
    return {"networks": int(found.leaves[0]), "macs": int(found.macs[0]), "top": likely}


def _rows(answers: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row per class; the first row of an image has its name and cost."""
    from hierens.evaluation.profiling import millions

    rows: list[tuple[str, ...]] = []
    for answer in answers:
        cost = (f"{answer['networks']}", millions(answer["macs"]))
        for place, likely in enumerate(answer["top"]):
            label, share = str(likely.get("name", likely["class"])), f"{100 * likely['probability']:.2f}"
            rows.append((answer["image"], label, share, *cost) if place == 0 else ("", label, share, "", ""))
    return rows


PREDICT = Command(
    "predict",
    "classify images or whole folders with a saved model: classes, probabilities and costs",
    PredictSettings,
    predict,
    "MODEL IMAGE...",
    examples=(
        "hierens predict runs/demo/model a.png b.png --depth 1",
        "hierens predict runs/demo/model FOLDER --top 1",
        "hierens predict user/name cat.jpg --json",
    ),
)
