"""Compares one ONNX graph with early exits to a graph per depth called from outside: latency of one image, and size.

python benchmarks/onnx_exit.py      writes docs/results/onnx_exit.md

The weights are not trained, since the time does not depend on them: thresholds of -1 and 2 choose where images leave.
"""

from __future__ import annotations

import os
import platform
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
import tyro
from alternating import Run, alternating

import hierens
from hierens.evaluation.profiling import millions, table
from hierens.inference.policies import EVERYBODY, NOBODY, Confidence

PAGE = Path(__file__).parents[1] / "docs" / "results" / "onnx_exit.md"
MODELS = ("hne_resnet50_cifar_small", "hne_mobilenetv2_075")


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    rounds: int = 100
    """rounds of measurements; every way is run once per round"""
    models: tuple[str, ...] = MODELS
    """timm names of trees"""


def main(settings: Settings) -> None:
    """Export each model both ways, measure, and write the page."""
    torch.set_num_threads(1)
    parts = [section(name, settings.rounds) for name in settings.models]
    PAGE.write_text(page(parts, settings))
    print(f"wrote {PAGE}")


def section(name: str, rounds: int) -> str:
    """The results of one model."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    model.break_symmetry()
    with tempfile.TemporaryDirectory() as scratch:
        one, several = (Path(scratch) / kind for kind in ("one", "several"))
        model.export(one, policy=Confidence((0.5,)))
        model.export(several)
        ways = _ways(model, one, several)
        times = {way: list(map(median, each)) for way, each in alternating(ways, rounds + 5, skipped=5).items()}
        size = (one / "model.onnx").stat().st_size / sum(4 * own.numel() for own in model.parameters())
    inside, outside, alone = (times[way] for way in ("inside", "outside", "alone"))
    macs = model.macs()
    saved = [""] * model.depths
    for depth in range(model.depths - 1):
        saved[depth] = f"{(1 - inside[depth] / min(alone[-1], inside[-1])) / (1 - macs[depth] / macs[-1]):.0%}"
    rows = [
        (f"{n} {model.unit}", millions(m), *(f"{t:.2f}" for t in (i, o, a)), f"{i / o:.2f}", f"{i / a:.2f}", s)
        for n, m, i, o, a, s in zip(model.sizes, macs, inside, outside, alone, saved, strict=True)
    ]
    rows.append(
        ("mean", "", *(f"{mean(t):.2f}" for t in (inside, outside, alone)), *_ratios(inside, outside, alone), "")
    )
    header = (
        "left after",
        "MACs",
        "one graph",
        "called from outside",
        "the depth alone",
        "to outside",
        "to alone",
        "time saved",
    )
    return f"## {name}\n\n{table(header, rows)}\n\n`model.onnx` has {size:.3f} times the size of the weights."


def _ratios(inside: list[float], outside: list[float], alone: list[float]) -> tuple[str, str]:
    return f"{mean(inside) / mean(outside):.2f}", f"{mean(inside) / mean(alone):.2f}"


def _session(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _ways(model: Any, one: Path, several: Path) -> dict[str, list[Run]]:
    """For every depth, ways to run one image that leaves there."""
    graph = _session(one / "model.onnx")
    depths = [_session(several / f"depth_{depth}.onnx") for depth in range(model.depths)]
    images = np.random.default_rng(0).standard_normal((1, *model.image_size()), np.float32)
    found: dict[str, list[Run]] = {"inside": [], "outside": [], "alone": []}
    for depth in range(model.depths):
        thresholds = np.float32([NOBODY] * depth + [EVERYBODY] * (model.depths - 1 - depth))
        found["inside"].append(lambda t=thresholds: graph.run(None, {"images": images, "thresholds": t}))
        found["outside"].append(lambda t=(*thresholds, EVERYBODY): _from_outside(depths, t, images))
        found["alone"].append(lambda own=depths[depth]: own.run(None, {"images": images}))
    return found


def _from_outside(depths: list[Any], thresholds: tuple[float, ...], images: Any) -> Any:
    """The logits of the first depth that is certain enough; each depth begins from the image."""
    for session, threshold in zip(depths, thresholds, strict=True):
        logits = session.run(None, {"images": images})[0]
        probabilities = np.exp(logits - logits.max())
        if probabilities.max() / probabilities.sum() >= threshold:
            break
    return logits


def page(parts: list[str], settings: Settings) -> str:
    """The results page."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnx", "onnxruntime"))
    sections = "\n\n".join(parts)
    return f"""# One ONNX graph with early exits

[One graph](../how-to/export.md#one-onnx-graph-with-early-exits) in which an image leaves by confidence, compared with a
graph per depth: *called from outside* runs depth 0, 1, ... until the prediction is certain enough, and computes
everything anew each time; *the depth alone* is the graph of the depth at which the image leaves, which nobody could
choose in advance. Milliseconds for one image, medians of {settings.rounds} rounds in which each way is run once, one
thread. *Time saved* is the share of the saved MACs that is saved time, compared with the fastest way to run all
networks. The mean is over images that leave equally often at every depth.

{sections}

## How to repeat it

```bash
python benchmarks/onnx_exit.py
```

hierens {hierens.__version__}, {packages}, Python {platform.python_version()}, {platform.machine()},
{os.cpu_count()} cores. The weights are not trained: thresholds of -1 and 2 choose where the image leaves.
"""


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
