"""Compares exported models with PyTorch: differences of outputs, latency, size, and accuracy of 8-bit models.

python benchmarks/export.py --model DIR --data-dir DIR      writes docs/results/export.md

The model is trained on Fashion-MNIST by `hierens train --preset fashion-mnist`; the data are its idx files.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import onnxruntime
import openvino
import torch
import tyro
from alternating import alternating
from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
from executorch.runtime import Runtime

import hierens
from hierens.evaluation.profiling import millions, table
from hierens.training.config import DataConfig
from hierens.training.data.builtin import fashion_mnist

PAGE = Path(__file__).parents[1] / "docs" / "results" / "export.md"
BATCHES = (1, 8)
CALIBRATION = 512  # images


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    model: str
    """folder of a saved model"""
    data_dir: str
    """folder with Fashion-MNIST's idx files"""
    rounds: int = 200
    """rounds of latency measurements; every way is run once per round"""


def main(settings: Settings) -> None:
    """Export the model in every format, measure, and write the page."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = hierens.from_pretrained(settings.model)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    (train, _), (test, labels) = (_read(settings.data_dir, training, mean, std) for training in (True, False))
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in ("onnx", "openvino", "executorch", "torch-export", "int8")}
        for name, folder in folders.items():
            extra: dict[str, Any] = {"quantize": "int8", "calibration": train[:CALIBRATION].split(64)}
            model.export(folder, "onnx" if name == "int8" else name, **(extra if name == "int8" else {}))
        runs = _runs(model, folders)
        accuracy = {name: [_accuracy(run, test, labels) for run in runs[name]] for name in ("eager", "onnx", "int8")}
        off = {name: [_off(runs[name][d], runs["eager"][d], test) for d in range(model.depths)] for name in folders}
        times = {batch: _times(runs, test[:batch], settings.rounds) for batch in BATCHES}
        sizes = {name: {file.name: file.stat().st_size for file in sorted(f.iterdir())} for name, f in folders.items()}
    PAGE.write_text(page(model, settings, accuracy, off, times, sizes))
    print(f"wrote {PAGE}")


def _read(folder: str, training: bool, mean: Any, std: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 1, 28, 28) as the model takes them, and labels."""
    images, labels = fashion_mnist(DataConfig(dataset="fashion_mnist", data_dir=folder), training)
    return (torch.tensor(images).unsqueeze(1) / 255 - mean) / std, torch.tensor(labels)


Run = Callable[[torch.Tensor], torch.Tensor]


def _runs(model: Any, folders: dict[str, Path]) -> dict[str, list[Run]]:
    """Every way to run each depth, on one thread."""
    fused = model.fuse()
    depths = range(model.depths)
    found: dict[str, list[Run]] = {
        "eager": [lambda x, d=d: model(x, depth=d) for d in depths],
        "fused": [lambda x, d=d: fused(x, depth=d) for d in depths],
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for name in ("onnx", "int8"):
        sessions = [onnxruntime.InferenceSession(folders[name] / f"depth_{d}.onnx", options) for d in depths]
        found[name] = [lambda x, s=s: torch.from_numpy(s.run(None, {"images": x.numpy()})[0]) for s in sessions]
    core, folder = openvino.Core(), folders["openvino"]
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    graphs = [core.read_model(folder / f"depth_{d}.xml", folder / "weights.bin") for d in depths]
    compiled = [core.compile_model(graph, "CPU", settings) for graph in graphs]
    found["openvino"] = [lambda x, c=c: torch.from_numpy(c(x.numpy())[0].copy()) for c in compiled]
    _unsafe_reset_threadpool(1)
    programs = [Runtime.get().load_program(str(folders["executorch"] / f"depth_{d}.pte")) for d in depths]
    methods = [program.load_method("forward") for program in programs]
    found["executorch"] = [lambda x, m=m: _in_parts(m, x) for m in methods]
    modules = [torch.export.load(folders["torch-export"] / f"depth_{d}.pt2").module() for d in depths]
    found["torch-export"] = list(modules)
    return found


def _in_parts(method: Any, images: torch.Tensor) -> torch.Tensor:
    """Run a program with a maximum batch size on many images."""
    return torch.cat([method.execute([part.contiguous()])[0].clone() for part in images.split(BATCHES[-1])])


def _accuracy(run: Run, images: torch.Tensor, labels: torch.Tensor) -> float:
    right = torch.cat([run(batch).argmax(-1) for batch in images.split(250)]) == labels
    return 100 * float(right.double().mean())


def _off(run: Run, eager: Run, images: torch.Tensor) -> float:
    """The largest difference over 500 images, relative to the largest logit."""
    pairs = [(run(batch), eager(batch)) for batch in images[:500].split(100)]
    return float(max((a - b).abs().max() for a, b in pairs) / max(b.abs().max() for _, b in pairs))


def _times(runs: dict[str, list[Run]], images: torch.Tensor, rounds: int) -> dict[str, list[str]]:
    """Milliseconds (10th percentile and median) of all ways and depths, which alternate."""
    ways = {name: [partial(run, images) for run in each] for name, each in runs.items()}
    shown = alternating(ways, rounds, skipped=rounds // 10)
    return {name: [f"{quantiles(t, n=10)[0]:.2f} / {median(t):.2f}" for t in each] for name, each in shown.items()}


def page(model: Any, settings: Settings, accuracy: Any, off: Any, times: Any, sizes: Any) -> str:
    """The results page."""
    header = ("", *(f"depth {d} ({n} {model.unit})" for d, n in enumerate(model.sizes)))

    def rows(values: dict[str, list[Any]], form: str = "") -> str:
        return table(header, [(name, *(format(v, form) for v in each)) for name, each in values.items()])

    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "onnx", "onnxruntime", "openvino", "executorch")
    )
    latency = "\n\n".join(f"Batch {batch}:\n\n{rows(times[batch])}" for batch in BATCHES)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    bytes_ = [
        (name, f"{sum(files.values()) / 1e6:.2f}", f"{files.get('weights.bin', 0) / 1e6:.2f}")
        for name, files in sizes.items()
    ]
    return f"""# Export

A hierarchical ensemble of {model.leaves} networks trained on Fashion-MNIST,
{millions(model.macs()[0])} MACs at depth 0 and {millions(model.macs()[-1])} at the last,
[exported](../how-to/export.md) in every format.

## Differences from PyTorch

Largest difference from PyTorch's eager mode over 500 test images, relative to the largest logit.

{rows(off, ".1e")}

## Size

Size in MB of the folder with all depths and of the shared weights; the model's parameters take {weights / 1e6:.2f} MB.

{table(("", "folder", "weights.bin"), bytes_)}

## Accuracy

On the 10,000 test images, %; `int8` was calibrated on {CALIBRATION} training images.

{rows(accuracy, ".2f")}

## Latency

Milliseconds, 10th percentile / median of {settings.rounds} rounds in which each way is run once, one thread.
`eager` is the trained model, `fused` is `model.fuse()` without tuning, `int8` is ONNX.

{latency}

## How to repeat it

```bash
python benchmarks/export.py --model DIR --data-dir DIR
```

hierens {hierens.__version__}, {packages}, Python {platform.python_version()}, {platform.machine()},
{os.cpu_count()} cores.
"""


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
