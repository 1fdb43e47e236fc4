"""Backbones for small images: the CIFAR ResNets of He et al. (arXiv 1512.03385), registered with timm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

__all__ = ["resnet8_cifar", "resnet14_cifar", "resnet20_cifar", "resnet56_cifar"]

CIFAR = {
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
default_cfgs = generate_default_cfgs(dict.fromkeys(__all__, CIFAR))


class CifarResNet(ResNet):
    """timm's ResNet in the form for small images (section 4.2): a 3x3 stem, three stages and no pooling after it."""

    def __init__(
        self, channels: Sequence[int] = (16, 32, 64), in_chans: int = 3, stem_stride: int = 1, **kwargs: Any
    ) -> None:
        """Create the network.

        Args:
            channels: width of each stage.
            in_chans: image channels.
            stem_stride: 2 makes the network cheaper.
            kwargs: arguments of timm's `ResNet`.
        """
        width = channels[0]
        super().__init__(
            BasicBlock, channels=tuple(channels), in_chans=in_chans, stem_type="deep", stem_width=width // 2, **kwargs
        )
        self.conv1 = nn.Conv2d(in_chans, width, 3, stem_stride, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool, self.layer4 = nn.Identity(), nn.Sequential()  # called by timm's forward pass
        for info in self.feature_info:
            info["reduction"] = stem_stride * max(1, info["reduction"] // 4)

    def forward_intermediates(self, x: Tensor, indices: int | list[int] | None = None, **kwargs: Any) -> Any:
        """As of timm's `ResNet`, without its fourth stage."""
        return super().forward_intermediates(x, self._taken(indices), **kwargs)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, *args: Any, **kwargs: Any) -> list[int]:
        """As of timm's `ResNet`, without its fourth stage."""
        taken: list[int] = super().prune_intermediate_layers(self._taken(indices), *args, **kwargs)
        return taken

    def _taken(self, indices: int | list[int] | None) -> list[int]:
        """Indices of stages from 0; timm would count its fourth stage."""
        stages = range(len(self.feature_info))
        if indices is None or isinstance(indices, int):
            return list(stages[-(indices or 0) :])
        return [stages[index] for index in indices]


def _cifar_resnet(variant: str, pretrained: bool, blocks_per_stage: int, **kwargs: Any) -> nn.Module:
    defaults = {"layers": (blocks_per_stage,) * 3, "num_classes": 10, "feature_cfg": {"out_indices": (0, 1, 2, 3)}}
    return build_model_with_cfg(CifarResNet, variant, pretrained, **{**defaults, **kwargs})


@register_model
def resnet8_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CIFAR ResNet with 6n + 2 = 8 layers; `channels=(16, 32, 64)` sets its width."""
    return _cifar_resnet("resnet8_cifar", pretrained, 1, **kwargs)


@register_model
def resnet14_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CIFAR ResNet with 14 layers."""
    return _cifar_resnet("resnet14_cifar", pretrained, 2, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CIFAR ResNet with 20 layers."""
    return _cifar_resnet("resnet20_cifar", pretrained, 3, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CIFAR ResNet with 56 layers."""
    return _cifar_resnet("resnet56_cifar", pretrained, 9, **kwargs)
