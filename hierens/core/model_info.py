"""`ModelInfo`: the values that timm's tools read from a model, taken from the backbone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from timm.models import get_model_args
from torch import nn

from hierens.core import timm_info


@dataclass
class ModelInfo:
    """The values that a model's constructor takes.

    Attributes:
        num_classes: number of classes.
        num_features: channels of the backbone's feature maps.
        head_hidden_size: channels that the backbone's classifier reads.
        in_chans: image channels.
        classifier_names: of the backbone's last linear layers: one, or two for a distilled backbone.
        pretrained_cfg: timm's description of the model and its preprocessing.
        model_args: plain values from which timm's entry point creates the model again.
        no_weight_decay: the backbone's names of parameters without weight decay.
        traits: timm's record of changes after construction.
        stages: where the blocks compute the backbone's feature maps (`hierens.cutting.stages.Stage`).
    """

    num_classes: int
    num_features: int
    head_hidden_size: int
    in_chans: int
    classifier_names: tuple[str, ...]
    pretrained_cfg: dict[str, Any]
    model_args: dict[str, Any]
    no_weight_decay: set[str] = field(default_factory=set)
    traits: dict[str, Any] = field(default_factory=dict)
    stages: tuple[Any, ...] = ()

    @classmethod
    def of_backbone(
        cls, backbone: nn.Module, at: Sequence[str], classifier_names: tuple[str, ...], first_level: str
    ) -> ModelInfo:
        """The record of a model made from a backbone.

        Args:
            backbone: the network that was cut.
            at: names of the modules before which it was cut.
            classifier_names: names of its last linear layers.
            first_level: prefix of the names of the first block's layers in the model, such as `levels.0.`.
        """
        features, hidden = timm_info.num_features(backbone)
        size = timm_info.input_size(backbone)
        cfg = dict(getattr(backbone, "pretrained_cfg", None) or {})
        args = get_model_args(backbone) if cfg.get("architecture") else {}
        names: Callable[[], Any] | None = getattr(backbone, "no_weight_decay", None)
        info = cls(
            num_classes=timm_info.num_classes(backbone),
            num_features=features,
            head_hidden_size=hidden,
            in_chans=size[0],
            classifier_names=classifier_names,
            pretrained_cfg={**cfg, "input_size": size},
            model_args={
                "backbone": cfg.get("architecture"),
                "backbone_args": {k: v for k, v in args.items() if k not in ("num_classes", "in_chans")},
                "at": list(at),
            },
            no_weight_decay=set(names() if names else ()),
            traits=dict(getattr(backbone, "_traits", {})),
        )
        info._rename_first_conv(lambda name: first_level + name, info.traits.get("first_conv", cfg.get("first_conv")))
        return info

    def copy(self) -> ModelInfo:
        """A deep copy."""
        return copy.deepcopy(self)

    def renamed(self, before: str, after: str) -> ModelInfo:
        """A copy for a model in which the names of the first block's layers have another prefix."""
        info = self.copy()
        info._rename_first_conv(lambda name: name.replace(before, after), info.pretrained_cfg["first_conv"])
        return info

    def _rename_first_conv(self, new: Callable[[str], str], names: str | Sequence[str] | None) -> None:
        """Record the names of the layers that read the image: one, several (stems with branches), or None."""
        renamed = new(names) if isinstance(names, str) else tuple(map(new, names or ())) or None
        self.pretrained_cfg["first_conv"] = self.traits["first_conv"] = renamed
