"""The controller of latency and agreement, with a clock of the test and a model whose predictions are its images."""

import copy
import json
import logging
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hierens.core.predictions import PredictionWeights
from hierens.core.protocol import Step
from hierens.inference.calibration import CalibrationSet
from hierens.inference.policies import LatencyObjective, from_dict, load_policy, save_policy
from hierens.inference.running_agreement import RunningAgreement
from support.clock import Clock


class Model:
    """An ensemble of four whose images (leaves, classes) are their leaf logits; a step takes 2 + N ms per leaf."""

    training, num_classes, leaves, sizes, depths = False, 2, 4, (1, 2, 4), 3
    prediction_weights = PredictionWeights((1, 2, 4))

    def __init__(self, clock=None):
        self.clock, self.slower = clock, 1

    def wait(self, images):
        if self.clock:
            self.clock.wait(self.slower * (2 + images) / 1e3)

    def __call__(self, x, reduce=False):
        for _ in range(4):
            self.wait(len(x))
        return x

    def anytime(self, x):
        for leaf in range(4):
            self.wait(len(x))
            kept = yield Step(leaf + 1, x[:, : leaf + 1].mean(1), leaf + 1, x[:, leaf])
            x = x if kept is None else x[kept]


def images(count, wrong=0.0, seed=0):
    """Images with random certainties, of class 1; the first network is wrong for a share of them, and certain too."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 4, 2, generator=generator) * torch.tensor([0.0, 4.0])
    flipped = torch.rand(count, generator=generator) < wrong
    x[flipped, 0, 0] = 2 * x[flipped, 0, 1] + 0.1
    x[flipped, 1:, 1] += 8
    return x


def predictions(x):
    return CalibrationSet(Model.prediction_weights(x), x.argmax(-1), torch.zeros(len(x)), (1, 2, 4), Model.sizes)


def controller(model=None, target_ms=100.0, agreement=0.9, wrong=0.02, **settings):
    policy = LatencyObjective.from_calibration(predictions(images(300, wrong)), target_ms, agreement, **settings)
    if model:
        policy.learn(model, images(1))
    return policy


@pytest.fixture
def model(monkeypatch):
    return Model(Clock(monkeypatch))


def test_times_are_measured_for_every_depth_and_batch_size(model):
    policy = controller(model, max_batch=4)
    assert policy.to_dict()["times_ms"] == [pytest.approx([k * (2 + n) for k in (1, 2, 4)]) for n in (1, 2, 4)]


def test_without_load_the_target_decides_how_deep_it_is(model):
    """At full depth, one image takes 12 ms, and the next may have to wait for it: with reserves, 62 ms are enough."""
    expected = []
    for target_ms in (200, 62, 32, 8):
        policy = controller(model, target_ms)
        policy.batch_size(1)
        expected.append(policy.metrics()["expected_agreement"])
    assert expected[0] == expected[1] == 1 > expected[2] > expected[3] and policy.metrics()["overloaded"] == 0


def test_a_queue_makes_it_faster_and_overload_fastest(model, caplog):
    caplog.set_level(logging.INFO, "hierens")
    policy = controller(model)
    shallow, batches = [], []
    for waiting in (1, 20, 60, 200):
        batches.append(policy.batch_size(waiting, oldest_ms=20))
        shallow.append(policy(model, images(batches[-1], seed=1)).leaves.double().mean().item())
    assert shallow == sorted(shallow, reverse=True) and shallow[0] == 4 and shallow[-1] == 1
    assert batches[0] < batches[-1] == 32 and policy.metrics()["overloaded"] == 1
    assert "expected agreement" in caplog.text and "200 images wait" not in caplog.text, "at most one line per second"
    model.clock.wait(10)
    policy.batch_size(1)
    assert policy(model, images(8)).leaves.tolist() == [4] * 8, "and back"


def test_requests_that_have_waited_are_not_kept_waiting(model):
    policy = controller(model)
    policy.batch_size(1, oldest_ms=75)
    assert policy(model, images(1)).leaves.tolist() < [4] and policy.batch_size(1, oldest_ms=0)


def test_the_rate_of_arrivals_counts_before_they_queue(model):
    policy = controller(model)
    for _ in range(100):
        policy.batch_size(16)
        policy(model, images(16))
    busy = policy.metrics()
    assert busy["rate"] > 200 and busy["expected_agreement"] < 1
    model.clock.wait(10)
    policy.batch_size(1)
    assert policy.metrics()["rate"] < 1 and policy.metrics()["expected_agreement"] == 1


def test_it_follows_a_machine_that_becomes_slower(model):
    policy = controller(model)
    policy.batch_size(1)
    assert policy.metrics()["expected_agreement"] == 1
    model.slower = 4
    for _ in range(100):
        policy(model, images(8))
    assert policy.metrics()["slowdown"] == pytest.approx(4, rel=0.05)
    policy.batch_size(1)
    assert policy.metrics()["expected_agreement"] < 1


def test_late_requests_leave_less_of_the_target_to_plan_until_the_percentile_is_met(model):
    policy = controller(model, percentile=90)
    policy.batch_size(1)
    start = policy.metrics()["margin"]
    policy.observe([101] * 5)
    assert policy.metrics()["margin"] == pytest.approx(start - 0.02 * 0.9 * 5)
    policy.observe([99] * 45)
    assert policy.metrics()["margin"] == pytest.approx(start), "5 of 50 were late, as 90 % allow"
    policy.observe([1] * 1000)
    assert policy.metrics()["margin"] == 1
    policy.batch_size(10_000)
    policy.observe([999] * 1000)
    assert policy.metrics()["margin"] == 1, "what is late under overload says nothing about the plan"


def serve(policy, model, count, wrong, seed):
    """Predict images under a load that leaves time for the shadow; the share of images that agreed."""
    agreed = 0
    for start in range(0, count, 16):
        batch = images(16, wrong, seed + start)
        policy.batch_size(16)
        found = policy(model, batch)
        agreed += int((found.logits.argmax(1) == batch.mean(1).argmax(1)).sum())
        model.clock.wait(0.05)
        while policy.shadow(model):
            pass
    return agreed / count


def test_drift_is_noticed_and_points_are_fitted_anew_until_the_agreement_holds(model, caplog):
    caplog.set_level(logging.INFO, "hierens")
    policy = controller(model, agreement=0.9, shadow_share=0.2, window=200)
    assert serve(policy, model, 1600, 0.02, 0) > 0.95
    before = policy.metrics()
    assert before["drifts"] == 0 and before["agreement_low"] > 0.9
    assert 320 <= before["shadowed"] < 480, "a fifth of the images, and more until their agreement is known"
    assert serve(policy, model, 48, 0.8, 10_000) < 0.9, "images of which the first network is certain and wrong"
    assert serve(policy, model, 1600, 0.8, 20_000) > 0.95
    after = policy.metrics()
    assert after["drifts"] >= 1 and after["agreement_low"] > 0.9 and after["refits"] > before["refits"]
    assert "drift: agreement" in caplog.text and "re-fit on" in caplog.text
    assert policy(model, images(320)).leaves.double().mean() > 1.8
    serve(policy, model, 1600, 0.02, 40_000)
    assert policy(model, images(320)).leaves.double().mean() < 1.2, "when images are as before, they leave as early"


def test_the_shadow_waits_until_there_is_time_and_keeps_few_images(model):
    policy = controller(model, shadow_share=1.0)
    policy.batch_size(1)
    policy(model, images(7))
    assert policy.shadow(model) == 0, "too few for a batch"
    policy(model, images(100))
    assert policy.shadow(model, waiting=100) == policy.shadow(model, waiting=1, oldest_ms=90) == 0
    taken = [policy.shadow(model) for _ in range(9)]
    assert taken == [8] * 8 + [0] and policy.metrics()["shadowed"] == 64, "of the rest, the oldest were dropped"
    assert policy.metrics()["agreement"] == 1 and policy.metrics()["shadow_s"] > 0
    assert policy.metrics()["busy_s"] == pytest.approx(sum(4 * (2 + n) for n in (7, 100)) / 1e3)


@pytest.mark.parametrize(("agreed", "every"), [([], 2), ([True] * 100, 10), ([True] * 39, 2), ([True, False] * 50, 2)])
def test_which_images_are_compared_does_not_depend_on_the_batches(model, agreed, every):
    kept = []
    for sizes in ((50,), (1,) * 50, (7, 30, 13)):
        policy, x = controller(model, shadow_share=0.1), images(50)
        for one in agreed:
            policy._state.values["running"].add(one, 1.0)
        for batch in x.split(sizes):
            policy(model, batch)
        kept.append([int((x == image).flatten(1).all(1).nonzero()) for image, *_ in policy._state.values["pending"]])
    assert kept == [list(range(0, 50, every))] * 3, "four times as many while the agreement is unknown or low"


def test_what_it_learned_survives_a_restart(model, tmp_path):
    policy = controller(model, shadow_share=0.5, window=100)
    serve(policy, model, 320, 0.3, 0)
    save_policy(policy, tmp_path)
    again = load_policy(tmp_path)
    assert again == policy == from_dict(json.loads(json.dumps(policy.to_dict())))
    assert again.to_dict() == policy.to_dict() != controller(model, shadow_share=0.5, window=100).to_dict()
    assert len(again.certainties) == 100 and (tmp_path / "policy.json").stat().st_size < 50_000
    expected = []
    for one in (again, from_dict(again.to_dict())):
        one.batch_size(30)
        expected.append(one.metrics()["expected_agreement"])
    assert expected[0] == expected[1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
def test_a_copy_has_a_state_of_its_own(model, copied):
    policy = controller(model)
    other = copied(policy)
    assert other == policy and hash(other) == hash(policy)
    policy(model, images(50))
    policy.batch_size(10_000)
    assert other.metrics()["overloaded"] == 0 and len(repr(policy)) < 300


VALUES = {"policy": "latency", "target_ms": 5, "agreement": 0.9, "certainties": [[0.5, 0.9]], "classes": [[0, 1]]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target_ms": 0}, "target_ms must be positive, got 0"),
        ({"target_ms": None}, "target_ms must be a number, got None"),
        ({"agreement": 97}, "agreement must be a number from 0 to 1, got 97"),
        ({"percentile": 1}, "percentile must be a number from 50 to 99.99, got 1"),
        ({"shadow_share": 0}, "shadow_share must be a number from 0.0001 to 1, got 0"),
        ({"max_batch": 12}, "max_batch must be a power of two, got 12"),
        ({"window": 10**9}, "window must be a whole number from 1 to 10000"),
        ({"measure": "luck"}, "measure must be one of probability"),
        ({"certainties": []}, "certainties must be 1 to 500 rows .* got 0"),
        ({"certainties": [[0.5, 0.9]] * 501}, "certainties must be 1 to 500 rows .* got 501"),
        ({"certainties": [[0.5]]}, "of two depths or more"),
        ({"certainties": [[0.5, 90]]}, r"certainties must be rows .* got \[\[0.5, 90\]\]"),
        ({"certainties": "0.5"}, "certainties must be rows"),
        ({"certainties": [[0.5, 0.9], [0.5]]}, "certainties must be rows of equal length"),
        ({"classes": [[0, 1], [0, 1]]}, "classes must be 1 rows of 2"),
        ({"classes": [[0, "1"]]}, "classes must be rows"),
        ({"times_ms": [[1.0, 2.0]]}, "times_ms must be 6 rows of 2"),
        ({"times_ms": [[1.0, -2.0]] * 6}, "times_ms must be rows"),
        ({"deep": 1}, "not deep"),
    ],
)
def test_bad_values_are_named(changed, message):
    from_dict(VALUES)
    with pytest.raises(ValueError, match=message):
        from_dict({**VALUES, **changed})


def test_it_is_learned_first_and_for_a_model_of_as_many_depths(model):
    for call in (lambda policy: policy.batch_size(1), lambda policy: policy(model, images(1))):
        with pytest.raises(ValueError, match=r"call policy.learn\(model, images\) first"):
            call(controller())
    with pytest.raises(ValueError, match="calibrated for 2 depths, and the model has 3"):
        from_dict(VALUES).learn(model, images(1))


def test_threads_share_it():
    policy, model, batch = controller(shadow_share=0.5, window=100), Model(), images(8, 0.1)
    policy.learn(model, batch)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def use(_):
        for _ in range(20):
            policy.batch_size(8)
            assert policy(model, batch).logits.shape == (8, 2)
            policy.shadow(model)
            policy.observe([1.0])
            json.dumps([policy.to_dict(), policy.metrics()])

    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(use, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert policy._state.values["images"] == 4 * 20 * 8 and len(policy.to_dict()["classes"]) == 100


def test_an_interval_holds_the_share_and_drift_is_a_significant_difference():
    running = RunningAgreement()
    assert not running.drifted(1.0) and running.interval()[::2] == (0, 1)
    for number in range(60):
        running.add(number % 10 > 0, 0.9)
    low, mean, high = running.interval()
    assert low < 0.9 < high and mean == pytest.approx(0.9, abs=0.02) and not running.drifted(0.95)
    for number in range(60):
        running.add(number % 10 > 4, 0.9)
    assert running.drifted(0.95) and not running.drifted(0.5), "below what was expected, but above the bound"
    better = RunningAgreement()
    for _ in range(100):
        better.add(True, 0.8)
    assert better.drifted(0.5), "better than expected: there is time to save"
