"""Networks as timm entry points: ensembles by `timm.create_model("hne", ...)`, and backbones for small images.

Importing this module registers them, so `import hierens` is all that `timm.create_model` needs to load a saved model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from hierens.ensemble import HierarchicalEnsemble, hierensify

__all__ = ["hne", "resnet8_cifar", "resnet14_cifar", "resnet20_cifar", "resnet56_cifar"]

_CIFAR = {
    "input_size": (3, 32, 32),
    "num_classes": 10,
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "first_conv": "conv1",
    "classifier": "fc",
}
default_cfgs = generate_default_cfgs(
    {
        "resnet8_cifar": _CIFAR,
        "resnet14_cifar": _CIFAR,
        "resnet20_cifar": _CIFAR,
        "resnet56_cifar": _CIFAR,
        "hne": {"num_classes": 1000, "input_size": (3, 224, 224)},
    }
)

_TIMM_ONLY = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # for timm's builder, not for a backbone


class CifarResNet(ResNet):
    """timm's ResNet as He et al. (2015, section 4.2) build it for small images: 3x3 stem, three stages, no pooling."""

    def __init__(self, channels: Sequence[int] = (16, 32, 64), in_chans: int = 3, **kwargs: Any) -> None:
        """Take timm's `ResNet` arguments; `channels` are the three stages' widths."""
        width = channels[0]
        super().__init__(
            BasicBlock, channels=tuple(channels), in_chans=in_chans, stem_type="deep", stem_width=width // 2, **kwargs
        )
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = self.layer4 = nn.Identity()  # called by timm's forward pass
        for info in self.feature_info:
            info["reduction"] = max(1, info["reduction"] // 4)


def _cifar_resnet(variant: str, pretrained: bool, blocks_per_stage: int, **kwargs: Any) -> nn.Module:
    layers = (blocks_per_stage,) * 3
    return build_model_with_cfg(CifarResNet, variant, pretrained, **{"layers": layers, "num_classes": 10, **kwargs})


@register_model
def resnet8_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """He et al.'s CIFAR ResNet with 6n + 2 = 8 layers; `channels=(16, 32, 64)` sets its width."""
    return _cifar_resnet("resnet8_cifar", pretrained, 1, **kwargs)


@register_model
def resnet14_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """He et al.'s CIFAR ResNet with 14 layers."""
    return _cifar_resnet("resnet14_cifar", pretrained, 2, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """He et al.'s CIFAR ResNet with 20 layers."""
    return _cifar_resnet("resnet20_cifar", pretrained, 3, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """He et al.'s CIFAR ResNet with 56 layers."""
    return _cifar_resnet("resnet56_cifar", pretrained, 9, **kwargs)


@register_model
def hne(pretrained: bool = False, **kwargs: Any) -> HierarchicalEnsemble:
    """Any backbone as a hierarchical ensemble, from plain values: how saved models are made again.

    Args:
        pretrained: load the weights that `pretrained_cfg` points to; timm sets that for `local-dir:` and `hf-hub:`.
        kwargs: `backbone` (a timm name), `backbone_args`, `blocks` or `at` and `branching`, `leaves`, `init`, `seed`,
            and what the backbone takes: `num_classes`, `in_chans`, ...
    """
    kwargs.setdefault("init", "copy" if pretrained else "reinit")
    if not pretrained and not kwargs.get("pretrained_cfg"):
        return _grown(**{k: v for k, v in kwargs.items() if k not in _TIMM_ONLY})
    return build_model_with_cfg(_grown, "hne", pretrained, **kwargs)


def _grown(
    backbone: str,
    backbone_args: dict[str, Any] | None = None,
    blocks: int = 4,
    at: Sequence[str] | None = None,
    branching: Sequence[int] | None = None,
    leaves: int | None = None,
    init: Literal["copy", "reinit"] = "copy",
    seed: int | None = None,
    looped: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> HierarchicalEnsemble:
    network = timm.create_model(backbone, **{**(backbone_args or {}), **kwargs})
    return hierensify(network, blocks, init=init, at=at, branching=branching, leaves=leaves, seed=seed, looped=looped)
