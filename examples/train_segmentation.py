"""Trains a tree of small U-Nets to segment digits over photographs, and evaluates every depth.

pip install -e ".[train,demo]"                           what it needs
python examples/train_segmentation.py                    a few minutes on one CPU core
python examples/train_segmentation.py --objective independent --epochs 8

The images are made here from two sets of real images that need no download: scikit-learn's scanned digits, and the
photographs of clothes in hierens.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hierens
from hierens.evaluation.dense import DenseEvaluation, DenseMetrics
from hierens.evaluation.profiling import millions, table
from hierens.objectives import Objective
from hierens.training.config import DataConfig
from hierens.training.data.builtin import clothing, digits

SIDE = 32  # pixels of an image
CLASSES = ("photograph", "digit")
MEAN, STD = (0.6, 0.56, 0.54), (0.25, 0.25, 0.25)
DIGITS = 2  # per image
SIZES = range(14, 23)  # pixels of a digit
STRENGTH = (0.5, 1.0)  # how much of a digit's texture covers the photograph
NOISE = 0.05  # standard deviation of the noise, where 1 is the range of a pixel


def digits_over_photographs(training: bool, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Photographs with two digits each, in the texture of another photograph, and noise.

    Args:
        training: whether digits and photographs are those for training; the others are never trained on.
        count: number of images N.
        seed: of the choice of digits, photographs, sizes, places and noise.

    Returns:
        Images (N, 3, 32, 32), normalised, and the class of every pixel (N, 32, 32): 1 on a digit, otherwise 0.
    """
    random = np.random.default_rng([seed, training])
    photographs = clothing(DataConfig(), training)[0].astype(np.float32) / 255
    scans = torch.from_numpy(digits(DataConfig(), training)[0])[:, None] / 255
    shapes = {size: (F.interpolate(scans, size=(size, size), mode="bicubic")[:, 0] > 0.5).numpy() for size in SIZES}
    images = photographs[random.integers(len(photographs), size=count)]
    masks = np.zeros((count, SIDE, SIDE), np.int64)
    for image, mask in zip(images, masks, strict=True):
        for _ in range(DIGITS):
            size = int(random.choice(SIZES))
            top, left = random.integers(SIDE - size + 1, size=2)
            inside = shapes[size][random.integers(len(scans))]
            texture = photographs[random.integers(len(photographs)), :size, :size]
            strength = random.uniform(*STRENGTH)
            image[top : top + size, left : left + size][inside] *= 1 - strength
            image[top : top + size, left : left + size][inside] += strength * texture[inside]
            mask[top : top + size, left : left + size][inside] = 1
    images += NOISE * random.standard_normal(images.shape, dtype=np.float32)
    normalised = (images - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(normalised).movedim(3, 1).contiguous(), torch.from_numpy(masks)


class UNet(nn.Module):
    """A small U-Net (arXiv 1505.04597): three scales on the way down, two on the way up, and skip connections.

    Args:
        channels: of the three scales.
        num_classes: of every pixel.
    """

    def __init__(self, channels: tuple[int, int, int] = (8, 16, 32), num_classes: int = len(CLASSES)) -> None:
        super().__init__()
        fine, middle, coarse = channels
        self.down1 = double_convolution(3, fine)
        self.down2 = double_convolution(fine, middle)
        self.down3 = double_convolution(middle, coarse)
        self.up2 = double_convolution(coarse + middle, middle)
        self.up1 = double_convolution(middle + fine, fine)
        self.classifier = nn.Conv2d(fine, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes, H, W) of images (N, 3, H, W) whose sides are multiples of 4."""
        fine = self.down1(x)
        middle = self.down2(F.max_pool2d(fine, 2))
        coarse = self.down3(F.max_pool2d(middle, 2))
        middle = self.up2(torch.cat([F.interpolate(coarse, scale_factor=2.0), middle], 1))
        fine = self.up1(torch.cat([F.interpolate(middle, scale_factor=2.0), fine], 1))
        return self.classifier(fine)


def double_convolution(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def create_tree(blocks: int, seed: int) -> hierens.HierarchicalEnsemble:
    """A tree of U-Nets, or with one block a single U-Net. All branches start with weights of their own."""
    tree = hierens.hierensify(UNet(), blocks, classifier="classifier", input_size=(3, SIDE, SIDE))
    torch.manual_seed(seed)
    for module in tree.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()  # as UNet() does
    return tree


def train(model: nn.Module, objective: Objective, data: tuple[Tensor, Tensor], epochs: int, seed: int) -> float:
    """AdamW with a one-cycle learning rate.

    Args:
        model: a tree; it is changed.
        objective: the loss of all networks.
        data: images (N, 3, H, W) and classes (N, H, W).
        epochs: passes over the images.
        seed: of their order.

    Returns:
        The seconds that it took.
    """
    images, masks = data
    batch, started = 32, time.perf_counter()
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for epoch in range(epochs):
        losses = []
        for rows in torch.randperm(len(images), generator=generator).split(batch)[: len(images) // batch]:
            loss = objective(model(images[rows], reduce=False), masks[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        print(f"epoch {epoch + 1} of {epochs}: loss {torch.stack(losses).mean():.4f}", flush=True)
    return time.perf_counter() - started


def evaluate(model: nn.Module, data: tuple[Tensor, Tensor]) -> DenseEvaluation:
    """Metrics of all pixels, per depth."""
    return DenseMetrics.of(model, zip(*(part.split(100) for part in data), strict=True)).compute()


def results_table(model: hierens.HierarchicalEnsemble, found: Any) -> str:
    """Cost, quality, calibration and disagreement of every depth."""
    columns = zip(model.macs(), found.miou, found.accuracy, found.ece, found.mutual_information, strict=True)
    rows = [
        (
            f"{depth}",
            f"{model.sizes[depth]}",
            millions(macs),
            f"{miou:.2f}",
            f"{right:.2f}",
            f"{ece:.4f}",
            f"{info:.4f}",
        )
        for depth, (macs, miou, right, ece, info) in enumerate(columns)
    ]
    names = ("depth", "networks", "MACs (M)", "mIoU (%)", "correct pixels (%)", "pixel ECE", "disagreement (nats)")
    return table(names, rows)


def main() -> None:
    """Train, and print cost and quality of every depth."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--objective", default=Objective.name, help="terms joined by +, such as independent")
    flags.add_argument("--blocks", type=int, default=3, help="levels of the tree, which has 2^(blocks - 1) networks")
    flags.add_argument("--epochs", type=int, default=4)
    flags.add_argument("--images", type=int, default=2000, help="for training")
    flags.add_argument("--test-images", type=int, default=500)
    flags.add_argument("--seed", type=int, default=0)
    given = flags.parse_args()
    model, objective = create_tree(given.blocks, given.seed), Objective(given.objective)
    train(model, objective, digits_over_photographs(True, given.images), given.epochs, given.seed)
    print(results_table(model, evaluate(model, digits_over_photographs(False, given.test_images))))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
