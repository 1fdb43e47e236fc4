"""Profiles: what they claim is what is there."""

import json
import time

import pytest
import torch

import hierens
from hierens.plotting import plot_accuracy
from hierens.profiling import latency, millions, table


@pytest.fixture
def model(small_backbone):
    return hierens.hierensify(small_backbone, 3)


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
    assert millions(0) == "0.00 M"


def test_pictures_are_drawn(tmp_path):
    path = plot_accuracy({"one": ([1e6, 2e6], [90, 91]), "other": ([1e6], [80])}, tmp_path / "a.png", "title")
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000


def test_what_is_measured_is_a_pass_at_the_depth_asked_for():
    class Sleeper(torch.nn.Module):
        def forward(self, x, depth):
            time.sleep(0.002 * (depth + 1))

    first, second = (latency(Sleeper(), torch.zeros(1), depth, seconds=0.05) for depth in (0, 4))
    assert 2 <= first < second and second >= 10
