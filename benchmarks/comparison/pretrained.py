"""Pretrained weights for a comparison, and a comparison of a tree of copies with its backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import efficientnet_lite0
import timm
import torch
from timm.data import create_dataset, create_transform, resolve_model_data_config
from torch.utils.data import DataLoader

import hierens
from comparison.records import machine, record_file, write_json

IMAGENET = "imagenet_one_each"
BATCH = 50


def pretrained_weights(runs: Path) -> Path:
    """The ImageNet weights of EfficientNet-Lite0 as a file with timm's names, converted from the installed package."""
    file = runs / f"{efficientnet_lite0.ARCHITECTURE}.safetensors"
    return file if file.is_file() else efficientnet_lite0.convert(file)


def write_copies(data_dir: str, weights: Path, blocks: int) -> Path:
    """Evaluate a backbone and every depth of a tree of its copies on labelled images, and write a record.

    Args:
        data_dir: a folder per class, in the order of the backbone's classes.
        weights: weights file of the backbone.
        blocks: number of blocks of the tree.

    Raises:
        ValueError: the number of folders is not the backbone's number of classes.
    """
    overlay = {"file": str(weights)}
    name = efficientnet_lite0.ARCHITECTURE
    backbone = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    transform = create_transform(**resolve_model_data_config(backbone))
    images = create_dataset("", root=data_dir, transform=transform)
    if (found := len(images.reader.class_to_idx)) != backbone.num_classes:
        raise ValueError(f"{data_dir} has {found} folders, but {name} has {backbone.num_classes} classes.")
    record = {
        "title": f"{name}, a tree of {2 ** (blocks - 1)} copies",
        "seed": 0,
        "blocks": blocks,
        "input_size": list(backbone.pretrained_cfg["input_size"]),
        **compared(backbone, hierens.hierensify(backbone, blocks), DataLoader(images, BATCH)),
        "machine": machine(),
    }
    return write_json(record_file(IMAGENET, name, 0), record)


def read_copies() -> dict[str, Any] | None:
    """The record written by `write_copies`, if there is one."""
    file = record_file(IMAGENET, efficientnet_lite0.ARCHITECTURE, 0)
    return dict(json.loads(file.read_text())) if file.is_file() else None


@torch.no_grad()
def compared(backbone: Any, tree: Any, batches: DataLoader[Any]) -> dict[str, Any]:
    """The number of correct predictions of each, and the largest difference of logits at every depth."""
    count, right, depths = 0, 0, range(tree.depths)
    of_depth, furthest, alike = [0] * tree.depths, [0.0] * tree.depths, [0] * tree.depths
    for images, labels in batches:
        expected = backbone(images)
        count += len(labels)
        right += int((expected.argmax(-1) == labels).sum())
        for depth in depths:
            logits = tree(images, depth=depth)
            of_depth[depth] += int((logits.argmax(-1) == labels).sum())
            alike[depth] += int((logits.argmax(-1) == expected.argmax(-1)).sum())
            furthest[depth] = max(furthest[depth], float((logits - expected).abs().max()))
    return {
        "test_images": count,
        "leaves": list(tree.sizes),
        "backbone_right": right,
        "right": of_depth,
        "same_class": alike,
        "max_abs_difference": furthest,
    }
