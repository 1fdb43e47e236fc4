"""MSDNet (Huang et al., ICLR 2018, arXiv 1703.09844), the multi-exit network of IMTA's authors, registered with timm.

A grid of layers at several scales: the resolution halves and the width grows from each scale to the next. All layers of
a scale are densely connected. A classifier after each block reads the coarsest scale, which exists from the first layer
on, so that also early exits see coarse features. Fine scales end when no later classifier needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from hierens.models.msdnet_layers import Classifier, Maps, Stem, Widths, dense_blocks
from hierens.models.small_resnets import CIFAR

__all__ = [
    "msdnet_cifar_7",
    "msdnet_cifar_10",
    "msdnet_cifar_lin_5",
    "msdnet_cifar_lin_7",
    "msdnet_imagenet_4",
    "msdnet_imagenet_6",
    "msdnet_imagenet_7",
]

_CIFAR = {**CIFAR, "num_classes": 100, "pool_size": (2, 2), "first_conv": "stem.scales.0.0"}
_IMAGENET = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (2, 2),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "stem.scales.0.0",
}


def _exits(count: int) -> tuple[str, ...]:
    return tuple(f"exits.{index}.fc" for index in range(count))


default_cfgs = generate_default_cfgs(
    {
        "msdnet_cifar_7": {**_CIFAR, "classifier": _exits(7)},
        "msdnet_cifar_10": {**_CIFAR, "classifier": _exits(10)},
        "msdnet_cifar_lin_5": {**_CIFAR, "classifier": _exits(5)},
        "msdnet_cifar_lin_7": {**_CIFAR, "classifier": _exits(7)},
        "msdnet_imagenet_4": {**_IMAGENET, "classifier": _exits(5)},
        "msdnet_imagenet_6": {**_IMAGENET, "classifier": _exits(5)},
        "msdnet_imagenet_7": {**_IMAGENET, "classifier": _exits(5)},
    }
)


class MSDNet(nn.Module):
    """A multi-scale dense network. As a timm model it is its last exit; `hierens.multi_exit` uses all its exits.

    Attributes:
        blocks: parts of the network that end in an exit.
        exits: the classifier after each block.
    """

    def __init__(
        self,
        blocks: int = 7,
        base: int = 4,
        step: int = 2,
        growth: Literal["even", "linear"] = "even",
        channels: int = 16,
        growth_rate: int = 6,
        scale_widths: Sequence[int] = (1, 2, 4),
        bottleneck_widths: Sequence[int] = (1, 2, 4),
        exit_width: int | None = 128,
        large_images: bool = False,
        reduction: float = 0.5,
        num_classes: int = 100,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        """Create the network.

        Args:
            blocks: number of blocks, each with an exit.
            base: layers of the first block.
            step: layers of the other blocks; with `growth="linear"`, block i has `step * i + 1` of them.
            growth: of the blocks.
            channels: of the stem, at the finest scale.
            growth_rate: channels that a layer adds at the finest scale.
            scale_widths: width of each scale in relation to the finest; their number is that of the scales.
            bottleneck_widths: widths of bottlenecks in relation to their outputs, for each scale that they read.
            exit_width: channels of the convolutions of an exit; by default those that it reads.
            large_images: a stem that reduces the resolution four times, instead of one that keeps it.
            reduction: share of the channels that is kept where a scale ends.
            num_classes: number of classes.
            in_chans: image channels.
            drop_rate: dropout before the linear layers.
            global_pool: must be `avg`.

        Raises:
            ValueError: arguments that do not fit together.
        """
        super().__init__()
        widths = Widths(tuple(scale_widths), tuple(bottleneck_widths), growth_rate)
        if global_pool != "avg":
            raise ValueError(f"MSDNet's exits average: global_pool must be 'avg', got {global_pool!r}.")
        if len(widths.scales) != len(widths.bottlenecks) or growth not in ("even", "linear") or blocks < 1:
            raise ValueError(
                "MSDNet needs blocks >= 1, growth 'even' or 'linear', and one number per scale in scale_widths and "
                f"bottleneck_widths, got {blocks}, {growth!r}, {widths.scales} and {widths.bottlenecks}."
            )
        self.num_classes, self.in_chans, self.grad_checkpointing = num_classes, in_chans, False
        self.stem = Stem(in_chans, [channels * width for width in widths.scales], large_images)
        depths = [base, *(step if growth == "even" else step * i + 1 for i in range(1, blocks))]
        self.blocks, self.exits = nn.ModuleList(), nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        scale = (4 if large_images else 1) * 2 ** (len(widths.scales) - 1)
        for index, (block, coarsest) in enumerate(dense_blocks(widths, channels, depths, reduction)):
            self.blocks.append(block)
            self.exits.append(Classifier(coarsest, exit_width or coarsest, num_classes, drop_rate))
            self.feature_info.append({"num_chs": coarsest, "reduction": scale, "module": f"blocks.{index}"})
        self.num_features, self.head_hidden_size = coarsest, self.exits[-1].width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of the last exit."""
        return self.forward_head(self.forward_features(x))

    def forward_exits(self, x: Tensor) -> list[Tensor]:
        """Logits (N, classes) of every exit."""
        return [exit(features) for exit, features in zip(self.exits, self._coarsest(x), strict=True)]

    def _coarsest(self, x: Tensor, blocks: int | None = None) -> list[Tensor]:
        """The map of the coarsest scale after each of the first blocks."""
        maps: Maps = self.stem(x)
        found = []
        for block in self.blocks[:blocks]:
            maps = checkpoint(block, maps) if self.grad_checkpointing and self.training else block(maps)
            found.append(maps[-1])
        return found

    def own_exits(self) -> tuple[list[str], list[nn.Module]]:
        """For `hierens.multi_exit`: the names of the blocks after the first, and the classifiers before them."""
        return [f"blocks.{index}" for index in range(1, len(self.blocks))], list(self.exits[:-1])

    # --- timm's interface -------------------------------------------------------------------------------------------

    def forward_features(self, x: Tensor) -> Tensor:
        """The map of the coarsest scale after the last block."""
        return self._coarsest(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the last exit, or its pooled features."""
        last: Any = self.exits[-1]
        logits: Tensor = last(x, pre_logits)
        return logits

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of the coarsest scale after some blocks; arguments as for timm's models."""
        if output_fmt != "NCHW":
            raise ValueError(f"MSDNet's maps are (N, C, H, W): output_fmt must be 'NCHW', got {output_fmt!r}.")
        taken, last = feature_take_indices(len(self.blocks), indices)
        maps = self._coarsest(x, last + 1 if stop_early else None)
        intermediates = [maps[index] for index in taken]
        return intermediates if intermediates_only else (maps[-1], intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks after the last of some blocks, and the exits; arguments as for timm's models."""
        taken, last = feature_take_indices(len(self.blocks), indices)
        self.blocks, self.exits = self.blocks[: last + 1], self.exits[: last + 1]
        if prune_head:
            self.reset_classifier(0)
        return taken

    def get_classifier(self) -> nn.Module:
        """The linear layer of the last exit."""
        return self.exits[-1].get_submodule("fc")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the linear layers of all exits by new ones; 0 classes output pooled features."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"MSDNet's exits average: global_pool must be 'avg', got {global_pool!r}.")
        self.num_classes = num_classes
        exit: Any
        for exit in self.exits:
            exit.reset(num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each block in the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Timm's layer groups: the stem, then the blocks."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)" if coarse else r"^blocks\.(\d+)\.(\d+)"}


def _msdnet(variant: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> MSDNet:
    settings = {"num_classes": default_cfgs[variant].default.num_classes, **defaults, **kwargs}
    features = {"feature_cls": "getter", "out_indices": tuple(range(settings.get("blocks", 7)))}
    model: MSDNet = build_model_with_cfg(MSDNet, variant, pretrained, feature_cfg=features, **settings)
    return model


def _for_imagenet(variant: str, pretrained: bool, kwargs: dict[str, Any], step: int) -> MSDNet:
    defaults = {"channels": 32, "growth_rate": 16, "scale_widths": (1, 2, 4, 4), "bottleneck_widths": (1, 2, 4, 4)}
    sizes = {"blocks": 5, "base": step, "step": step, "exit_width": None, "large_images": True}
    return _msdnet(variant, pretrained, kwargs, **defaults, **sizes)


@register_model
def msdnet_cifar_7(pretrained: bool = False, **kwargs: Any) -> MSDNet:
    """MSDNet for CIFAR: 7 exits, the first after 4 layers, the others 2 layers apart."""
    return _msdnet("msdnet_cifar_7", pretrained, kwargs)


@register_model
def msdnet_cifar_10(pretrained: bool = False, **kwargs: Any) -> MSDNet:
    """MSDNet for CIFAR: 10 exits, the first after 4 layers, the others 2 layers apart."""
    return _msdnet("msdnet_cifar_10", pretrained, kwargs, blocks=10)


@register_model
def msdnet_cifar_lin_5(pretrained: bool = False, **kwargs: Any) -> MSDNet:
    """MSDNet for CIFAR: 5 exits after 1, 3, 6, 10 and 15 layers."""
    return _msdnet("msdnet_cifar_lin_5", pretrained, kwargs, blocks=5, base=1, step=1, growth="linear")


@register_model
def msdnet_cifar_lin_7(pretrained: bool = False, **kwargs: Any) -> MSDNet:
    """MSDNet for CIFAR: 7 exits after 1, 3, 6, 10, 15, 21 and 28 layers."""
    return _msdnet("msdnet_cifar_lin_7", pretrained, kwargs, blocks=7, base=1, step=1, growth="linear")


@register_model
def msdnet_imagenet_4(pretrained: bool = False, **kwargs: Any) -> MSDNet:
    """MSDNet for ImageNet: 5 exits, 4 layers apart."""
    return _for_imagenet("msdnet_imagenet_4", pretrained, kwargs, 4)


@register_model
def msdnet_imagenet_6(pretrained: bool = False, **kwargs: Any) -> MSDNet:
    """MSDNet for ImageNet: 5 exits, 6 layers apart."""
    return _for_imagenet("msdnet_imagenet_6", pretrained, kwargs, 6)


@register_model
def msdnet_imagenet_7(pretrained: bool = False, **kwargs: Any) -> MSDNet:
    """MSDNet for ImageNet: 5 exits, 7 layers apart."""
    return _for_imagenet("msdnet_imagenet_7", pretrained, kwargs, 7)
