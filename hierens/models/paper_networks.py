"""The networks of the HNE paper (Ruiz & Verbeek, arXiv 2003.01474, Tables 2 and 3), registered with timm."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import get_norm_layer
from timm.models import MobileNetV3, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def, resolve_act_layer, resolve_bn_args
from timm.models.resnet import Bottleneck, ResNet, downsample_conv
from torch import nn

from hierens.models.ensemble import HierarchicalEnsemble
from hierens.models.registry import hne
from hierens.models.small_resnets import CIFAR

__all__ = [
    "hne_mobilenetv2_075",
    "hne_resnet50_cifar",
    "hne_resnet50_cifar_small",
    "mobilenetv2_075_lean",
    "resnet50dw_cifar",
    "resnet50dw_cifar_small",
]

_CIFAR_DEPTHWISE = {**CIFAR, "first_conv": "conv1.0"}
_MOBILENET = {
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "first_conv": "conv_stem",
    "classifier": "classifier",
}
_CIFAR_ENSEMBLE = {"num_classes": 10, "input_size": (3, 32, 32)}
default_cfgs = generate_default_cfgs(
    {
        "resnet50dw_cifar": _CIFAR_DEPTHWISE,
        "resnet50dw_cifar_small": _CIFAR_DEPTHWISE,
        "mobilenetv2_075_lean": _MOBILENET,
        "hne_mobilenetv2_075": {"num_classes": 1000, "input_size": (3, 224, 224)},
        "hne_resnet50_cifar": _CIFAR_ENSEMBLE,
        "hne_resnet50_cifar_small": _CIFAR_ENSEMBLE,
    }
)


class DepthwiseBottleneck(Bottleneck):
    """timm's bottleneck with a depthwise 3x3 convolution; the 1x1 convolution after it mixes the channels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take timm's `Bottleneck` arguments."""
        super().__init__(*args, **kwargs)
        dense: nn.Conv2d = self.get_submodule("conv2")
        width = dense.out_channels
        self.conv2 = nn.Conv2d(width, width, 3, dense.stride, dense.padding, groups=width, bias=False)  # type: ignore[arg-type]


class DepthwiseCifarResNet(ResNet):
    """The base network of the paper's ResNet ensembles (Table 2): `resnet50dw_cifar`."""

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 4, 5),
        channels: Sequence[int] = (16, 32, 64, 64),
        in_chans: int = 3,
        zero_init_last: bool = True,
        **kwargs: Any,
    ) -> None:
        """Create the network.

        Args:
            layers: number of bottlenecks of each stage.
            channels: width of each stage's bottlenecks, a quarter of its outputs.
            in_chans: image channels.
            zero_init_last: initialise the last norm of each bottleneck with zeros.
            kwargs: other arguments of timm's `ResNet`.
        """
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

    Where the table can be read in several ways:

    - "A depth-wise separable 3x3 convolution" in a bottleneck is read as a depthwise convolution, because the
      bottleneck's own 1x1 is the pointwise part: section 4.1 says "depth-wise instead of regular", and only then are
      there 50 layers.
    - According to the paper, every layer that branches has the structure of a ResNet's shortcut block. Its shortcut is
      therefore a convolution even where the shape does not change.
    - Block 4 has stride 2 in the table, but 8x8 pixels before and after it. It has stride 1 here. With stride 2, even
      all 16 networks would cost less than 250 M MACs, the limit because of which the paper plots at most 8.
    """
    return build_model_with_cfg(DepthwiseCifarResNet, "resnet50dw_cifar", pretrained, **{"num_classes": 10, **kwargs})


@register_model
def resnet50dw_cifar_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`resnet50dw_cifar` with half the channels in every layer (section 4.2)."""
    defaults = {"num_classes": 10, "channels": (8, 16, 32, 32)}
    return build_model_with_cfg(DepthwiseCifarResNet, "resnet50dw_cifar_small", pretrained, **{**defaults, **kwargs})


@register_model
def mobilenetv2_075_lean(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """One network of `hne_mobilenetv2_075`: MobileNetV2 at width 0.75 with a lighter stem and head (Table 3).

    The table differs from timm's `mobilenetv2_075`: the stem has 16 channels; a 1x1 convolution replaces the first
    depthwise separable layer; and after the last inverted residual follow a 1x1 convolution to 720 channels, pooling
    and a linear layer to 1280, in MobileNetV3's order. The table gives no expansion ratio. It is MobileNetV2's 6,
    because the layers are "the same" as in the original.
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
    """The paper's ImageNet ensemble: 8 networks `mobilenetv2_075_lean` in 4 blocks (Table 3).

    Args:
        pretrained: only with a `pretrained_cfg_overlay`, because there are no published weights.
        kwargs: as for `hne`; `branching=(1, 1, 1, 8)` or `(8, 1, 1, 1)` shares other blocks.
    """
    return _paper_network("mobilenetv2_075_lean", ["blocks.2", "blocks.3", "blocks.5"], pretrained, kwargs)


@register_model
def hne_resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> HierarchicalEnsemble:
    """The paper's CIFAR ensemble: 16 networks `resnet50dw_cifar` in 5 blocks (Table 2).

    Args:
        pretrained: as for `hne_mobilenetv2_075`.
        kwargs: as for `hne`; `num_classes` is 10 by default.
    """
    return _paper_network("resnet50dw_cifar", ["layer1", "layer2", "layer3", "layer4"], pretrained, kwargs)


@register_model
def hne_resnet50_cifar_small(pretrained: bool = False, **kwargs: Any) -> HierarchicalEnsemble:
    """`hne_resnet50_cifar` with half the channels in every layer: the paper's HNE_small (section 4.2).

    Args:
        pretrained: as for `hne_mobilenetv2_075`.
        kwargs: as for `hne_resnet50_cifar`.
    """
    return _paper_network("resnet50dw_cifar_small", ["layer1", "layer2", "layer3", "layer4"], pretrained, kwargs)


def _paper_network(backbone: str, at: list[str], pretrained: bool, kwargs: dict[str, Any]) -> HierarchicalEnsemble:
    if pretrained and not kwargs.get("pretrained_cfg_overlay"):
        raise ValueError("the paper's networks have no published weights: create them with pretrained=False.")
    return hne(pretrained, **{"backbone": backbone, "at": at, **kwargs})
