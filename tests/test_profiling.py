"""Profiles: what they claim is what is there."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hierens
from hierens.core.macs import count_macs
from hierens.evaluation import plotting, profiling
from hierens.evaluation.plotting import plot_accuracy
from hierens.evaluation.profiling import latency, millions, table
from support.clock import Clock


@pytest.fixture
def model(small_copies):
    return small_copies


def test_a_profile_has_a_row_per_depth(model):
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    profile = model.profile((1, 32, 32), batch_size=2)
    assert [row.leaves for row in profile.rows] == [1, 2, 4]
    assert [row.macs for row in profile.rows] == list(model.macs((1, 32, 32)))
    assert profile.rows[-1].parameters == sum(p.numel() for p in model.parameters())
    assert all(row.latency_ms > 0 for row in profile.rows)
    assert json.loads(json.dumps(profile.to_dict()))["batch_size"] == 2
    assert str(profile).count("\n") == 4 and "latency (ms)" in str(profile)
    assert model.training and all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_macs_grow_with_the_image(model):
    small, large = model.macs((1, 16, 16)), model.macs((1, 32, 32))
    assert all(3.5 < b / a < 4.1 for a, b in zip(small, large, strict=True))


def test_tables_align():
    lines = table(("a", "wide header"), [("1", "2"), ("333333", "4")]).splitlines()
    assert len({len(line) for line in lines}) == 1
    mixed = table(
        ("", "claim", "gain"), [("1.5 M / 0.7", "it helps", "+0.1 ± 0.2"), ("2 %", "no", "not run"), ("", "", "-1.0")]
    )
    assert mixed.splitlines()[1] == "| ----------: | -------- | ---------: |", "text to the left, numbers to the right"
    assert millions(0) == "0.00 M"


def test_pictures_are_drawn(tmp_path):
    path = plot_accuracy({"one": ([1e6, 2e6], [90, 91]), "other": ([1e6], [80])}, tmp_path / "a.png", "title")
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000


def test_axes_of_level_curves_stay_near_the_values(tmp_path, monkeypatch):
    figures, make = [], plotting._figure
    monkeypatch.setattr(plotting, "_figure", lambda *size: figures.append(make(*size)) or figures[-1])
    plot_accuracy({"digits": ([1e6, 2e6], [99.8, 99.8])}, tmp_path / "a.png")
    assert figures[0].axes[0].get_ylim() == pytest.approx((99.3, 100.3)), "no accuracies of 104 %"


def test_what_is_measured_is_a_pass_at_the_depth_asked_for(monkeypatch):
    clock = Clock(monkeypatch)

    class Timed(torch.nn.Module):
        def forward(self, x, depth):
            clock.wait(0.002 * (depth + 1))

    assert [latency(Timed(), torch.zeros(1), depth, seconds=0.05) for depth in (0, 4)] == pytest.approx([2, 10])


def test_timing_queues_no_more_calls_than_it_needs(monkeypatch):
    """A device that takes calls at once and runs them while it is waited for, 20 ms each."""
    clock, queued, made = Clock(monkeypatch), [], []

    def wait():
        clock.wait(0.02 * len(queued))
        queued.clear()

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    device = torch.device("cuda")
    assert profiling.call_ms(lambda: (queued.append(1), made.append(1)), device, 0.05) == pytest.approx(20)
    assert len(made) == 4
    assert profiling.call_ms(lambda: (queued.append(1), made.append(1)), device, 0.01) == pytest.approx(20)
    assert len(made) == 5


def everything(model):
    """Flags, tensors and caches of a model: what a request may not change."""
    return [
        (
            module.training,
            {k: (v.clone(), v, v.requires_grad, v._version) for k, v in module.named_parameters(recurse=False)},
            {k: (v.clone(), v, v._version) for k, v in module.named_buffers(recurse=False)},
            {k: dict(v) for k, v in vars(module).items() if isinstance(v, dict) and k.endswith(("cache", "hooks"))},
            set(vars(module)),
        )
        for module in model.modules()
    ]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a is b or (a.shape == b.shape and torch.equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return all(map(same, a, b)) if isinstance(a, (tuple, list)) else a == b


MODELS = {
    "tree": lambda: hierens.hierensify(timm.create_model("levit_128s", num_classes=3), 2, looped={}),
    "training": lambda: hierens.hierensify(timm.create_model("resnet10t", num_classes=3), 3, looped={}).train(),
    "fused": lambda: hierens.hierensify(timm.create_model("resnet10t", num_classes=3), 3, looped={}).fuse(),
    "exits": lambda: hierens.multi_exit(timm.create_model("resnet10t", num_classes=3), 3, collaborate=True),
    "tree with exits": lambda: hierens.tree_with_exits(
        timm.create_model("resnet10t", num_classes=3), 3, looped={}
    ).train(),
}


@pytest.mark.parametrize("kind", MODELS)
def test_counting_leaves_a_live_model_alone(kind):
    """Threads ask for the costs of several sizes while the main one looks at the model all the time."""
    torch.manual_seed(0)
    model, seen = MODELS[kind](), []
    if kind != "fused":
        next(model.parameters()).requires_grad_(False)
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
        layers[1].register_forward_hook(lambda *args: seen.append(1))
    sizes = [(3, s, s) for s in ((224,) if kind == "tree" else (32, 48, 64, 96))]
    before = everything(model)

    def ask(thread):
        counted = []
        for size in sizes[thread % len(sizes) :] + sizes[: thread % len(sizes)]:
            counted.append((size, model.macs(size), model.cost(1, size)))
            if kind == "fused":
                counted[-1] += ([step.macs for step in model.anytime(torch.zeros(1, *size))],)
        return sorted(counted)

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(ask, thread) for thread in range(8)]
        while not all(future.done() for future in futures):
            assert same(before, everything(model))
            assert not torch.nn.modules.module._has_any_global_hook(), "which would be called in all threads"
    assert same(before, everything(model)) and not seen
    answers = [future.result() for future in futures]
    assert all(answer == answers[0] for answer in answers)
    assert [size for size, *_ in answers[0]] == sizes and all(macs[0] == cost for _, macs, cost, *_ in answers[0])


def test_a_walk_counts_without_touching_requires_grad():
    model = hierens.hierensify(timm.create_model("resnet10t", num_classes=3), 2, looped={}).eval()
    flips = []

    class Watched(torch.nn.Parameter):
        def requires_grad_(self, mode=True):
            flips.append(mode)
            return super().requires_grad_(mode)

    for parameter in model.parameters():
        parameter.__class__ = Watched
    assert [step.macs for step in model.anytime(torch.zeros(1, 3, 64, 64))] == list(model.macs((3, 64, 64)))
    assert not flips


class Looker(torch.nn.Module):
    """One that wants to see values: without them there is no answer."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layer(x.flatten(1)) if float(x.sum()) == 0 and len(x.nonzero()) == 0 else x


def test_what_wants_to_see_values_is_counted_on_a_copy():
    looker = Looker().train()
    looker.register_forward_pre_hook(lambda *args: pytest.fail("the live module's hook was called"))

    def twice(module, image):
        yield module(image)
        yield module(image), module(image)

    assert count_macs(looker, (8, 1, 1), twice) == (32, 64)
    assert looker.calls == 0 and looker.training and all(p.requires_grad for p in looker.parameters())


def test_counting_takes_no_memory_for_weights():
    model = hierens.hierensify(timm.create_model("resnet10t", num_classes=3), 3, looped={}).eval()
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out.is_meta:
                made.append(out.nbytes)
            return out

    with Watch():
        model.macs((3, 64, 64))
    assert sum(made) < 1e4
