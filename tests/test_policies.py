"""Policies: what each decides, that it costs what it says, and that they survive being saved."""

import copy
import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
import timm
import torch

import hierens
from hierens.core.fetching import LoadError
from hierens.core.protocol import Step
from hierens.evaluation.uncertainty import MEASURES, certainty
from hierens.inference.policies import (
    Confidence,
    Deadline,
    FixedDepth,
    Load,
    from_dict,
    load_policy,
)
from support.clock import Clock
from support.networks import tiny_tree


@pytest.fixture(scope="module")
def model():
    return tiny_tree(4)


@pytest.fixture(scope="module")
def images():
    return 3 * torch.randn(24, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def test_images_can_leave_an_anytime_walk(model, images):
    walk = model.anytime(images)
    step, rows = next(walk), torch.arange(24)
    for kept in (torch.arange(0, 24, 2), None, torch.tensor([0, 3, 4, 11]), None, torch.tensor([1]), None, None):
        rows = rows if kept is None else rows[kept]
        step = walk.send(kept)
        assert torch.allclose(step.logits, model(images[rows], leaves=step.leaves), atol=1e-5)
        assert torch.allclose(step.newest, model(images[rows], reduce=False)[:, step.leaves - 1], atol=1e-5)
    assert step.leaves == 8


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}),
        ("crossvit_tiny_240", {"depth": ((1, 1, 0),) * 3}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "depths": (1, 1, 2, 1), "embed_dim": 24}),
    ],
)
def test_images_can_leave_whatever_crosses_the_cuts(name, args):
    network = hierens.hierensify(timm.create_model(name, num_classes=3, **args), 2).eval()
    network.break_symmetry(0.1)
    x = torch.randn(3, *network.pretrained_cfg["input_size"])
    walk = network.anytime(x)
    next(walk)
    step = walk.send(torch.tensor([0, 2]))
    assert torch.allclose(step.logits, network(x[[0, 2]]), atol=1e-4)


def test_a_fixed_depth_is_forward(model, images):
    for policy, leaves in ((FixedDepth(1), 2), (FixedDepth(leaves=5), 5), (FixedDepth(), 8)):
        found = policy(model, images)
        assert torch.equal(found.logits, model(images, leaves=leaves))
        assert found.leaves.tolist() == [leaves] * 24
        assert found.macs[0] == model.tree.cost(model.branch_macs((1, 16, 16)), leaves)


@pytest.mark.parametrize("measure", MEASURES)
def test_every_image_gets_the_answer_of_the_depth_it_left_at(model, images, measure):
    leaf_logits = model(images, reduce=False).detach()
    votes = leaf_logits.argmax(-1)
    sizes = (1, 2, 4, 8)
    sure = [certainty(leaf_logits[:, :n].mean(1), votes[:, :n], measure) for n in sizes]
    thresholds = tuple(float(values.median()) + 1e-3 for values in sure[:3])
    found = Confidence(thresholds, measure)(model, images)
    macs = model.macs((1, 16, 16))
    for image in range(24):
        left = next((b for b in range(3) if sure[b][image] >= thresholds[b]), 3)
        assert found.leaves[image] == sizes[left] and found.macs[image] == macs[left]
        assert torch.allclose(found.logits[image], leaf_logits[image, : sizes[left]].mean(0), atol=1e-5)
    if measure != "agreement":
        assert len(set(found.leaves.tolist())) >= 3, "some leave early and some late"


def test_thresholds_at_the_ends(model, images):
    assert Confidence((-1.0,))(model, images).leaves.tolist() == [1] * 24
    assert Confidence((2.0,))(model, images).leaves.tolist() == [8] * 24
    assert torch.allclose(Confidence((2.0,))(model, images).logits, model(images), atol=1e-5)


class Timed(torch.nn.Module):
    """An ensemble whose leaves take a time by a clock of the test."""

    def __init__(self, model, clock, milliseconds):
        super().__init__()
        self.model, self.clock, self.milliseconds = model, clock, milliseconds
        self.leaves, self.cost = model.leaves, model.cost

    def anytime(self, x):
        for step in self.model.anytime(x):
            self.clock.wait(self.milliseconds / 1e3)
            yield step


def test_a_deadline_uses_its_time_and_is_kept(model, images, monkeypatch):
    timed, policy = Timed(model, Clock(monkeypatch), 20).eval(), Deadline(10_000)
    policy.learn(timed, images)
    for milliseconds, leaves in ((1, 1), (50, 2), (75, 3), (90, 4), (130, 6)):
        found = policy.within(timed, images, milliseconds)
        assert found.leaves[0] == leaves
        assert torch.allclose(found.logits, model(images, leaves=leaves), atol=1e-5)
    assert policy(timed, images).leaves[0] == 8


@pytest.mark.parametrize("slower", [40, 60, 200])
def test_where_steps_become_slower_a_deadline_is_missed_by_one_of_them_at_most(model, images, monkeypatch, slower):
    clock = Clock(monkeypatch)
    timed, policy = Timed(model, clock, 20).eval(), Deadline(10_000)
    policy.learn(timed, images)
    timed.milliseconds = slower
    for milliseconds in (50, 75, 100, 130):
        start = clock.now
        policy.within(timed, images, milliseconds)
        assert 1e3 * (clock.now - start) <= milliseconds + slower


def test_a_deadline_needs_no_learning_beforehand(model, images):
    assert Deadline(0.001)(model, images).leaves[0] == 1
    assert Deadline(10_000)(model, images).leaves[0] == 8


def test_load_lowers_the_depth_at_once_and_raises_it_with_patience(model, images):
    policy = Load(max_depth=3, queue_high=4, queue_low=1, patience=5)
    assert policy(model, images).leaves[0] == 8
    assert [policy.observe(9) for _ in range(5)] == [2, 1, 0, 0, 0]
    assert policy(model, images).leaves[0] == 1
    assert [policy.observe(3) for _ in range(10)] == [0] * 10, "between the thresholds nothing changes"
    assert [policy.observe(0) for _ in range(10)] == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2]
    assert [policy.observe(queue) for queue in (0, 0, 0, 3, 0, 0, 0)] == [2] * 7, "calm must last"


def test_late_answers_lower_the_depth_too():
    policy = Load(max_depth=2, target_ms=100, patience=3)
    assert policy.observe(0, latency_ms=150) == 1
    assert [policy.observe(0, latency_ms=150) for _ in range(4)] == [1, 1, 1, 0], "not before the fall has shown"
    assert [policy.observe(0, latency_ms=80) for _ in range(10)] == [0] * 10, "on target, but with nothing to spare"
    assert [policy.observe(0, latency_ms=20) for _ in range(3)][-1] == 0
    for _ in range(110):  # the window forgets
        policy.observe(0, latency_ms=20)
    assert policy.depth == 2


@pytest.mark.parametrize(
    "policy",
    [
        FixedDepth(2),
        FixedDepth(leaves=3),
        Deadline(12.5, caution=2.0),
        Load(3, target_ms=50.0, patience=7),
        Confidence((0.9, 0.8), "margin"),
    ],
)
def test_policies_are_saved_beside_the_model(policy, model, tmp_path):
    model.save_pretrained(tmp_path, policy=policy)
    assert load_policy(tmp_path) == load_policy(tmp_path / "policy.json") == policy
    assert from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Deadline(0), "milliseconds must be positive, got 0"),
        (lambda: Confidence(()), "at least one number"),
        (lambda: Confidence((90, 80)), "which are from 0 to 1, got 90.0"),
        (lambda: Confidence((0.9, -0.1), "entropy"), "which are from 0 to 1, got -0.1"),
        (lambda: Confidence((float("nan"),), "margin"), "thresholds"),
        (lambda: from_dict({"policy": "confidence", "thresholds": [1.5]}), "which are from 0 to 1, got 1.5"),
        (lambda: Confidence((0.5,), "luck"), "measure must be one of probability, margin"),
        (lambda: Load(3, queue_low=8, queue_high=8), "queue_low must be below queue_high"),
        (lambda: Load(3, target_ms=-1), "target_ms must be positive"),
        (lambda: from_dict({"policy": "luck"}), "no policy 'luck': choose fixed, deadline, load, confidence"),
        (lambda: from_dict({"policy": "fixed", "deep": 1}), "takes depth, leaves, not deep"),
        (lambda: from_dict({"policy": "deadline"}), "do not fit"),
        (lambda: load_policy("/nowhere"), "not a local directory"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("measure", MEASURES)
def test_certainties_lie_from_0_to_1_so_that_thresholds_must(measure):
    logits = torch.cat([torch.zeros(1, 5), 200 * torch.eye(5), torch.randn(50, 5)])
    for votes in (logits.argmax(-1)[:, None], torch.randint(5, (56, 4))):
        sure = certainty(logits, votes, measure)
        assert sure.min() >= -1e-6 and sure.max() <= 1 + 1e-6


def test_more_thresholds_than_depths_are_refused(model, images):
    with pytest.raises(ValueError, match="4 thresholds are for a model of 5 depths, and this one has 4"):
        Confidence((0.9, 0.8, 0.7, 0.6))(model, images)
    small = model.at_depth(1)
    with pytest.raises(ValueError, match="3 thresholds are for a model of 4 depths, and this one has 2"):
        Confidence((0.9, 0.8, 0.7))(small, images)
    assert Confidence((0.9,))(model.at_depth(0), images).leaves.tolist() == [1] * 24


@pytest.mark.parametrize("policy", [FixedDepth(0), Deadline(1000), Load(1), Confidence((0.5,))])
def test_a_model_in_training_mode_is_refused_and_left_alone(model, images, policy):
    training = copy.deepcopy(model).train()
    before = {name: tensor.clone() for name, tensor in training.state_dict().items()}
    with pytest.raises(ValueError, match=r"the model is in training mode: call model.eval\(\)"):
        policy(training, images)
    assert all(module.training for module in training.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.state_dict().items())


def test_a_model_without_a_policy_and_a_file_that_holds_none(tmp_path):
    with pytest.raises(LoadError, match="holds no policy"):
        load_policy(tmp_path)
    assert load_policy(tmp_path, FixedDepth(1)) == FixedDepth(1)
    for text, message in (("{", "cannot be read"), ("[]", "holds no policy")):
        (tmp_path / "policy.json").write_text(text)
        with pytest.raises(LoadError, match=message):
            load_policy(tmp_path, FixedDepth(1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": "fixed", "depth": "1"}, "depth must be a whole number from 0 to 1000000, got '1'"),
        ({"policy": "fixed", "depth": True}, "depth must be a whole number .*, got True"),
        ({"policy": "fixed", "depth": 1.0}, "depth must be a whole number .*, got 1.0"),
        ({"policy": "fixed", "depth": -1}, "depth must be a whole number .*, got -1"),
        ({"policy": "fixed", "leaves": 0}, "leaves must be a whole number from 1 .*, got 0"),
        ({"policy": "fixed", "depth": 1, "leaves": 2}, "depth or leaves, not both"),
        ({"policy": "deadline", "milliseconds": "5"}, "milliseconds must be positive, got '5': a finite number"),
        ({"policy": "deadline", "milliseconds": None}, "milliseconds and caution must be positive, got None"),
        ({"policy": "deadline", "milliseconds": 10**400}, "milliseconds must be positive, got 1000"),
        (
            {"policy": "load", "max_depth": 2, "window": 10**9},
            "window must be a whole number from 1 to 10000, got 1000",
        ),
        ({"policy": "load", "max_depth": 2, "patience": 0.5}, "patience must be a whole number"),
        ({"policy": "load", "max_depth": [2]}, r"max_depth must be a whole number .*, got \[2\]"),
        ({"policy": "load", "max_depth": 2, "relax": 2}, "relax must be between 0 and 1, got 2"),
        ({"policy": "confidence", "thresholds": "0.9"}, "thresholds must be 1 to 4096 numbers, got '0.9'"),
        ({"policy": "confidence", "thresholds": [[0.9]]}, r"thresholds must be .*, got \[\[0.9\]\]"),
        ({"policy": "confidence", "thresholds": [0.9] * 10_000}, "thresholds must be 1 to 4096 numbers"),
        ({"policy": "confidence", "thresholds": [True]}, "thresholds must be"),
        ({"policy": "confidence", "thresholds": [0.9], "measure": ["margin"] * 9999}, "measure must be one of .*, got"),
        ({"policy": ["fixed"] * 9999}, "there is no policy"),
        ({"policy": "fixed", "a\nb" * 999: 1}, "takes depth, leaves, not a"),
    ],
)
def test_a_strangers_policy_is_refused_in_a_line_that_names_the_field(tmp_path, values, message):
    (tmp_path / "policy.json").write_text(json.dumps(values))
    with pytest.raises(LoadError, match=message) as refused:
        load_policy(tmp_path)
    text = str(refused.value)
    assert (
        text.startswith(f"{tmp_path / 'policy.json'} holds no usable policy: ") and "\n" not in text and len(text) < 500
    )


@pytest.mark.parametrize("text", ["[" * 100_000, '{"policy": "deadline", "milliseconds": NaN}', "{}" + " " * 2**23])
def test_what_is_no_json_is_no_policy(tmp_path, text):
    (tmp_path / "policy.json").write_text(text)
    with pytest.raises(LoadError, match=r"policy.json is (not valid JSON|8 MB long)"):
        load_policy(tmp_path)


def in_threads(call, threads=8):
    """What each thread's calls returned."""
    with ThreadPoolExecutor(threads) as pool:
        return [future.result() for future in [pool.submit(call, thread) for thread in range(threads)]]


@pytest.fixture(scope="module", params=["fused", "grouped"])
def shared(request, model):
    if request.param == "fused":
        return model.fuse()
    grouped = copy.deepcopy(model)
    grouped.set_executor("grouped")
    return grouped


@pytest.mark.parametrize(
    "policy",
    [
        FixedDepth(2),
        FixedDepth(leaves=3),
        Confidence((0.5, 0.6, 0.7)),
        Confidence((0.8,), "agreement"),
        Deadline(1e6),
        Deadline(2.0),
        Load(2, target_ms=50.0, patience=2, queue_high=4),
    ],
    ids=repr,
)
def test_threads_share_a_policy_and_a_model(shared, images, policy):
    batches = [images[start : start + 1 + size] for start, size in ((0, 0), (3, 4), (9, 2), (12, 11))]
    alone = {leaves: [shared(batch, leaves=leaves, reduce=True) for batch in batches] for leaves in range(1, 9)}
    sure = isinstance(policy, (FixedDepth, Confidence))
    expected = [policy(shared, batch) for batch in batches] if sure else []

    def calls(thread):
        random = Random(thread)
        for call in range(25):
            which = random.randrange(len(batches))
            if isinstance(policy, Load):
                policy.observe(random.randrange(7), random.random() * 100)
            if isinstance(policy, Deadline) and call == 12:
                policy.learn(shared, batches[which], repeats=2)
            found = policy(shared, batches[which])
            if sure:
                assert torch.equal(found.leaves, expected[which].leaves)
                assert torch.equal(found.macs, expected[which].macs)
                assert torch.allclose(found.logits, expected[which].logits, atol=1e-5)
            else:
                leaves = int(found.leaves[0])
                assert torch.allclose(found.logits, alone[leaves][which], atol=1e-5)
                assert found.macs[0] == shared.cost(leaves, tuple(images.shape[1:]))

    with torch.no_grad():
        in_threads(calls)


@pytest.fixture
def hasty_threads():
    """Threads that give way to each other at every occasion."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_threads_do_not_corrupt_what_a_load_policy_keeps_in_mind(hasty_threads):
    """Every observation counts once: of 8 threads' calm ones exactly every fifth lets the depth rise."""
    policy = Load(100_000, target_ms=100.0, patience=5, window=3)
    for _ in range(20_000):
        policy.observe(queue=9)
    assert policy.depth == 80_000

    def observe(thread):
        for call in range(5_000):
            policy.observe(0, latency_ms=1.0)
            assert call % 500 or copy.deepcopy(policy).depth >= 80_000

    in_threads(observe)
    assert policy.depth == 80_000 + 8 * 5_000 // 5


def test_threads_do_not_corrupt_what_a_deadline_keeps_in_mind(hasty_threads):
    policy = Deadline(10.0)

    class Model:
        """Of one leaf, for images of many sizes."""

        training, leaves = False, 1

        def anytime(self, x):
            logits = torch.zeros(len(x), 2)
            yield Step(1, logits, 1, logits)

        def cost(self, leaves, size):
            return 1

    def learn(thread):
        for call in range(100):
            policy(Model(), torch.empty(1, 1, 1 + thread, 1 + call))
            policy.learn(Model(), torch.empty(1, 2, 1, 1), repeats=1)
            assert call % 10 or pickle.loads(pickle.dumps(policy)) == policy

    in_threads(learn)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda policy: pickle.loads(pickle.dumps(policy))])
@pytest.mark.parametrize("policy", [FixedDepth(1), Deadline(5.0), Load(2, target_ms=5.0), Confidence((0.5,))])
def test_policies_are_copied_and_pickled(model, images, policy, copied):
    policy = from_dict(policy.to_dict())
    policy(model, images)
    if isinstance(policy, Load):
        policy.observe(99, 10.0)
    other = copied(policy)
    assert other == policy and hash(other) == hash(policy) and repr(other) == repr(policy)
    assert other(model, images).logits.shape == (24, 10)
    if isinstance(policy, Load):
        assert other.depth == policy.depth == 1 and other.observe(99) == 0
        assert policy.depth == (0 if copied is copy.copy else 1), "a deep copy has a state of its own"


@pytest.mark.parametrize("policy", [FixedDepth(1), Deadline(1e6), Load(2), Confidence((0.5,))])
def test_a_request_walks_no_modules(model, images, policy, monkeypatch):
    fused = model.fuse()
    policy(fused, images)
    monkeypatch.setattr(torch.nn.Module, "named_modules", lambda *args, **kwargs: pytest.fail("modules are walked"))
    policy(fused, images)
