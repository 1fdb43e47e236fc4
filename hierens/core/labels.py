"""A model's classes: their names, and checks of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NO_CLASS = -1  # the label of an image that belongs to no class, such as one that could not be read
NAMES = ("label_names", "label_descriptions")  # the fields of the config that timm's tools read


def label_names(model: Any) -> list[str] | None:
    """The names of the classes, from `label_names` in timm's config (a list, or a mapping from the index)."""
    names = model.pretrained_cfg.get("label_names")
    if isinstance(names, dict):
        by_index = {int(index): str(name) for index, name in names.items()}
        names = [by_index.get(index, str(index)) for index in range(model.num_classes)]
    return [str(name) for name in names] if names and len(names) == model.num_classes else None


def name_labels(model: Any, names: Sequence[str]) -> None:
    """Set the names of a model's classes; the name of a class beyond the last name is its index.

    Raises:
        ValueError: there are more names than classes.
    """
    if len(names) > model.num_classes:
        raise ValueError(
            f"num_classes is {model.num_classes}, but the data set has {len(names)} classes: omit num_classes, or set "
            "it to at least that number."
        )
    forget_labels(model)
    beyond = [str(index) for index in range(len(names), model.num_classes)]
    model.pretrained_cfg.update(label_names=[*names, *beyond], num_classes=model.num_classes)


def forget_labels(model: Any) -> None:
    """Remove the names of a model's classes."""
    for key in NAMES:
        model.pretrained_cfg.pop(key, None)


def check_classes(model: Any, what: str) -> None:
    """Refuse a model of embeddings where classes are needed.

    Args:
        model: any network.
        what: needs classes, for the message.

    Raises:
        ValueError: the model has no classifier.
    """
    if getattr(model, "num_classes", None) == 0:
        raise ValueError(
            f"{what} needs classes, and this model has no classifier: call reset_classifier with the number of "
            "classes, and train the new classifier."
        )


def as_indices(labels: Tensor, what: str) -> Tensor:
    """Convert labels (N,) of any integer type to int64.

    Args:
        labels: of a batch.
        what: the batch, for the message.

    Raises:
        ValueError: another type or shape; the message contains the first label.
    """
    if labels.ndim == 1 and not labels.is_floating_point() and labels.dtype != torch.bool:
        return labels.long()
    first = labels.reshape(-1)[:1].tolist()
    raise ValueError(
        f"the labels of {what} are {str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)} (image 0: "
        f"{first[0] if first else 'none'}): they should be class indices, integers of shape (N,)."
    )


def out_of_range(position: int, label: int, num_classes: int, what: str) -> ValueError:
    """The error for a label that is not one of the model's classes.

    Args:
        position: of the image in its batch, from 0.
        label: of the image.
        num_classes: of the model.
        what: the batch, for the message.
    """
    return ValueError(
        f"image {position} of {what} has the label {label}, but the model's classes are 0 to {num_classes - 1}: "
        "correct the label, or set num_classes."
    )
