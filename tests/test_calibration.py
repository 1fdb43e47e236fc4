"""Thresholds, temperatures and prediction sets chosen on one half keep their promise on the other."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import hierens
from hierens.evaluation.uncertainty import MEASURES
from hierens.inference import calibration
from hierens.inference.calibration import (
    CalibrationSet,
    budgeted_batch,
    calibrate,
    collect,
    exits,
    fit_temperatures,
    mean_cost,
)
from hierens.inference.conformal import fit_prediction_sets
from hierens.inference.expectation import expectation, expectations_of_depths
from support.networks import tiny_backbone, tiny_tree

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


def test_an_accuracy_is_reached_at_the_lowest_cost():
    held_out = made_up()
    depths = [one.accuracy.mean for one in expectations_of_depths(held_out)]
    wanted = (depths[1] + depths[2]) / 2
    found = expectation(held_out, calibrate(None, held_out, accuracy=wanted))
    assert wanted <= found.accuracy.mean < wanted + 0.3
    cheaper = expectation(held_out, calibrate(None, held_out, budget=found.macs.mean * 0.97))
    assert cheaper.accuracy.mean < wanted and found.macs.mean < MACS[2]
    on_others = expectation(made_up(seed=1), calibrate(None, held_out, accuracy=wanted)).accuracy
    assert abs(on_others.mean - wanted) < 4 * on_others.error
    assert expectation(held_out, calibrate(None, held_out, accuracy=depths[0] - 1)).macs.mean == MACS[0]


def test_an_accuracy_out_of_reach_is_refused_with_the_best_one():
    held_out = made_up()
    with pytest.raises(ValueError, match=r"at most (\d+\.\d\d) %, .* on these 4,000 images, got 99.9 %") as refused:
        calibrate(None, held_out, accuracy=99.9)
    best = float(str(refused.value).split()[6])
    found = expectation(held_out, calibrate(None, held_out, accuracy=best))
    assert found.accuracy.mean == pytest.approx(best, abs=0.05)
    with pytest.raises(ValueError, match=r"in percent, above 1 and at most 100, got 0.9"):
        calibrate(None, held_out, accuracy=0.9)


def test_milliseconds_are_a_budget_too():
    held_out = dataclasses.replace(made_up(), times=torch.tensor([[2.0], [3.0], [5.0], [9.0]]))
    policy = calibrate(None, held_out, milliseconds=4)
    assert expectation(held_out, policy).milliseconds.mean == pytest.approx(4, rel=0.01)
    with pytest.raises(ValueError, match=r"from 2 to 9 milliseconds per image, got 1\.$"):
        calibrate(None, held_out, milliseconds=1)
    with pytest.raises(ValueError, match="timed=True"):
        calibrate(None, made_up(100), milliseconds=4)


def test_95_of_100_images_are_faster_than_the_95th_percentile():
    slow = torch.linspace(0, 1, 20)  # the deepest networks are sometimes slower than their median
    held_out = dataclasses.replace(made_up(), times=torch.tensor([[2.0], [3.0], [5.0], [9.0]]) + slow)
    policies = {limit: calibrate(None, held_out, p95_milliseconds=limit) for limit in (3.9, 5.5, 9.6)}
    for limit, policy in policies.items():
        left = exits(held_out.certainties(policy.measure), policy.thresholds)
        seen = held_out.times[left].flatten()  # every image as often as times were measured
        assert (seen <= limit).double().mean() >= 0.95
        found = expectation(held_out, policy).p95_milliseconds
        assert found.mean == seen.sort().values[-(-95 * len(seen) // 100) - 1] <= limit
    shares = [expectation(held_out, policy).leaves.mean for policy in policies.values()]
    assert shares == sorted(shares) and shares[0] > 1, "as many networks as the limit allows"
    with pytest.raises(ValueError, match=r"from 2\.95 milliseconds, .* to 9\.95, if none leaves early, got 1\.$"):
        calibrate(None, held_out, p95_milliseconds=1)


def test_the_error_of_a_time_is_that_of_images_and_of_measurements():
    held_out = made_up(400)
    policy = calibrate(None, held_out, budget=200)
    left = exits(held_out.certainties(policy.measure), policy.thresholds)
    exact = torch.tensor([2.0, 3.0, 5.0, 9.0])[:, None].expand(4, 30)
    found = expectation(dataclasses.replace(held_out, times=exact), policy)
    of_images = float(exact[:, 0].double()[left].std()) / 20
    assert found.milliseconds.error == pytest.approx(of_images, rel=0.1), "the bootstrap gives what the formula gives"
    noisy = exact + torch.linspace(-1, 1, 30)
    assert expectation(dataclasses.replace(held_out, times=noisy), policy).milliseconds.error > 1.1 * of_images


@pytest.mark.parametrize("targets", [{}, {"budget": 200, "accuracy": 90}])
def test_there_is_one_target(targets):
    with pytest.raises(ValueError, match="give one of budget="):
        calibrate(None, made_up(100), **targets)


MODELS = {
    "tree": lambda: tiny_tree(3),
    "exits": lambda: hierens.multi_exit(tiny_backbone(), 3).eval(),
    "tree with exits": lambda: hierens.tree_with_exits(tiny_backbone(), 3).eval(),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_time_of_a_depth_is_that_of_an_image_that_leaves_there(kind, monkeypatch):
    model = MODELS[kind]()
    monkeypatch.setattr(calibration, "call_ms", lambda call, device, seconds: float(call().leaves))
    batch = torch.randn(12, 1, 16, 16), torch.arange(12) % 10
    held_out = collect(model, [batch], timed=True)
    assert held_out.milliseconds == model.sizes and collect(model, [batch]).milliseconds == ()
    policy = calibrate(model, [batch], milliseconds=model.sizes[0])
    assert policy(model, batch[0]).leaves.tolist() == [model.sizes[0]] * 12


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_simulated_is_what_images_that_leave_cost(kind):
    model = MODELS[kind]()
    images = 3 * torch.randn(90, 1, 16, 16)
    answers = collect(model, [(images, torch.arange(90) % 10)])
    for policy in budgeted_batch(answers, (0, 0.2, 0.5, 1)):
        left = exits(answers.certainties("probability"), policy.thresholds)
        found = policy(model, images)
        assert torch.equal(found.leaves, torch.tensor(model.sizes)[left])
        assert torch.equal(found.macs, torch.tensor(answers.macs)[left])
        torch.testing.assert_close(found.logits, answers.logits[torch.arange(90), left])


def test_the_shares_that_leave_are_geometric():
    held_out, budgets = made_up(), (0.1, 0.3, 0.5)
    policies = budgeted_batch(held_out, budgets)
    for policy, share in zip(policies, budgets, strict=True):
        first, *middle, last = exits(held_out.certainties("probability"), policy.thresholds).bincount().tolist()
        ratio = (last / first) ** (1 / 3)
        assert middle == pytest.approx([first * ratio, first * ratio**2], abs=8), "of 4,000 images"
        assert policy == calibrate(None, held_out, budget=100 + share * 280)
    assert len({policy.thresholds for policy in policies}) == 3


def test_shares_of_the_cost_are_from_0_to_1():
    with pytest.raises(ValueError, match=r"from 0 \(cost of the first depth\) to 1 \(full cost\), got 20"):
        budgeted_batch(made_up(100), (0.5, 20))
    with pytest.raises(ValueError, match="a single depth"):
        budgeted_batch(dataclasses.replace(made_up(100), macs=(100,)), (0.5,))


def test_halves_share_no_image_and_have_all_classes():
    whole = dataclasses.replace(made_up(101), labels=torch.arange(101) % 5)
    one, other = whole.halves(seed=3)
    assert len(one.labels) == 51 and len(other.labels) == 50
    assert (one.labels.bincount() - other.labels.bincount()).abs().max() <= 1
    assert torch.equal(torch.cat([one.logits, other.logits]).sum((1, 2)).sort()[0], whole.logits.sum((1, 2)).sort()[0])
    assert torch.equal(whole.halves(seed=3)[0].logits, one.logits)
    assert not torch.equal(whole.halves(seed=4)[0].logits, one.logits)
    with pytest.raises(ValueError, match="at least 2 labelled images, got 1"):
        made_up(1).halves()


def test_an_expectation_is_what_the_policy_does():
    model = tiny_tree(3)
    images, labels = 3 * torch.randn(60, 1, 16, 16), torch.randint(10, (60,))
    held_out = collect(model, [(images, labels)])
    policy = calibrate(model, held_out, budget=sum(model.macs((1, 16, 16))[:2]) / 2)
    found, done = expectation(held_out, policy), policy(model, images)
    right = (done.logits.argmax(-1) == labels).double()
    added = torch.cat([right, torch.tensor([0.0, 0.0, 1.0, 1.0])])
    assert found.accuracy.mean == pytest.approx(100 * float(right.mean()))
    assert found.accuracy.error == pytest.approx(100 * float(added.var(correction=0) / 64) ** 0.5)
    for estimate, values in ((found.macs, done.macs), (found.leaves, done.leaves)):
        assert estimate.mean == pytest.approx(float(values.double().mean()))
        assert estimate.error == pytest.approx(float(values.double().var() / 60) ** 0.5)
    assert found.images == 60 and found.milliseconds is None


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


def test_labels_of_other_classes_are_refused():
    with pytest.raises(ValueError, match="image 1 of a batch has the label 10"):
        collect(tiny_tree(2), [(torch.randn(2, 1, 16, 16), torch.tensor([0, 10]))])


def test_nothing_to_calibrate_on():
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="no labelled image was seen"):
        collect(model, [])
