"""Strided 1x1 convolutions of few channels: same values and gradients, and the kernel that crashes is never run."""

import json
import subprocess

import pytest
import torch
import torch.nn.functional as F

import hierens
from hierens.training.onednn import SubsampledConvolutions, subsampled_convolutions
from support.processes import environment, script


@pytest.mark.parametrize("stride, padding", [(2, 0), ((2, 1), 0), (3, 1), (2, (1, 0)), (2, "valid")])
@pytest.mark.parametrize("channels, groups", [(4, 1), (12, 3), (2, 2)])
def test_the_same_values_and_gradients(channels, groups, stride, padding):
    torch.manual_seed(0)
    given = [
        tensor.double().requires_grad_()
        for tensor in (torch.randn(2, channels, 9, 8), torch.randn(6, channels // groups, 1, 1), torch.randn(6))
    ]
    expected = F.conv2d(*given, stride, padding, 1, groups)
    wanted = torch.autograd.grad(expected.square().sum(), given)
    with SubsampledConvolutions():
        found = F.conv2d(*given, stride=stride, padding=padding, groups=groups)
    torch.testing.assert_close(found, expected)
    for gradient, other in zip(torch.autograd.grad(found.square().sum(), given), wanted, strict=True):
        torch.testing.assert_close(gradient, other)


def test_other_convolutions_are_left_alone():
    calls = []

    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append((func, kwargs or {}))
            return func(*args, **(kwargs or {}))

    x, wide, large = torch.randn(1, 8, 8, 8), torch.randn(4, 8, 1, 1), torch.randn(4, 8, 3, 3)
    with Seen(), SubsampledConvolutions():
        F.conv2d(x, wide, stride=2), F.conv2d(x, large, stride=2), F.conv2d(x[:, :4], wide[:, :4])
    assert [kwargs.get("stride", 1) for _, kwargs in calls if "stride" in kwargs] == [2, 2]


def test_only_models_with_such_a_layer_pay(small_backbone):
    wide = torch.nn.Conv2d(8, 8, 1, stride=2)
    narrow = torch.nn.Conv2d(8, 8, 1, stride=2, groups=4)
    assert not isinstance(subsampled_convolutions(wide), SubsampledConvolutions)
    assert isinstance(subsampled_convolutions(wide, narrow), SubsampledConvolutions)
    assert not isinstance(subsampled_convolutions(hierens.hierensify(small_backbone, 2)), SubsampledConvolutions)


@pytest.mark.sampled
def test_training_does_not_reach_the_kernel(tmp_path):
    """With the instruction set whose kernel is at fault; a CPU without it runs what it has."""
    short = {"epochs": 1, "backbone_args": {"channels": [4, 6, 8]}}
    command = script("demo_run", tmp_path, json.dumps([short | {"executor": way} for way in ("looped", "grouped")]))
    variables = environment(ONEDNN_MAX_CPU_ISA="AVX2", PYTHONFAULTHANDLER="1")
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / number / "results.json").exists() for number in "01")
