"""A model's classes: what they are called, and which labels are of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NO_CLASS = -1  # the label of an image that belongs to no class, such as one that could not be read
NAMES = ("label_names", "label_descriptions")  # where timm's tools look for them


def label_names(model: Any) -> list[str] | None:
    """The classes by name, if the model's config has timm's `label_names`, a list or a mapping from the index."""
    names = model.pretrained_cfg.get("label_names")
    if isinstance(names, dict):
        by_index = {int(index): str(name) for index, name in names.items()}
        names = [by_index.get(index, str(index)) for index in range(model.num_classes)]
    return [str(name) for name in names] if names and len(names) == model.num_classes else None


def name_labels(model: Any, names: Sequence[str]) -> None:
    """Give a model's classes their names; classes beyond the last name go by their number.

    Raises:
        ValueError: more names than the model has classes.
    """
    if len(names) > model.num_classes:
        raise ValueError(
            f"num_classes is {model.num_classes}, but the data set has {len(names)} classes: leave num_classes out, or "
            "give that number at least."
        )
    forget_labels(model)
    beyond = [str(index) for index in range(len(names), model.num_classes)]
    model.pretrained_cfg.update(label_names=[*names, *beyond], num_classes=model.num_classes)


def forget_labels(model: Any) -> None:
    """Take the names of the classes from a model."""
    for key in NAMES:
        model.pretrained_cfg.pop(key, None)


def as_indices(labels: Tensor, what: str) -> Tensor:
    """Labels (N,) of any type of whole numbers as int64.

    Args:
        labels: of a batch.
        what: the batch, for the message.

    Raises:
        ValueError: another type or shape; names the first label.
    """
    if labels.ndim == 1 and not labels.is_floating_point() and labels.dtype != torch.bool:
        return labels.long()
    first = labels.reshape(-1)[:1].tolist()
    raise ValueError(
        f"the labels of {what} are {str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)} (image 0: "
        f"{first[0] if first else 'none'}): they should be the numbers of classes, whole numbers of shape (N,)."
    )


def out_of_range(position: int, label: int, num_classes: int, what: str) -> ValueError:
    """The error for a label that is no class of the model's.

    Args:
        position: of the image in its batch, from 0.
        label: what it has.
        num_classes: of the model.
        what: the batch, for the message.
    """
    return ValueError(
        f"image {position} of {what} has the label {label}, but the model's classes are 0 to {num_classes - 1}: mend "
        "the label, or give num_classes."
    )
