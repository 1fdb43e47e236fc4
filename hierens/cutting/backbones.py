"""Checks of what is given as a backbone: a timm model, or another network with a description of what timm would say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hierens.core.adaptive_base import AdaptiveBase
from hierens.core.errors import first_line
from hierens.core.modes import evaluating
from hierens.core.timm_info import Description, description, example_input
from hierens.cutting.fx_tracer import CutError


def described(backbone: Any, classifier: str | None, input_size: Sequence[int] | None) -> Any:
    """A network that is not timm's, as a shallow copy with a `Description`; a timm model as it is.

    Args:
        backbone: any network from images (N, C, H, W) to outputs (N, classes, ...).
        classifier: name of its last layer with weights, or of a module with no other such layer; None for a timm model.
        input_size: of an image, (C, H, W); None for a timm model.

    Raises:
        CutError: this is not a network, the layer does not exist or is not the last, or the network does not run.
    """
    if classifier is None and input_size is None:
        check_backbone(backbone)
        return backbone
    if not _is_plain(backbone):
        check_backbone(backbone)
        raise CutError(
            f"this {type(backbone).__name__} is a timm model, which states its classifier and image size: omit "
            "classifier and input_size."
        )
    if classifier is None or input_size is None:
        raise CutError(f"classifier and input_size are given together: {_mend(backbone)}.")
    size = tuple(input_size) if isinstance(input_size, (tuple, list)) else ()
    if len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in size):
        raise CutError(f"input_size must be (C, H, W), such as (3, 224, 224), got {input_size!r}.")
    name = _last_layer(backbone, classifier)
    layer: Any = backbone.get_submodule(name)
    outputs, inputs = layer.weight.shape[:2]
    classes = int(getattr(layer, "out_features", getattr(layer, "out_channels", outputs)))
    features = int(getattr(layer, "in_features", getattr(layer, "in_channels", inputs)))
    backbone = copy.copy(backbone)  # shares all tensors and modules; only the attribute is its own
    backbone._hierens_description = own = Description(size, (name,), classes, features)
    if not any(parameter.is_meta for parameter in backbone.parameters()):
        backbone._hierens_description = replace(own, dense=_example_output(backbone, own).ndim > 2)
    return backbone


def check_backbone(backbone: Any) -> None:
    """Check that an argument is a timm model that can be converted, or has a description.

    Raises:
        CutError: it is not.
    """
    kind, module = type(backbone).__name__, type(backbone).__module__
    if isinstance(backbone, str):
        raise CutError(f"the backbone must be a model, not its name: give timm.create_model({backbone!r}).")
    if isinstance(backbone, AdaptiveBase):
        raise CutError(f"this {kind} is converted already: give the timm model that it was made from.")
    if module.startswith("timm.models._features"):
        raise CutError(f"this {kind} returns feature maps only: make the backbone without features_only=True.")
    if not isinstance(backbone, nn.Module):
        got = f"a {module}.{kind}"
        raise CutError(f"the backbone must be a timm model, such as timm.create_model('resnet18'), got {got}.")
    if _is_plain(backbone) and not description(backbone):
        raise CutError(f"a {module}.{kind} is not a timm model: {_mend(backbone)}.")


def classifier_names(backbone: nn.Module) -> tuple[str, ...]:
    """The names of the modules that `get_classifier()` returns: one, or two for a distilled backbone.

    With `num_classes=0` it is an `Identity`, or missing, as in encoders.

    Raises:
        CutError: this is neither a timm model nor another network with a description, or has classes and no classifier.
    """
    check_backbone(backbone)
    if own := description(backbone):
        return own.classifier_names
    getter: Callable[[], Any] | None = getattr(backbone, "get_classifier", None)
    found = getter() if getter else None
    modules = found if isinstance(found, (tuple, list)) else [found]
    classes = getattr(backbone, "num_classes", 1)
    names = [
        next((name for name, own in backbone.named_modules() if own is module), "")
        for module in modules
        if isinstance(module, nn.Module) and not (classes and isinstance(module, nn.Identity))
    ]
    if classes and not (names and all(names)):
        raise CutError(f"this {type(backbone).__name__} has no classifier for its classes: call reset_classifier.")
    return tuple(filter(None, names))


def _is_plain(backbone: Any) -> bool:
    """Whether this is a network that does not have timm's interface."""
    timm = type(backbone).__module__.startswith("timm.") or hasattr(backbone, "get_classifier")
    return isinstance(backbone, nn.Module) and not timm


def _mend(backbone: nn.Module) -> str:
    layers = _layers(backbone) or ["fc"]
    return f"give classifier={layers[-1]!r} (the name of its last layer) and input_size=(C, H, W), as (3, 224, 224)"


def _layers(module: nn.Module) -> list[str]:
    """The names of the layers with a matrix or kernel, in order; "" for a layer itself."""
    return [name for name, own in module.named_modules() if getattr(getattr(own, "weight", None), "ndim", 0) > 1]


def _last_layer(backbone: nn.Module, classifier: str) -> str:
    """The name of the one layer with a matrix or kernel in a module."""
    try:
        inside = _layers(backbone.get_submodule(classifier)) if classifier else []
    except (AttributeError, TypeError):
        inside = []
    if len(inside) != 1:
        holds = f"holds {len(inside)} layers with weights, not one" if inside else "is no layer with weights"
        raise CutError(f"classifier={classifier!r} {holds}: {_mend(backbone)}.")
    return f"{classifier}.{inside[0]}" if inside[0] else classifier


def _example_output(backbone: nn.Module, own: Description) -> Tensor:
    """The output for two images.

    Raises:
        CutError: the network does not run, or its output is not one tensor (N, classes, ...).
    """
    kind = type(backbone).__name__
    x = example_input(backbone, 2)
    try:
        with torch.no_grad(), evaluating(backbone):
            y = backbone(x)
    except Exception as error:
        raise CutError(f"this {kind} does not run on images of shape {tuple(x.shape)}: {first_line(error)}.") from error
    if not isinstance(y, Tensor):
        raise CutError(f"this {kind} returns a {type(y).__name__}: wrap it in a module that returns the logits alone.")
    if y.ndim < 2 or y.shape[:2] != (2, own.num_classes):
        raise CutError(
            f"this {kind} returns a tensor of shape {tuple(y.shape)} for 2 images, but classifier="
            f"{own.classifier_names[0]!r} has {own.num_classes} outputs: name the last layer."
        )
    return y
