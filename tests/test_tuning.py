"""Tuning: what is measured is run, remembered for the machine and the model, and never changes an answer."""

import json
import subprocess
import sys

import pytest
import torch

from hierens.branches.grouped_block import Packed
from hierens.core.fetching import LoadError
from hierens.models import tuning
from hierens.models.tuning import Measurement, Tuning
from support.clock import Clock
from support.networks import close, shared_tree


@pytest.fixture(scope="module")
def model():
    return shared_tree("test_efficientnet", 3)[0]


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(tuning, "_SECONDS", 0.0)
    monkeypatch.setattr(tuning, "_REPEATS", 1)


@torch.no_grad()
def test_every_way_to_run_a_tuned_model_gives_the_same(model, images, quick):
    fused = model.fuse()
    expected = [fused(images, leaves=n, reduce=False) for n in range(1, 5)]
    found = fused.tune(images, batch_sizes=(1, 2))
    assert {m.batch_size for m in found.measurements} == {1, 2}
    for together in (1, 2, 3, 4):
        for level in fused.all_levels():
            level.plan = dict.fromkeys(level.plan, together)
        for leaves in range(1, 5):
            assert close(fused(images, leaves=leaves, reduce=False), expected[leaves - 1]), (together, leaves)


@torch.no_grad()
def test_the_fastest_way_is_run(model, images, monkeypatch):
    """A way that is made slow is not chosen, and what is chosen is what runs."""
    fused, original, ran, clock = model.fuse(), Packed.__call__, [], Clock(monkeypatch)

    def slow_unless_two(packed, values, width):
        ran.append(width.active)
        clock.wait(0.001 if width.active == 2 else 0.01)
        return original(packed, values, width)

    monkeypatch.setattr(Packed, "__call__", slow_unless_two)
    found = fused.tune(images)
    last = [m for m in found.measurements if m.level == 2 and m.branches == 4]
    assert [m.together for m in last] == [2] and set(last[0].milliseconds) == {1, 2, 4}
    ran.clear()
    fused(images)
    assert set(ran) == {2}


def test_it_is_remembered_for_the_machine_the_model_and_the_size(model, images, quick, tmp_path, monkeypatch):
    file = tmp_path / "deep" / "tuning.json"
    fused = model.fuse()
    found = fused.tune(images, batch_sizes=(1, 2), file=file)
    plans = [level.plan for level in fused.all_levels()]
    monkeypatch.setattr(tuning, "_times", lambda *args: pytest.fail("it was measured before"))
    again = model.fuse()
    assert again.tune(images, batch_sizes=(2,), file=file) == found
    assert [level.plan for level in again.all_levels()] == plans
    monkeypatch.setattr(tuning, "_times", lambda level, x, parents, branches: {1: 1.0, branches: 2.0})
    model.tune(images, file=file)  # not fused: another model
    again.tune(images[..., :32, :32], file=file)
    again.bfloat16().tune(images.bfloat16(), file=file)
    records = json.loads(file.read_text())
    assert len(records) == 4 and len({(r["machine"], r["model"], tuple(r["size"])) for r in records}) == 4
    assert again.tune(images.bfloat16(), batch_sizes=(2, 4), file=file) != found  # a batch that is not there yet
    assert len(json.loads(file.read_text())) == 4


TUNE = """
import sys, timm, torch, hierens
from hierens.models import tuning

torch.set_num_threads(1)
tuning._times = lambda level, x, parents, branches: {1: 1.0, branches: 2.0}
number, file = int(sys.argv[1]), sys.argv[2]
model = hierens.hierensify(timm.create_model("resnet8_cifar", channels=(8, 8, 8)), 2, init="reinit", looped={})
print("ready", flush=True)
sys.stdin.readline()
for size in range(8, 16):
    model.tune(torch.zeros(1, 3, 8 + 8 * number + size, 16), file=file)
    model.tune(torch.zeros(1, 3, 8, 8), batch_sizes=[1 + number + 3 * size], file=file)
"""


@pytest.mark.sampled
def test_processes_that_tune_at_once_lose_nothing_of_each_other(tmp_path):
    file, pipes = tmp_path / "tuning.json", {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, "-c", TUNE, str(n), str(file)], **pipes) for n in range(2)]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(300) for process in started] == [0, 0]
    records = {tuple(record["size"]): record["measurements"] for record in json.loads(file.read_text())}
    assert len(records) == 1 + 2 * 8, "a record per size"
    assert len({m["batch_size"] for m in records[3, 8, 8]}) == 2 * 8, "one record of all batch sizes"
    assert [path.name for path in tmp_path.iterdir()] == ["tuning.json"]


def test_what_was_not_measured_runs_like_the_next_larger(model):
    level = model.fuse().all_levels()[2]
    level.plan = {(2, 1): 1, (4, 1): 4, (2, 8): 2, (4, 8): 1}
    x = lambda batch: type("X", (), {"first_tensor": lambda self: torch.zeros(batch)})()  # noqa: E731
    chosen = {(n, b): level._branches_per_call(x(b), n) for n in (1, 2, 3, 4) for b in (1, 4, 8, 64)}
    assert chosen[2, 1] == 1 and chosen[3, 1] == 3 and chosen[4, 1] == 4
    assert chosen[2, 4] == chosen[2, 8] == 2 and chosen[3, 4] == chosen[4, 8] == chosen[4, 64] == 1


def test_what_cannot_be_tuned_says_why(model, images, tmp_path):
    fused = model.fuse()
    (tmp_path / "config.json").write_text('{"a": 1}')
    for call, message in (
        (lambda: fused.tune(images, depths=[7]), "depth must be from 0 to 2"),
        (lambda: fused.tune(images, batch_sizes=[0]), "batch sizes must be at least 1"),
        (lambda: fused.tune(images[:, :2]), r"expected images \(N, 3, H, W\)"),
        (lambda: fused.tune(images, file=tmp_path / "config.json"), "is not a file that tune"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_it_prints_as_a_table():
    found = Tuning("cpu", "{}", (3, 64, 64), (Measurement(2, 4, 8, {1: 3.0, 2: 1.5, 4: 2.0}),))
    assert "|     2 |        4 |     8 |        2 | 1: 3.00, 2: 1.50, 4: 2.00 |" in str(found)


def test_a_strangers_tuning_file_is_refused_in_a_line(model, images, quick, tmp_path):
    file, fused = tmp_path / "tuning.json", model.fuse()
    fused.tune(images, file=file)
    good = json.loads(file.read_text())
    for change, message in (
        ({"milliseconds": {"-1": 1.0}}, "milliseconds should hold times by numbers of branches"),
        ({"milliseconds": {"0": 1.0}}, "milliseconds should hold times by numbers of branches"),
        ({"milliseconds": {"999": 1.0}}, "999 branches cannot run together: there are"),
        ({"milliseconds": {"1": "fast"}}, "milliseconds must be finite and not negative, got 'fast'"),
        ({"milliseconds": {"1": -1}}, "milliseconds must be finite and not negative, got -1"),
        ({"milliseconds": {}}, "milliseconds must hold at least one time"),
        ({"level": True}, "level must be a whole number from 0 to 1000000, got True"),
        ({"level": -1}, "level must be a whole number .*, got -1"),
        ({"batch_size": 10**30}, "batch_size must be a whole number"),
        ({"branches": "2"}, "branches must be a whole number .*, got '2'"),
        ({"level": 99}, "cannot be used: .* in level 99, and the model has"),
        ({"branches": 64}, "cannot be used: .* 64 branches were measured"),
    ):
        records = json.loads(json.dumps(good))
        extra = {**records[0]["measurements"][0], **change}
        records[0]["measurements"].append(extra)
        file.write_text(json.dumps(records))
        with pytest.raises(LoadError, match=message) as refused:
            fused.tune(images, file=file)
        assert str(refused.value).startswith(str(file)) and "\n" not in str(refused.value)
    for text, message in (
        ("[" * 100_000, "nested too deeply"),
        ("[[]]", r"is not a file that tune\(\) wrote \(tunings should be a list"),
        (json.dumps([good[0] | {"measurements": 3}]), "measurements should be a list"),
        (json.dumps([good[0] | {"size": ["3"]}]), "size should be a list"),
        (json.dumps([{"machine": "x"}]), "it has no 'model'"),
        ("[]" + " " * 2**25, "is 32 MB long"),
    ):
        file.write_text(text)
        with pytest.raises(LoadError, match=message):
            fused.tune(images, file=file)
