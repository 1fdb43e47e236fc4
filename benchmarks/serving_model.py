"""Trains the model that benchmarks/serving.py serves: a tree of 16 networks whose cost exceeds the server's own.

python benchmarks/serving_model.py --data-dir /folder/of/idx/files --output runs/serving/model

One network is trained first and copied to all branches. Noise makes the branches differ, and the tree is then trained
for a short time. On a CPU this is the cheapest way to obtain sixteen good networks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import hierens
from hierens.objectives import Objective

SIZE, MEAN, STD = (1, 28, 28), 0.286, 0.353


@dataclass(frozen=True)
class Settings:
    """Settings of the training."""

    data_dir: str
    """folder with the four idx files"""
    output: str = "runs/serving/model"
    """folder for the model"""
    channels: tuple[int, ...] = (64, 128, 256)
    """widths of resnet8_cifar's stages"""
    branching: tuple[int, ...] = (1, 4, 2, 2)
    """number of children of every branch of the level above, per level"""
    single_images: int = 60_000
    """training images for the single network"""
    tree_images: int = 12_000
    """training images for the tree"""
    batch_size: int = 64
    """images per step"""
    threads: int = 2
    """CPU threads"""


def main(settings: Settings) -> None:
    """Train the network, then the tree, and evaluate every depth."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    images, labels = fashion_mnist(settings.data_dir, training=True)
    backbone = timm.create_model("resnet8_cifar", channels=settings.channels, in_chans=1, num_classes=10)
    backbone.pretrained_cfg.update(input_size=SIZE, mean=(MEAN,), std=(STD,), crop_pct=1.0, interpolation="bilinear")
    fit(backbone, F.cross_entropy, images, labels, settings.single_images, 3e-3, settings)
    tree = hierens.hierensify(backbone, branching=settings.branching)
    tree.break_symmetry(0.3)
    objective = Objective("independent+hierarchical_codistillation")
    fit(tree, objective, images, labels, settings.tree_images, 1e-3, settings)
    right = answers(tree, *fashion_mnist(settings.data_dir, training=False))
    tree.save_pretrained(settings.output, results={"accuracy (%)": (100 * right.mean(1)).tolist()})
    np.save(Path(settings.output) / "right.npy", right.astype(np.uint8))
    print((Path(settings.output) / "README.md").read_text())


def fashion_mnist(directory: str, training: bool) -> tuple[Tensor, Tensor]:
    """Normalised images (N, 1, 28, 28) and labels (N,)."""
    from hierens.training.config import DataConfig
    from hierens.training.data.builtin import fashion_mnist as read

    images, labels = read(DataConfig(dataset="fashion_mnist", data_dir=directory), training)
    scaled = torch.from_numpy(np.array(images)).float().div(255).sub(MEAN).div(STD)
    return scaled[:, None], torch.from_numpy(np.array(labels)).long()


def fit(model: Any, loss: Any, images: Tensor, labels: Tensor, count: int, lr: float, settings: Settings) -> None:
    """Train with AdamW, one learning rate cycle, random flips and bfloat16 on `count` images."""
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.02)
    steps = count // settings.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    order = torch.cat([torch.randperm(len(images)) for _ in range(-(-count // len(images)))])
    start = time.perf_counter()
    for step in range(steps):
        chosen = order[step * settings.batch_size :][: settings.batch_size]
        batch = images[chosen]
        batch = torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, batch.flip(-1), batch)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(batch) if isinstance(model, timm.models.ResNet) else model(batch, reduce=False)
        value = loss(outputs.float(), labels[chosen])
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            rate = (step + 1) * settings.batch_size / (time.perf_counter() - start)
            print(f"{step + 1:5d}/{steps}  loss {value.item():.3f}  {rate:.0f} images/s", flush=True)


@torch.no_grad()
def answers(model: Any, images: Tensor, labels: Tensor) -> np.ndarray:
    """Whether each depth classifies each image correctly: (depths, images)."""
    fused = model.eval().fuse()
    right = []
    for x, y in zip(images.split(100), labels.split(100), strict=True):
        leaf_logits = fused(x, reduce=False)
        nested = [leaf_logits[:, :leaves].mean(1).argmax(-1) == y for leaves in model.sizes]
        right.append(torch.stack(nested))
    return torch.cat(right, 1).numpy()


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
