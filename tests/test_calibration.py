"""Thresholds, temperatures and prediction sets chosen on one half keep their promise on the other."""

import pytest
import torch
import torch.nn.functional as F

from hierens.evaluation.uncertainty import MEASURES
from hierens.inference.calibration import CalibrationSet, calibrate, collect, exits, fit_temperatures, mean_cost
from hierens.inference.conformal import fit_prediction_sets
from support.networks import tiny_tree

MACS = (100, 140, 220, 380)


def made_up(images=4000, seed=0, classes=5):
    """Eight noisy networks that are surer and more often right the easier an image is; too sure of themselves."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    ease = torch.rand(images, 1, 1, generator=generator) * 3
    leaf = ease * F.one_hot(labels, classes)[:, None] + torch.randn(images, 8, classes, generator=generator)
    leaf = 2.5 * leaf
    nested = torch.stack([leaf[:, :n].mean(1) for n in (1, 2, 4, 8)], 1)
    return CalibrationSet(nested, leaf.argmax(-1), labels, MACS)


@pytest.mark.parametrize("measure", MEASURES[:3])
@pytest.mark.parametrize("budget", [100, 120, 170, 260, 380])
def test_a_budget_is_met_on_other_images_and_beats_fixed_depths(measure, budget):
    policy = calibrate(None, made_up(seed=0), budget, measure)
    test = made_up(seed=1)
    sure = test.certainties(measure)
    assert mean_cost(sure, policy.thresholds, MACS) == pytest.approx(budget, rel=0.03)
    left = exits(sure, policy.thresholds)
    right = test.logits.argmax(-1) == test.labels[:, None]
    accuracy = right[torch.arange(len(left)), left].float().mean()
    if budget in (120, 170, 260):
        depth = next(b for b in range(3) if MACS[b] <= budget < MACS[b + 1])
        share = (budget - MACS[depth]) / (MACS[depth + 1] - MACS[depth])
        fixed = right.float().mean(0)
        assert accuracy > fixed[depth] + share * (fixed[depth + 1] - fixed[depth]), "above the line of fixed depths"


def test_what_is_calibrated_is_what_the_policy_does():
    model = tiny_tree(4)
    images, labels = 3 * torch.randn(200, 1, 16, 16), torch.randint(10, (200,))
    batches = list(zip(images.split(50), labels.split(50), strict=True))
    answers = collect(model, batches)
    budget = sum(model.macs((1, 16, 16))[1:3]) / 2
    policy = calibrate(model, batches, budget)
    found = [policy(model, some) for some, _ in batches]
    macs = torch.cat([part.macs for part in found]).double()
    assert macs.mean() == pytest.approx(budget, rel=0.01) and macs.mean() <= budget
    sizes = torch.tensor([1, 2, 4, 8])[exits(answers.certainties("probability"), policy.thresholds)]
    assert torch.equal(torch.cat([part.leaves for part in found]), sizes)


@pytest.mark.parametrize("budget", [99, 381])
def test_a_budget_out_of_reach_is_refused(budget):
    with pytest.raises(ValueError, match="the budget must be from 100 to 380 MACs"):
        calibrate(None, made_up(100), budget)


def test_temperatures_lower_the_loss_and_leave_the_classes():
    fitted, test = fit_temperatures(made_up(seed=0)), made_up(seed=1)
    assert len(fitted.values) == 4 and all(value > 1 for value in fitted.values[:1]), "one network is too sure"
    for depth in range(4):
        before = F.cross_entropy(test.logits[:, depth], test.labels)
        p = fitted(test.logits[:, depth], depth)
        assert F.nll_loss(p.log(), test.labels) <= before + 1e-4
        assert torch.equal(p.argmax(-1), test.logits[:, depth].argmax(-1))
    again = fit_temperatures(CalibrationSet(test.logits / 2, test.votes, test.labels, MACS))
    twice = fit_temperatures(test)
    assert [2 * value for value in again.values] == pytest.approx(list(twice.values), rel=1e-3)


@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.3])
def test_prediction_sets_hold_the_class_as_often_as_promised(alpha):
    sets, test = fit_prediction_sets(made_up(seed=0), alpha), made_up(seed=1)
    sizes = []
    for depth in range(4):
        inside = sets(test.logits[:, depth], depth)
        missed = 1 - inside[torch.arange(len(test.labels)), test.labels].float().mean()
        assert missed <= alpha + 0.015
        assert inside.any(1).all()
        sizes.append(inside.sum(1).float().mean())
    assert sizes[-1] < sizes[0], "the full ensemble needs fewer classes"


def test_too_few_images_cannot_promise_much():
    with pytest.raises(ValueError, match=r"0.01 needs 99 images or more, got 50"):
        fit_prediction_sets(made_up(50), 0.01)
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        fit_prediction_sets(made_up(50), 1)


def test_nothing_to_calibrate_on():
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="no labelled image was seen"):
        collect(model, [])
