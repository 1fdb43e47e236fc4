"""Entry points for timm that convert any backbone, given plain values: `hne`, `hne_exits` and `multi_exit`.

Saved models are rebuilt with them. Importing this module registers them with timm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from hierens.core.predictions import Average
from hierens.models import conversion
from hierens.models.adaptive import Adaptive
from hierens.models.ensemble import HierarchicalEnsemble
from hierens.models.feature_maps import features_only
from hierens.models.multi_exit import MultiExit
from hierens.models.tree_exits import TreeWithExits

__all__ = ["hne", "hne_exits", "multi_exit"]

_DEFAULT = {"num_classes": 1000, "input_size": (3, 224, 224)}
default_cfgs = generate_default_cfgs(dict.fromkeys(__all__, _DEFAULT))

_OF_TREES = ("blocks", "at", "branching", "leaves", "members", "rank", "init", "seed", "looped")
_TIMM_ONLY = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # for timm's builder, not for a backbone

Model = TypeVar("Model", bound=Adaptive)


def _built(make: Callable[..., Model], variant: str, pretrained: bool, kwargs: dict[str, Any]) -> Model:
    """The model that `make` returns, through timm's builder if there are weights or a description to load.

    With `features_only=True` it is a module that returns the model's feature maps, as timm's models have it.
    """
    of_maps = {name: kwargs.pop(name) for name in ("feature_cls", "out_indices") if name in kwargs}
    if kwargs.pop("features_only", False):
        maps: Any = features_only(_built(make, variant, pretrained, kwargs), **of_maps)
        return maps
    if not kwargs.get("backbone"):
        raise ValueError(
            f"{variant} needs the name of a timm model: timm.create_model({variant!r}, backbone='resnet18')."
        )
    if not pretrained and not kwargs.get("pretrained_cfg"):
        return make(**{k: v for k, v in kwargs.items() if k not in _TIMM_ONLY})
    model: Model = build_model_with_cfg(make, variant, pretrained, **kwargs)
    return model


@register_model
def hne(pretrained: bool = False, **kwargs: Any) -> HierarchicalEnsemble:
    """A hierarchical ensemble of any backbone.

    Args:
        pretrained: load the weights that `pretrained_cfg` names, which timm sets for `local-dir:` and `hf-hub:`.
        kwargs: `backbone` (a timm name), `backbone_args`, `blocks` or `at` and `branching`, `leaves`, `members`,
            `rank`, `init`, `seed`, and arguments of the backbone: `num_classes`, `in_chans`, ...; `features_only=True`,
            with `out_indices`, gives timm's `FeatureGetterNet` of the model.
    """
    kwargs.setdefault("init", "copy" if pretrained else "reinit")
    return _built(_ensemble, "hne", pretrained, kwargs)


def _ensemble(backbone: str, backbone_args: dict[str, Any] | None = None, **kwargs: Any) -> HierarchicalEnsemble:
    of_tree = {key: kwargs.pop(key) for key in _OF_TREES if key in kwargs}
    network = timm.create_model(backbone, **{**(backbone_args or {}), **kwargs})
    return conversion.hierensify(network, **of_tree)


@register_model
def hne_exits(pretrained: bool = False, **kwargs: Any) -> TreeWithExits:
    """A tree with exits, of any backbone.

    Args:
        pretrained: as for `hne`.
        kwargs: as for `hne`, and `head`.
    """
    kwargs.setdefault("init", "copy" if pretrained else "reinit")
    return _built(_tree_with_exits, "hne_exits", pretrained, kwargs)


def _tree_with_exits(backbone: str, backbone_args: dict[str, Any] | None = None, **kwargs: Any) -> TreeWithExits:
    of_tree = {key: kwargs.pop(key) for key in (*_OF_TREES, "head") if key in kwargs}
    network = timm.create_model(backbone, **{**(backbone_args or {}), **kwargs})
    return conversion.tree_with_exits(network, **of_tree)


@register_model
def multi_exit(pretrained: bool = False, **kwargs: Any) -> MultiExit:
    """A multi-exit network, of any backbone.

    Args:
        pretrained: as for `hne`.
        kwargs: `backbone` (a timm name), `backbone_args`, arguments of `hierens.multi_exit`, `kept` (the exits to
            keep), and arguments of the backbone: `num_classes`, `in_chans`, ...
    """
    return _built(_multi_exit, "multi_exit", pretrained, kwargs)


def _multi_exit(
    backbone: str,
    backbone_args: dict[str, Any] | None = None,
    exits: int | None = None,
    at: Sequence[str] | None = None,
    head: Literal["pool", "conv"] = "pool",
    collaborate: bool = False,
    weights: str | Sequence[float] | None = None,
    learn_weights: bool = False,
    average: Average = "logits",
    boosted: bool = False,
    kept: Sequence[int] | None = None,
    **kwargs: Any,
) -> MultiExit:
    network = timm.create_model(backbone, **{**(backbone_args or {}), **kwargs})
    model = conversion.multi_exit(
        network,
        exits,
        at=at,
        head=head,
        collaborate=collaborate,
        weights=weights,
        learn_weights=learn_weights,
        average=average,
        boosted=boosted,
    )
    return model if kept is None or len(kept) == model.leaves else model.keep_exits(kept)
