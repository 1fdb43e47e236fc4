"""Networks as timm entry points: the paper's own, ensembles of any backbone (`hne`), and backbones for small images.

Importing this module registers them, so `import hierens` is all that `timm.create_model` needs to load a saved model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import timm
from timm.layers import get_norm_layer
from timm.models import MobileNetV3, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def, resolve_act_layer, resolve_bn_args
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, downsample_conv
from torch import nn

from hierens.models.conversion import hierensify
from hierens.models.ensemble import HierarchicalEnsemble
from hierens.models.multi_exit import MultiExit
from hierens.models.multi_exit import multi_exit as with_exits
from hierens.models.tree_exits import TreeWithExits, tree_with_exits

__all__ = [
    "hne",
    "hne_exits",
    "hne_mobilenetv2_075",
    "hne_resnet50_cifar",
    "hne_resnet50_cifar_small",
    "mobilenetv2_075_lean",
    "resnet8_cifar",
    "resnet14_cifar",
    "resnet20_cifar",
    "resnet50dw_cifar",
    "resnet50dw_cifar_small",
    "resnet56_cifar",
]

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
_CIFAR_DEPTHWISE = {**_CIFAR, "first_conv": "conv1.0"}
_MOBILENET = {
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "first_conv": "conv_stem",
    "classifier": "classifier",
}
_ENSEMBLE = {"num_classes": 1000, "input_size": (3, 224, 224)}
_CIFAR_ENSEMBLE = {"num_classes": 10, "input_size": (3, 32, 32)}
default_cfgs = generate_default_cfgs(
    {
        "resnet8_cifar": _CIFAR,
        "resnet14_cifar": _CIFAR,
        "resnet20_cifar": _CIFAR,
        "resnet56_cifar": _CIFAR,
        "resnet50dw_cifar": _CIFAR_DEPTHWISE,
        "resnet50dw_cifar_small": _CIFAR_DEPTHWISE,
        "mobilenetv2_075_lean": _MOBILENET,
        "hne": _ENSEMBLE,
        "hne_exits": _ENSEMBLE,
        "hne_mobilenetv2_075": _ENSEMBLE,
        "hne_resnet50_cifar": _CIFAR_ENSEMBLE,
        "hne_resnet50_cifar_small": _CIFAR_ENSEMBLE,
    }
)

_OF_TREES = ("blocks", "head", "at", "branching", "leaves", "init", "seed", "looped")
_TIMM_ONLY = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # for timm's builder, not for a backbone


class CifarResNet(ResNet):
    """timm's ResNet as He et al. (2015, section 4.2) build it for small images: 3x3 stem, three stages, no pooling."""

    def __init__(
        self, channels: Sequence[int] = (16, 32, 64), in_chans: int = 3, stem_stride: int = 1, **kwargs: Any
    ) -> None:
        """Take timm's `ResNet` arguments; `channels` are the stages' widths, `stem_stride` 2 makes it cheaper."""
        width = channels[0]
        super().__init__(
            BasicBlock, channels=tuple(channels), in_chans=in_chans, stem_type="deep", stem_width=width // 2, **kwargs
        )
        self.conv1 = nn.Conv2d(in_chans, width, 3, stem_stride, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = self.layer4 = nn.Identity()  # called by timm's forward pass
        for info in self.feature_info:
            info["reduction"] = stem_stride * max(1, info["reduction"] // 4)


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


class DepthwiseBottleneck(Bottleneck):
    """timm's bottleneck with a depthwise 3x3 convolution; the 1x1 that follows it mixes the channels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take timm's `Bottleneck` arguments."""
        super().__init__(*args, **kwargs)
        dense: nn.Conv2d = self.get_submodule("conv2")
        width = dense.out_channels
        self.conv2 = nn.Conv2d(width, width, 3, dense.stride, dense.padding, groups=width, bias=False)  # type: ignore[arg-type]


class DepthwiseCifarResNet(ResNet):
    """The base network of Ruiz & Verbeek's ResNet ensembles (arXiv 2003.01474, Table 2): `resnet50dw_cifar`."""

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 4, 5),
        channels: Sequence[int] = (16, 32, 64, 64),
        in_chans: int = 3,
        zero_init_last: bool = True,
        **kwargs: Any,
    ) -> None:
        """Take timm's `ResNet` arguments; `channels` are the stages' bottleneck widths, a quarter of their outputs."""
        width = channels[0]
        super().__init__(
            DepthwiseBottleneck,
            tuple(layers),
            channels=tuple(channels),
            in_chans=in_chans,
            stem_type="deep",
            stem_width=2 * width,
            **kwargs,
        )
        norm = get_norm_layer(kwargs.get("norm_layer") or nn.BatchNorm2d)
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_chans, width, 3, padding=1, bias=False),
            norm(width),
            type(self.act1)(inplace=True),
            nn.Conv2d(width, 4 * width, 1, bias=False),
        )
        self.maxpool = nn.Identity()
        for stage, stride in zip((self.layer1, self.layer2, self.layer3, self.layer4), (1, 2, 2, 1), strict=True):
            first = stage[0]
            first.stride, first.conv2.stride = stride, (stride, stride)
            first.downsample = downsample_conv(
                first.conv1.in_channels, first.conv3.out_channels, 1, stride, norm_layer=norm
            )
        self.init_weights(zero_init_last=zero_init_last)
        for info, reduction in zip(self.feature_info, (1, 1, 2, 4, 4), strict=True):
            info["reduction"] = reduction


@register_model
def resnet50dw_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """One network of `hne_resnet50_cifar`: a ResNet of 16 depthwise bottlenecks for 32x32 images (Table 2).

    Where the table leaves room:

    - "A depth-wise separable 3x3 convolution" in a bottleneck is taken as a depthwise one, the bottleneck's own 1x1
      being the pointwise half: section 4.1 says "depth-wise instead of regular", and only so are there 50 layers.
    - Every layer that branches is said to have the structure of a ResNet's shortcut block, so its shortcut is a
      convolution even where the shape does not change.
    - Block 4 is given stride 2 and yet 8x8 pixels before and after; it has stride 1 here. With stride 2 even all 16
      networks would stay below the 250 M MACs for the sake of which the paper plots no more than 8.
    """
    return build_model_with_cfg(DepthwiseCifarResNet, "resnet50dw_cifar", pretrained, **{"num_classes": 10, **kwargs})


@register_model
def resnet50dw_cifar_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`resnet50dw_cifar` with every layer's channels halved (section 4.2)."""
    defaults = {"num_classes": 10, "channels": (8, 16, 32, 32)}
    return build_model_with_cfg(DepthwiseCifarResNet, "resnet50dw_cifar_small", pretrained, **{**defaults, **kwargs})


@register_model
def mobilenetv2_075_lean(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """One network of `hne_mobilenetv2_075`: MobileNetV2 at width 0.75 with a lighter stem and head (Table 3).

    It differs from timm's `mobilenetv2_075` as the table does: a stem of 16 channels and a 1x1 convolution in place
    of the first depthwise separable layer, and behind the last inverted residual a 1x1 convolution to 720 channels,
    pooling and a linear layer to 1280, MobileNetV3's order. The table gives no expansion ratio: it is MobileNetV2's 6,
    since the layers are "the same" as in the original.
    """
    stages = [
        ["cn_r1_k1_s1_c16"],
        ["ir_r2_k3_s2_e6_c24"],
        ["ir_r3_k3_s2_e6_c24"],
        ["ir_r4_k3_s2_e6_c48"],
        ["ir_r3_k3_s1_e6_c72"],
        ["ir_r3_k3_s2_e6_c120"],
        ["cn_r1_k1_s1_c720"],
    ]
    norm = kwargs.pop("norm_layer", None) or partial(nn.BatchNorm2d, **resolve_bn_args(kwargs))
    defaults = {
        "block_args": decode_arch_def(stages),
        "stem_size": 16,
        "fix_stem": True,
        "num_features": 1280,
        "norm_layer": norm,
        "act_layer": resolve_act_layer(kwargs, "relu6"),
        "feature_cfg": {"flatten_sequential": True},  # for timm's features_only
    }
    return build_model_with_cfg(MobileNetV3, "mobilenetv2_075_lean", pretrained, **{**defaults, **kwargs})


@register_model
def hne_mobilenetv2_075(pretrained: bool = False, **kwargs: Any) -> HierarchicalEnsemble:
    """The paper's ImageNet ensemble: 8 networks `mobilenetv2_075_lean` in 4 blocks (arXiv 2003.01474, Table 3).

    Args:
        pretrained: there are no published weights: True is an error, but with a `pretrained_cfg_overlay` of one's own.
        kwargs: as for `hne`; `branching=(1, 1, 1, 8)` or `(8, 1, 1, 1)` shares between other blocks.
    """
    return _paper_network("mobilenetv2_075_lean", ["blocks.2", "blocks.3", "blocks.5"], pretrained, kwargs)


@register_model
def hne_resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> HierarchicalEnsemble:
    """The paper's CIFAR ensemble: 16 networks `resnet50dw_cifar` in 5 blocks (arXiv 2003.01474, Table 2).

    Args:
        pretrained: as for `hne_mobilenetv2_075`.
        kwargs: as for `hne`; `num_classes` is 10 by default.
    """
    return _paper_network("resnet50dw_cifar", ["layer1", "layer2", "layer3", "layer4"], pretrained, kwargs)


@register_model
def hne_resnet50_cifar_small(pretrained: bool = False, **kwargs: Any) -> HierarchicalEnsemble:
    """`hne_resnet50_cifar` with every layer's channels halved: the paper's HNE_small (section 4.2).

    Args:
        pretrained: as for `hne_mobilenetv2_075`.
        kwargs: as for `hne_resnet50_cifar`.
    """
    return _paper_network("resnet50dw_cifar_small", ["layer1", "layer2", "layer3", "layer4"], pretrained, kwargs)


def _paper_network(backbone: str, at: list[str], pretrained: bool, kwargs: dict[str, Any]) -> HierarchicalEnsemble:
    if pretrained and not kwargs.get("pretrained_cfg_overlay"):
        raise ValueError("the paper's networks have no published weights: make them with pretrained=False.")
    return hne(pretrained, **{"backbone": backbone, "at": at, **kwargs})


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


@register_model
def hne_exits(pretrained: bool = False, **kwargs: Any) -> TreeWithExits:
    """Any backbone as a tree with exits, from plain values: how saved models are made again.

    Args:
        pretrained: load the weights that `pretrained_cfg` points to; timm sets that for `local-dir:` and `hf-hub:`.
        kwargs: as for `hne`, and `head`.
    """
    kwargs.setdefault("init", "copy" if pretrained else "reinit")
    if not pretrained and not kwargs.get("pretrained_cfg"):
        return _grown_with_exits(**{k: v for k, v in kwargs.items() if k not in _TIMM_ONLY})
    return build_model_with_cfg(_grown_with_exits, "hne_exits", pretrained, **kwargs)


def _grown_with_exits(backbone: str, backbone_args: dict[str, Any] | None = None, **kwargs: Any) -> TreeWithExits:
    of_tree = {key: kwargs.pop(key) for key in _OF_TREES if key in kwargs}
    network = timm.create_model(backbone, **{**(backbone_args or {}), **kwargs})
    return tree_with_exits(network, **of_tree)


@register_model
def multi_exit(pretrained: bool = False, **kwargs: Any) -> MultiExit:
    """Any backbone with exits on the way, from plain values: how saved models are made again.

    Args:
        pretrained: load the weights that `pretrained_cfg` points to; timm sets that for `local-dir:` and `hf-hub:`.
        kwargs: `backbone` (a timm name), `backbone_args`, what `hierens.multi_exit` takes, `kept` (the exits to keep),
            and what the backbone takes: `num_classes`, `in_chans`, ...
    """
    if not pretrained and not kwargs.get("pretrained_cfg"):
        return _with_exits(**{k: v for k, v in kwargs.items() if k not in _TIMM_ONLY})
    return build_model_with_cfg(_with_exits, "multi_exit", pretrained, **kwargs)


def _with_exits(
    backbone: str,
    backbone_args: dict[str, Any] | None = None,
    exits: int = 4,
    at: Sequence[str] | None = None,
    head: Literal["pool", "conv"] = "pool",
    collaborate: bool = False,
    weights: str | Sequence[float] | None = None,
    learn_weights: bool = False,
    kept: Sequence[int] | None = None,
    **kwargs: Any,
) -> MultiExit:
    network = timm.create_model(backbone, **{**(backbone_args or {}), **kwargs})
    model = with_exits(
        network, exits, at=at, head=head, collaborate=collaborate, weights=weights, learn_weights=learn_weights
    )
    return model if kept is None or len(kept) == model.leaves else model.keep_exits(kept)
