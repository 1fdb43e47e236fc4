"""`hierens export` and `hierens push`: exporting and publishing saved models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from hierens.cli.command import Command, UsageError
from hierens.cli.output import json_output
from hierens.core.errors import first_line


@dataclass(frozen=True)
class ExportSettings:
    """The model, and the folder and format of the files."""

    model: tyro.conf.Positional[str]
    """folder of a saved model, or user/name on the Hub"""
    directory: tyro.conf.Positional[str]
    """folder for the files"""
    format: str = "onnx"
    """onnx, openvino, executorch or torch-export"""
    depths: tuple[str, ...] = ("all",)
    """`all`, or some depths by number; there is a file per depth"""
    policy: str = ""
    """policy.json: write one file of all depths (onnx) that computes only what this policy chooses"""
    size: tuple[int, int, int] | None = None
    """channels, height and width of the images; by default the model's"""
    check: bool = True
    """compare the outputs of the files with the model's"""
    json: bool = False
    """print the names of the files as one JSON object"""


def export(arguments: Sequence[str]) -> None:
    """Write a saved model in another format, with a file per depth."""
    settings = EXPORT.parse(arguments)
    if settings.depths != ("all",) and not all(depth.isdecimal() for depth in settings.depths):
        raise UsageError(f"--depths takes `all` or numbers, got {' '.join(settings.depths)}.")
    depths: Any = "all" if settings.depths == ("all",) else [int(depth) for depth in settings.depths]

    from hierens.inference.policies import load_policy
    from hierens.models.loading import from_pretrained

    with json_output(settings.json) as write_json:
        model = from_pretrained(settings.model)
        policy = load_policy(settings.policy) if settings.policy else None
        options: dict[str, Any] = {"depths": depths, "policy": policy, "size": settings.size, "check": settings.check}
        model.export(settings.directory, settings.format, **options)
        files = sorted(str(file) for file in Path(settings.directory).rglob("*") if file.is_file())
        if settings.json:
            write_json({"directory": settings.directory, "format": settings.format, "files": files})
        else:
            print("\n".join(files))


EXPORT = Command(
    "export",
    "write a saved model for another runtime, a file per depth or one of all depths",
    ExportSettings,
    export,
    "MODEL DIRECTORY",
    examples=(
        "hierens export runs/demo/model onnx --depths 0 3",
        "hierens export runs/demo/model exits --policy runs/demo/model/policy.json",
    ),
)


@dataclass(frozen=True)
class PushSettings:
    """The model and the repository."""

    model: tyro.conf.Positional[str]
    """folder of a saved model; its policy.json is included"""
    repository: tyro.conf.Positional[str]
    """user/name on the Hugging Face Hub; created if missing"""
    private: bool = False
    """make a new repository private; by default as in your account's settings"""
    revision: str | None = None
    """branch to push to"""
    results: str = ""
    """results.json of a run, for the table in the model card; by default the one beside the model's folder"""
    json: bool = False
    """print the commit's URL as one JSON object"""


def push(arguments: Sequence[str]) -> None:
    """Publish a saved model with its card."""
    settings = PUSH.parse(arguments)
    if settings.repository.count("/") != 1:
        raise UsageError(f"the repository must be user/name, got {settings.repository!r}.")

    from hierens.models.loading import load_with_policy

    with json_output(settings.json) as write_json:
        model, policy = load_with_policy(settings.model)
        beside = Path(settings.model).parent / "results.json"
        file = settings.results or (str(beside) if beside.is_file() else "")
        results = card_results(file, model.depths) if file else None
        options: dict[str, Any] = {"private": settings.private or None, "revision": settings.revision}
        try:
            url = model.push_to_hub(settings.repository, results=results, policy=policy, **options)
        except Exception as error:  # errors of the network, the Hub or the token
            raise ValueError(
                f"{settings.repository} was not pushed: {first_line(error)} (`hf auth login` stores a token)"
            ) from error
        if settings.json:
            write_json({"url": url})
        else:
            print(url)


def card_results(file: str, depths: int) -> dict[str, list[float]]:
    """The columns for a model card from a run's results.json: accuracy, likelihood and calibration of every depth.

    Raises:
        ValueError: there is no such file, or it has no results of so many depths.
    """
    from hierens.core.json_files import read_json
    from hierens.hub.cards import COLUMNS

    try:
        found = read_json(Path(file), "the results of a run", nan=True)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as results: {first_line(error)}") from error
    values = found if isinstance(found, dict) else {}
    columns = {title: values[name] for name, title in COLUMNS.items() if isinstance(values.get(name), list)}
    if not columns or any(
        len(column) != depths or not all(isinstance(v, (int, float)) for v in column) for column in columns.values()
    ):
        raise ValueError(f"{file} holds no results of {depths} depths: give the results.json of a run.")
    return columns


PUSH = Command(
    "push",
    "publish a saved model, with its card, on the Hugging Face Hub",
    PushSettings,
    push,
    "MODEL USER/NAME",
    examples=("hierens push runs/demo/model user/digits --private",),
)
