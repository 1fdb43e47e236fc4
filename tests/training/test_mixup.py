"""Mixup and its kin: timm's amounts, the same for a seed, and targets that the losses read as they should."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hierens.losses import hierarchical_codistillation, independent
from hierens.objectives import Objective
from hierens.training.config import TrainConfig
from hierens.training.mixup import Mixing


def batch(images=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 1, 8, 8, generator=generator), torch.arange(images) % 4


def test_nothing_to_do_leaves_the_batch_alone():
    images, labels = batch()
    mixed, targets = Mixing(TrainConfig(), 4)(images, labels, 0, 1)
    assert mixed is images and targets is labels


def test_smoothing_without_mixing_is_torchs():
    _, labels = batch()
    _, soft = Mixing(TrainConfig(label_smoothing=0.1), 4)(*batch(), 0, 1)
    logits = torch.randn(8, 1, 4)
    expected = F.cross_entropy(logits[:, 0], labels, label_smoothing=0.1)
    assert torch.allclose(independent(logits, soft), expected)


@pytest.mark.parametrize(
    "settings", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0, "mix_mode": "elem"}]
)
def test_images_and_targets_are_mixed_by_the_same_amount(settings):
    images = torch.arange(4.0)[torch.arange(8) % 4].view(8, 1, 1, 1).expand(8, 1, 8, 8).clone()  # pixels are the class
    labels = torch.arange(8) % 4
    mixed, soft = Mixing(TrainConfig(**settings), 4)(images, labels, 0, 3)
    assert torch.allclose(soft.sum(1), torch.ones(8)) and (soft.max(1).values < 1).any()
    assert torch.allclose(mixed.mean((1, 2, 3)), soft @ torch.arange(4.0), atol=1e-5)
    assert images.unique().numel() == 4, "the batch itself is left as it was"


def test_a_seed_draws_the_same_whatever_was_drawn_before():
    mixing, (images, labels) = Mixing(TrainConfig(mixup=0.4), 4), batch()
    first = mixing(images, labels, 0, 5)[1]
    np.random.seed(7)
    torch.manual_seed(9)
    before = np.random.get_state()[1].copy()
    assert torch.equal(mixing(images, labels, 0, 5)[1], first)
    assert (np.random.get_state()[1] == before).all(), "the caller's generator is left alone"
    assert not torch.equal(mixing(images, labels, 0, 6)[1], first)


def test_mixing_ends_when_it_is_told_to():
    mixing, (images, labels) = Mixing(TrainConfig(mixup=0.4, mix_off_epoch=2), 4), batch()
    assert mixing(images, labels, 1, 5)[1].ndim == 2
    assert mixing(images, labels, 2, 5)[1] is labels


def test_an_odd_batch_is_refused():
    with pytest.raises(ValueError, match="7 is odd"):
        Mixing(TrainConfig(mixup=0.4), 4)(*batch(7), 0, 1)


def test_what_the_losses_mean_under_mixup():
    """L_I is the mixture of both labels' losses; L_HD sees no label, only the ensemble's answer to the mixed image."""
    torch.manual_seed(0)
    logits = torch.randn(8, 4, 4, dtype=torch.float64)
    a, b, amount = torch.arange(8) % 4, torch.arange(8).flip(0) % 4, 0.3
    soft = amount * F.one_hot(a, 4).double() + (1 - amount) * F.one_hot(b, 4).double()
    mixture = amount * independent(logits, a) + (1 - amount) * independent(logits, b)
    assert torch.allclose(independent(logits, soft), mixture)
    assert torch.equal(hierarchical_codistillation(logits, soft), hierarchical_codistillation(logits, a))
    expected = 0.5 * mixture + 0.5 * hierarchical_codistillation(logits)
    assert torch.allclose(Objective("independent+hierarchical_codistillation")(logits, soft), expected)
