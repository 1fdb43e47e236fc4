"""Exports models to other runtimes: a graph per depth, weights that are stored once, and a manifest.

`export` writes a folder with `depth_0.onnx`, `depth_1.onnx`, ... (`.xml` for OpenVINO, `.pte` for ExecuTorch, `.pt2`
for torch.export), the manifest `export.json` and, for ONNX and OpenVINO, `weights.bin`, which all graphs read. With a
policy, it writes one graph of all depths with its weights, `model.onnx`, and the manifest.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hierens.core.adaptive_base import AdaptiveBase
from hierens.core.atomic_files import saving
from hierens.core.errors import did_you_mean, first_line
from hierens.core.install import install_command
from hierens.core.labels import label_names
from hierens.core.modes import evaluating
from hierens.core.progress import with_progress
from hierens.core.version import __version__
from hierens.export import early_exit
from hierens.export.formats import FORMATS, INPUT, OUTPUT, Format, Run
from hierens.export.graphs import for_inference, graph
from hierens.inference.confidence import Confidence
from hierens.inference.policy import Policy

MANIFEST = "export.json"
_WRITTEN = (MANIFEST, "weights.bin", early_exit.FILE, *(f"depth_*{kind.suffix}" for kind in FORMATS.values()))
TOLERANCE = 1e-4  # of the largest logit
_TOLERANCE_INT8 = 0.5  # of the largest logit: larger differences are errors, not caused by quantisation
_PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
_ELSEWHERE = {
    "plain": "'torch-export' writes plain PyTorch modules that load without hierens; a depth to train on is "
    "model.at_depth(b).save_pretrained(directory)",
    "torchscript": "PyTorch has deprecated it: its successor is 'torch-export'",
}

__all__ = ["ExportError", "export"]


class ExportError(ValueError):
    """A model cannot be exported as requested."""


def export(
    model: AdaptiveBase,
    directory: str | Path,
    format: str = "onnx",
    depths: Literal["all"] | Sequence[int] = "all",
    *,
    policy: Policy | None = None,
    size: tuple[int, int, int] | None = None,
    check: bool = True,
    quantize: Literal["int8"] | None = None,
    calibration: Iterable[Any] | None = None,
) -> Path:
    """Write a graph per depth for another runtime, from images (N, C, H, W) to logits (N, classes, ...); N is dynamic.

    With a policy, write one graph of all depths instead, which computes only what the policy chooses.

    The graphs compute in single precision, batch norms are folded, and a graph contains only what its depth needs. With
    ONNX and OpenVINO, all graphs read one file of weights, which has the size of the largest depth's.

    Args:
        model: in either mode, on any device; it is not changed.
        directory: created if missing; files of an earlier export are removed from it.
        format: `onnx`, `openvino`, `torch-export` or `executorch` (at most 8 images at a time).
        depths: the depths to export.
        policy: `Confidence`, with which each image leaves inside the graph, or `FixedDepth`, with which the depth is an
            input of the graph; for ONNX. The other outputs are the networks and the MACs of each image.
        size: of an image, (C, H, W), by default that of `pretrained_cfg`. Height and width are fixed in the graphs.
        check: compare the outputs of every graph with the model's, to 1e-4 of the largest logit. If the runtime is not
            installed, a warning is issued instead.
        quantize: `int8` for 8-bit integers, per channel (ONNX only). The outputs are then close, not equal: they are
            compared on the first batch of `calibration`, and the manifest gives the difference.
        calibration: batches of images as input of the model, alone or with labels, from which the ranges of activations
            are measured; a few hundred images are enough.

    Returns:
        The directory.

    Raises:
        ExportError: a format, depth or size is not possible, a package is missing, the model cannot be written as a
            graph, or a graph's outputs differ from the model's; the directory is then unchanged.

    Examples:
        >>> import tempfile, timm, hierens
        >>> model = hierens.hierensify(timm.create_model("resnet8_cifar", num_classes=10), blocks=2)
        >>> folder = model.export(tempfile.mkdtemp(), format="torch-export")
        >>> sorted(file.name for file in folder.iterdir())
        ['depth_0.pt2', 'depth_1.pt2', 'export.json']
    """
    kind = _format(format)
    chosen = _depths(model, depths)
    size, output = _sizes(model, size)
    noise = _noise(size)
    batches = [] if quantize is None else _calibration(format, quantize, calibration)
    if policy is not None and (format != "onnx" or depths != "all" or quantize is not None):
        raise ExportError("policy is for format='onnx' with all depths and without quantize.")
    # No file of an earlier export may remain: its weights have other offsets.
    with saving(directory, replaces=_WRITTEN) as partial, tempfile.TemporaryDirectory(dir=partial) as scratch:
        first = partial if quantize is None else Path(scratch)
        if policy is not None:
            differences = _write_with_policy(model, policy, partial, size, noise if check else [])
        else:
            written = _write(model, kind, first, chosen, size, kind.separate or quantize is not None)
            differences = _compare_files(model, written, chosen, noise, TOLERANCE) if check else {}
        if quantize is not None:
            from hierens.export.quantization import quantized

            written = quantized(written, partial, [_name(kind, depth) for depth in reversed(chosen)], batches)
            differences = _compare_files(model, written, chosen, batches[:1], _TOLERANCE_INT8) if check else {}
        manifest = _manifest(model, format, kind, chosen, (size, output), differences, quantize)
        if policy is not None:
            manifest |= {"policy": policy.to_dict(), "weights": None}
            manifest["depths"] = [{**row, "file": early_exit.FILE} for row in manifest["depths"]]
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2))
    return Path(directory)


def _format(name: str) -> type[Format]:
    if name not in FORMATS:
        known = ", ".join(map(repr, FORMATS))
        hint = _ELSEWHERE.get(name, f"choose from {known}{did_you_mean(name, FORMATS)}")
        raise ExportError(f"there is no format {name!r}: {hint}.")
    if missing := FORMATS[name].missing():
        extra = name if name == "executorch" else "export"
        raise ExportError(f"exporting to {name} needs {' and '.join(missing)}: {install_command(extra)}.")
    return FORMATS[name]


def _depths(model: AdaptiveBase, depths: Literal["all"] | Sequence[int]) -> list[int]:
    if depths == "all":
        return list(range(model.depths))
    if isinstance(depths, str) or not depths or any(type(d) is not int or not 0 <= d < model.depths for d in depths):
        raise ExportError(f"depths must be 'all' or some of 0 to {model.depths - 1}, got {depths!r}.")
    return sorted(set(depths))


def _sizes(model: AdaptiveBase, size: tuple[int, ...] | None) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """The size of an image, checked by running the model, and that of its logits."""
    try:
        found = model.image_size(size)
    except ValueError as error:
        raise ExportError(str(error)) from error
    try:
        with torch.no_grad(), evaluating(model):
            logits = model(_as_input(model, torch.zeros(2, *found)), depth=0)
    except Exception as error:
        raise ExportError(f"the model does not take images of size {found}: {first_line(error)}") from error
    return found, tuple(logits.shape[1:])


def _calibration(format: str, quantize: str, calibration: Iterable[Any] | None) -> list[Tensor]:
    """The batches of images from which ranges are measured."""
    if quantize != "int8":
        raise ExportError(f"quantize must be 'int8' or None, got {quantize!r}.")
    if format != "onnx":
        raise ExportError(f"quantize='int8' is for format='onnx', not {format!r}.")
    if find_spec("onnxruntime") is None:
        raise ExportError(f"quantize='int8' needs onnxruntime: {install_command('export')}.")
    batches = [batch[0] if isinstance(batch, (tuple, list)) else batch for batch in calibration or ()]
    if not batches or not all(isinstance(batch, Tensor) and batch.ndim == 4 for batch in batches):
        raise ExportError("quantize='int8' needs calibration=batches of images (N, C, H, W), alone or with labels.")
    return batches


def _write(
    model: AdaptiveBase, kind: type[Format], folder: Path, depths: list[int], size: tuple[int, ...], separate: bool
) -> Format:
    written = kind(folder)
    plain = for_inference(model)
    steps = with_progress(depths[::-1], len(depths), "writing graphs")
    for depth in steps:  # the weights of a small depth are part of those of a larger one
        try:
            written.write(graph(plain, depth, size, separate, kind.largest_batch), _name(kind, depth), size)
        except Exception as error:
            raise ExportError(f"depth {depth} cannot be written as a graph: {_reason(error)}") from error
    written.finish()
    return written


def _write_with_policy(
    model: AdaptiveBase, policy: Policy, folder: Path, size: tuple[int, ...], batches: list[Tensor]
) -> dict[int, float]:
    """Write one graph of all depths; returns its differences from the model's outputs on some images."""
    try:
        early_exit.write(model, policy, folder, size)
    except Exception as error:
        raise ExportError(f"the model with this policy cannot be written as a graph: {_reason(error)}") from error
    if not batches or not _can_run("onnxruntime"):
        return {}
    run, depths = early_exit.runner(folder), list(range(model.depths))
    found = _compare(
        model, lambda depth: early_exit.at_depth(run, policy, depth, len(depths)), depths, batches, TOLERANCE
    )
    rows = early_exit.difference_of_rows(model, policy, run, batches[0]) if isinstance(policy, Confidence) else 0
    if not rows <= TOLERANCE:
        raise ExportError(f"where images leave at several depths, outputs differ by {rows:.1e} of the largest logit.")
    return found


def _reason(error: BaseException) -> str:
    """The first line of the error's innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _compare_files(
    model: AdaptiveBase, written: Format, depths: list[int], batches: list[Tensor], tolerance: float
) -> dict[int, float]:
    """`_compare` of the graphs in files of their own."""
    if not _can_run(written.runs_with):
        return {}
    return _compare(model, lambda depth: written.runner(_name(type(written), depth)), depths, batches, tolerance)


def _can_run(package: str | None) -> bool:
    """Whether the runtime is installed; warns if not."""
    if found := package is None or find_spec(package) is not None:
        return found
    warnings.warn(f"{package} is not installed: the exported graphs were not compared.", stacklevel=4)
    return False


def _compare(
    model: AdaptiveBase, runner: Callable[[int], Run], depths: list[int], batches: list[Tensor], tolerance: float
) -> dict[int, float]:
    """The difference of each depth's outputs from the model's on some images, relative to the largest logit.

    Raises:
        ExportError: a difference is larger than the tolerance, or a graph does not run.
    """
    found = {}
    for depth in with_progress(depths, len(depths), "comparing graphs"):
        try:
            run = runner(depth)
            found[depth] = max(_difference(model, run, depth, images) for images in batches)
        except Exception as error:
            raise ExportError(f"the graph of depth {depth} does not run: {first_line(error)}") from error
        if not found[depth] <= tolerance:
            raise ExportError(
                f"the exported outputs of depth {depth} differ from the model's by {found[depth]:.1e} of the largest "
                f"logit, more than {tolerance:.0e}: choose another format."
            )
    return found


@torch.no_grad()
def _difference(model: AdaptiveBase, run: Run, depth: int, images: Tensor) -> float:
    with evaluating(model):
        own = model(_as_input(model, images), depth=depth).float().cpu()
    theirs = torch.from_numpy(run(images.float().cpu().numpy()))
    if theirs.shape != own.shape:
        raise ValueError(f"it returns {tuple(theirs.shape)} where the model returns {tuple(own.shape)}.")
    return float((theirs - own).abs().max() / own.abs().max().clamp_min(1e-12))


def _noise(size: tuple[int, ...]) -> list[Tensor]:
    """Random images, in batches of other sizes than that with which graphs are traced."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, *size, generator=generator) for batch in (3, 1)]


def _as_input(model: AdaptiveBase, images: Tensor) -> Tensor:
    """Images with the device and type of the model's weights."""
    like = next(model.parameters())
    return images.to(like.device, like.dtype)


def _name(kind: type[Format], depth: int) -> str:
    return f"depth_{depth}{kind.suffix}"


def _manifest(
    model: AdaptiveBase,
    format: str,
    kind: type[Format],
    depths: list[int],
    sizes: tuple[tuple[int, int, int], tuple[int, ...]],
    differences: dict[int, float],
    quantize: str | None,
) -> dict[str, Any]:
    size, output = sizes
    cfg, macs = model.pretrained_cfg, model.macs(size)
    tools = ["torch", *kind.writes_with]
    return {
        "hierens": __version__,
        "architecture": model.architecture,
        "backbone": model.arguments()["backbone"],
        "format": format,
        "quantize": quantize,
        "weights": kind.weights,
        "largest_batch": kind.largest_batch,
        "input": {"name": INPUT, "shape": ["batch", *size], "dtype": "float32"},
        "output": {"name": OUTPUT, "shape": ["batch", *output], "dtype": "float32"},
        "preprocessing": {key: cfg[key] for key in _PREPROCESSING if key in cfg},
        "label_names": label_names(model),
        "depths": [
            {
                "depth": depth,
                "file": _name(kind, depth),
                model.unit: model.sizes[depth],
                "macs": macs[depth],
                "difference": differences.get(depth),
            }
            for depth in depths
        ],
        "made_with": {tool: version(tool) for tool in tools},
    }
