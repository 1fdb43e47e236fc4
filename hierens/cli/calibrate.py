"""`hierens calibrate`: confidence thresholds for a target, and what to expect of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from hierens.cli.command import Command, UsageError
from hierens.cli.output import json_output, print_table
from hierens.cli.results import held_out_batches, parse_with_data
from hierens.training.config import DataConfig

if TYPE_CHECKING:
    from hierens.inference.expectation import Expectation

_TARGETS = ("budget", "milliseconds", "p95_milliseconds", "accuracy")


@dataclass(frozen=True)
class CalibrateSettings:
    """The model, one target, and the data; by default the data that it was trained with, if they are known."""

    model: tyro.conf.Positional[str]
    """folder of a saved model, or user/name on the Hub"""
    budget: float | None = None
    """target: mean multiply-accumulates per image, such as 5e6"""
    milliseconds: float | None = None
    """target: mean milliseconds per image, one image at a time, measured on this machine"""
    p95_milliseconds: float | None = None
    """target: 95th percentile of the milliseconds per image, measured likewise"""
    accuracy: float | None = None
    """target: accuracy in percent, at the lowest cost"""
    measure: Literal["probability", "margin", "entropy", "agreement"] = "probability"
    """measure of certainty that is compared with the thresholds"""
    output: str = ""
    """folder for policy.json; by default the model's"""
    data: DataConfig = field(default_factory=DataConfig)
    """the data set, whose validation split is used"""
    batch_size: int = 256
    """images per batch"""
    seed: int = 0
    """seed of the division of the images into two halves"""
    json: bool = False
    """print one JSON object instead of a table"""


def calibrate(arguments: Sequence[str]) -> None:
    """Choose thresholds on one half of the validation split, save them, and print what they do on the other half."""
    settings = parse_with_data(CALIBRATE, arguments)
    target = {name: getattr(settings, name) for name in _TARGETS if getattr(settings, name) is not None}
    if len(target) != 1:
        raise UsageError(
            "give one target: --budget MACS, --milliseconds TIME, --p95-milliseconds TIME or --accuracy PERCENT."
        )
    folder = Path(settings.output or settings.model)
    if not settings.output and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: give --output, the folder for policy.json.")

    from hierens.inference import calibration
    from hierens.inference.expectation import expectation, expectations_of_depths
    from hierens.inference.policies import save_policy
    from hierens.models.loading import from_pretrained

    with json_output(settings.json) as write_json:
        model = from_pretrained(settings.model)
        answers = calibration.collect(model, held_out_batches(model, settings, CALIBRATE.given(arguments)), timed=True)
        chosen_on, rest = answers.halves(settings.seed)
        policy = calibration.calibrate(model, chosen_on, measure=settings.measure, **target)
        expected, depths = expectation(rest, policy), expectations_of_depths(rest)
        file = save_policy(policy, folder)
        if settings.json:
            record = {"model": settings.model, "target": target, "file": str(file), "policy": policy.to_dict()}
            measured = {"expected": _record(expected), "depths": [_record(one) for one in depths]}
            write_json({**record, "calibration_images": len(chosen_on.labels), **measured})
            return
        print_table(("", model.unit, "MACs (M)", "milliseconds", "p95", "accuracy (%)"), _rows(depths, expected))
        print(
            f"\nThresholds were chosen on {len(chosen_on.labels):,} images; the table is about the other "
            f"{expected.images:,}: mean per image ± standard error\nover these images. Milliseconds: one image at a "
            f"time on this machine, and their 95th percentile;\ntheir errors include those of the measured times."
            f"\nwrote {file}"
        )


def _rows(depths: Iterable[Expectation], expected: Expectation) -> list[tuple[str, ...]]:
    """A row per depth if all images leave there, and one of the policy, whose costs differ between images."""
    rows = [(f"depth {depth}", one) for depth, one in enumerate(depths)]
    return [_row(name, one) for name, one in [*rows, ("policy", expected)]]


def _row(name: str, found: Expectation) -> tuple[str, ...]:
    assert found.milliseconds is not None and found.p95_milliseconds is not None
    macs, error = (value / 1e6 for value in found.macs)
    cells = [f"{found.leaves.mean:.0f}", f"{macs:.2f}"]
    if name == "policy":
        cells = [f"{found.leaves.mean:.2f} ± {found.leaves.error:.2f}", f"{macs:.2f} ± {error:.2f}"]
    cells += [f"{mean:.3f} ± {error:.3f}" for mean, error in (found.milliseconds, found.p95_milliseconds)]
    return (name, *cells, f"{found.accuracy.mean:.2f} ± {found.accuracy.error:.2f}")


def _record(found: Expectation) -> dict[str, object]:
    """Plain values; every estimate has a mean and its standard error."""
    names = ("mean", "standard_error")
    values = {name: value for name, value in vars(found).items() if name != "images"}
    return {"images": found.images, **{name: dict(zip(names, value, strict=True)) for name, value in values.items()}}


CALIBRATE = Command(
    "calibrate",
    "choose thresholds for a mean cost or an accuracy, and save them beside the model",
    CalibrateSettings,
    calibrate,
    "MODEL",
    often=(
        *("MODEL", *_TARGETS, "measure", "output", "dataset", "data_dir", "val_split", "workers", "batch_size"),
        *("seed", "json"),
    ),
    examples=(
        "hierens calibrate runs/demo/model --budget 5e6",
        "hierens calibrate runs/demo/model --accuracy 60",
        "hierens calibrate user/name --data-dir DIR --milliseconds 3 --output calibrated",
    ),
)
