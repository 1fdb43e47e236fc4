"""Trains a tree for retrieval: the index is built at full depth, and queries come at every depth.

Every fifth class is held out. A tree of four networks learns the other classes; then its classifier is removed, and the
training images of the classes held out are the index in which their test images are looked up.

pip install -e ".[train]"                                                      what it needs
python examples/train_retrieval.py --data-dir DIR                              DIR/train/CLASS/*.png, DIR/test/CLASS/*
python examples/train_retrieval.py --data-dir DIR --distance none              without distillation of embeddings
python examples/train_retrieval.py --data-dir DIR --blocks 1                   a single network
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from timm.data import create_dataset
from torch import Tensor

import hierens
from hierens.core.predictions import combine_embeddings
from hierens.embedding_losses import cosine_distillation, mse_distillation
from hierens.evaluation.profiling import millions, table
from hierens.losses import independent

DISTANCES = {"cosine": cosine_distillation, "mse": mse_distillation}
MEAN, STD = torch.tensor((0.5071, 0.4865, 0.4409)), torch.tensor((0.2673, 0.2564, 0.2762))  # of CIFAR-100
HELD_OUT = 5  # every fifth class, in alphabetical order
NEIGHBOURS = (1, 10)


class Images(NamedTuple):
    """Images (N, H, W, C) of bytes, and class indices (N,)."""

    pixels: Tensor
    labels: Tensor


class Data(NamedTuple):
    """Images of the classes for training, and of those held out."""

    training: Images
    index: Images
    queries: Images


def read(data_dir: str | Path, per_class: int | None = None) -> Data:
    """The images of a data set in folders `train` and `test`, with a folder per class in each.

    Args:
        data_dir: the folder of both.
        per_class: train on so many images of each class, the first in alphabetical order; all by default.
    """
    train, test = (_folder(Path(data_dir) / part) for part in ("train", "test"))
    held_out, queries = (images.labels % HELD_OUT == HELD_OUT - 1 for images in (train, test))
    rank = torch.arange(len(train.labels)) - torch.searchsorted(train.labels, train.labels)
    kept = ~held_out if per_class is None else ~held_out & (rank < per_class)
    return Data(
        Images(train.pixels[kept], train.labels[kept].unique(return_inverse=True)[1]),
        Images(train.pixels[held_out], train.labels[held_out]),
        Images(test.pixels[queries], test.labels[queries]),
    )


def _folder(folder: Path) -> Images:
    images, labels = zip(*create_dataset("folder", str(folder)), strict=True)
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return Images(torch.from_numpy(pixels), torch.tensor(labels))


def create(classes: int, blocks: int, seed: int) -> Any:
    """A tree of ResNet-8 with 2^(blocks - 1) leaves, newly initialised; of one block, it is a single network."""
    torch.manual_seed(seed)
    backbone = timm.create_model("resnet8_cifar", num_classes=classes, stem_stride=2)
    return hierens.hierensify(backbone, blocks, init="reinit", seed=seed)


def train(model: Any, images: Images, distance: str, weight: float, epochs: int, batch_size: int, seed: int) -> None:
    """Train with L_I, the sum of the leaves' cross-entropies, plus `weight` times the distillation of embeddings."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(images.labels) // batch_size)
    if not steps:
        raise ValueError(f"{len(images.labels)} images are fewer than a batch of {batch_size}: set --batch-size.")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step, (pixels, labels) in enumerate(_batches(images, epochs, batch_size, generator)):
        features = model.forward_features(_normalised(pixels))
        loss = independent(model.forward_head(features, reduce=False), labels)
        if distance in DISTANCES:
            embeddings = model.forward_head(features, pre_logits=True, reduce=False)
            loss = loss + weight * DISTANCES[distance](embeddings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)


def _batches(
    images: Images, epochs: int, batch_size: int, generator: torch.Generator, pad: int = 4
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of random crops of padded images, half of them mirrored; an incomplete batch is left out."""
    count, height, width = images.pixels.shape[:3]
    padded = torch.nn.functional.pad(images.pixels, (0, 0, pad, pad, pad, pad))
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        for rows in order[: count - count % batch_size].split(batch_size):
            top, left = torch.randint(2 * pad + 1, (2, batch_size, 1), generator=generator)
            mirrored = torch.rand(batch_size, 1, generator=generator) < 0.5
            across = torch.where(mirrored, torch.arange(width - 1, -1, -1), torch.arange(width))
            down = torch.arange(height) + top
            crops = padded[rows[:, None, None], down[:, :, None], (across + left)[:, None, :]]
            yield crops, images.labels[rows]


def _normalised(pixels: Tensor) -> Tensor:
    return ((pixels / 255 - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


def recalls(model: Any, data: Data) -> dict[str, list[float]]:
    """Recall at 1 and 10 per depth, in percent: a query counts if an image of its class is among the nearest.

    Args:
        model: without classifier, so that its outputs are embeddings.
        data: the images of the index and of the queries.

    Returns:
        `full_k`, in an index of full depth; `same_k`, in an index of the queries' depth; and `concat_k`, in that as
        well, with the leaves' embeddings concatenated. Neighbours are those with the largest cosine.
    """
    index, queries = (_leaf_embeddings(model.eval(), images) for images in (data.index, data.queries))
    found: dict[str, list[float]] = {}
    for size in model.sizes:
        stored_leaves = {("full", "mean"): model.leaves, ("same", "mean"): size, ("concat", "concat"): size}
        for (name, combine), stored in stored_leaves.items():
            near, query = (
                torch.nn.functional.normalize(combine_embeddings(leaves, combine), dim=-1)
                for leaves in (index[:, :stored], queries[:, :size])
            )
            nearest = data.index.labels[(query @ near.T).topk(min(max(NEIGHBOURS), len(near))).indices]
            for k in NEIGHBOURS:
                hit = (nearest[:, :k] == data.queries.labels[:, None]).any(1)
                found.setdefault(f"{name}_{k}", []).append(100 * hit.double().mean().item())
    return found


@torch.no_grad()
def _leaf_embeddings(model: Any, images: Images) -> Tensor:
    """(N, leaves, features): embeddings of every depth are means of the first leaves."""
    return torch.cat([model(_normalised(pixels), reduce=False) for pixels in images.pixels.split(500)])


def main() -> None:
    """Train, remove the classifier, and print recall by depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with `train` and `test`, a folder per class in each")
    parser.add_argument("--distance", choices=("none", *DISTANCES), default="cosine", help="distillation of embeddings")
    parser.add_argument("--weight", type=float, default=4.0, help="of the distillation")
    parser.add_argument("--blocks", type=int, default=3, help="levels of the tree; 1 is a single network")
    parser.add_argument("--per-class", type=int, help="training images of each class; all by default")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", default="", help="where the model is saved")
    given = parser.parse_args()
    data = read(given.data_dir, given.per_class)
    model = create(len(data.training.labels.unique()), given.blocks, given.seed)
    train(model, data.training, given.distance, given.weight, given.epochs, given.batch_size, given.seed)
    model.reset_classifier(0)
    found = recalls(model, data)
    rows = [
        (str(depth), millions(macs), *(f"{values[depth]:.2f}" for values in found.values()))
        for depth, macs in enumerate(model.macs())
    ]
    print(table(("depth", "MACs", *found), rows))
    if given.output_dir:
        model.save_pretrained(given.output_dir)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
