"""Pruned ensembles of exits: exactly the ensemble of what is kept, and cheaper."""

from itertools import pairwise

import pytest
import timm
import torch

import hierens
from hierens.models.exit_weights import PRIORS, prior


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return timm.create_model("resnet14_cifar", channels=(4, 8, 8), in_chans=1).double().eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("weights", "kept"),
    [
        ([0.5, 0.004, 0.4, 0.096], (0, 2, 3)),
        ([0.6, 0.39, 0.005, 0.005], (0, 1)),
        ([0.004, 0.004, 0.99, 0.002], (2,)),
        ([0.25] * 4, (0, 1, 2, 3)),
    ],
)
@torch.no_grad()
def test_a_pruned_ensemble_is_the_ensemble_of_the_exits_that_are_kept(backbone, images, weights, kept):
    model = hierens.multi_exit(backbone, 4, weights=weights)
    pruning = model.prune(tolerance=0.01)
    assert pruning.kept == kept and pruning.model.leaves == len(kept) and model.leaves == 4
    shares = model.weights[list(kept)] / model.weights[list(kept)].sum()
    assert torch.allclose(model.weights, torch.tensor(weights, dtype=torch.float64), rtol=1e-6)
    expected = (model(images, reduce=False)[:, list(kept)] * shares[:, None]).sum(1)
    assert torch.allclose(pruning.model(images), expected, rtol=1e-12, atol=1e-14)
    assert pruning.before.macs == model.macs()[-1] and pruning.after.macs == pruning.model.macs()[-1]
    assert pruning.after.parameters == sum(p.numel() for p in pruning.model.parameters())
    if len(kept) < 4:
        assert pruning.after.macs < pruning.before.macs and pruning.after.parameters < pruning.before.parameters
    assert len(pruning.model.levels) == kept[-1] + 1 and "parameters" in str(pruning)


def test_held_out_images_show_where_the_ensemble_no_longer_gains(backbone, images):
    model = hierens.multi_exit(backbone, 4, weights="uniform")
    labels = model(images, depth=1).argmax(-1)  # no later depth can do better
    pruning = model.prune(0.0, [(images, labels)])
    assert pruning.kept in ((0,), (0, 1)), "as one exit may happen to do as well"


def test_exits_that_collaborate_lose_the_last_ones_only(backbone, images):
    model = hierens.multi_exit(backbone, 4, weights=[0.5, 0.001, 0.498, 0.001], collaborate=True)
    pruning = model.prune(0.01)
    assert pruning.kept == (0, 1, 2)
    assert torch.allclose(pruning.model(images), model(images, depth=2), rtol=1e-12)


def test_a_pruned_model_is_saved_and_trained_as_any(backbone, images, tmp_path):
    model = hierens.multi_exit(backbone, 4, weights=[0.5, 0.001, 0.498, 0.001], learn_weights=True).float()
    small = model.prune(0.01).model
    small.save_pretrained(tmp_path)
    loaded = hierens.from_pretrained(tmp_path)
    assert torch.allclose(loaded(images.float()), small(images.float()), atol=1e-6)
    small(images.float()).square().sum().backward()
    assert small.weighting.logits.grad.abs().max() > 0


@pytest.mark.parametrize("name", PRIORS)
def test_weights_by_name(name):
    weights = prior(name, 4)
    assert sum(weights) == pytest.approx(1)
    pairs = list(pairwise(weights))
    if name == "uniform":
        assert weights == (0.25,) * 4
    elif name.startswith("linear"):
        assert [b - a for a, b in pairs] == pytest.approx([0.1 if "rising" in name else -0.1] * 3)
    else:
        assert [b / a for a, b in pairs] == pytest.approx([2.0 if "rising" in name else 0.5] * 3)


def test_what_cannot_be_pruned_is_named(backbone):
    with pytest.raises(ValueError, match="tolerance must be from 0 to below 1, got 1"):
        hierens.multi_exit(backbone, 2, weights="uniform").prune(1)
    with pytest.raises(ValueError, match="no labelled image"):
        hierens.multi_exit(backbone, 2, weights="uniform").prune(0.1, [])
