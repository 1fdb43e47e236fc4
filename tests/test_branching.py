"""Levels: how branches lie in memory, the self-check of grouped execution, and what happens where it fails."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from hierens.branches import layer_forms, layers
from hierens.branches.activations import Activations
from hierens.branches.executor import AnyLevel
from hierens.branches.grouped_block import Packed
from hierens.branches.level import Level
from hierens.branches.self_check import self_check
from hierens.branches.tensors import BranchLayer


def block_of(*layers, seed=0):
    torch.manual_seed(seed)
    return fx.symbolic_trace(nn.Sequential(*layers))


def level_of(*layers, branches=3):
    blocks = [block_of(*copy.deepcopy(layers), seed=seed) for seed in range(branches)]
    states = []
    for block in blocks:
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.5)
        states.append({name: t.detach().clone() for name, t in block.state_dict().items()})
    return Level.of_copies(block_of(*layers), len(states), lambda branch: states[branch]), states


class Reversed(nn.Module):
    """Turns the channels round: right per sample, wrong for feature maps side by side."""

    def forward(self, x):
        return x.flip(1)


class Undecided(nn.Module):
    """Its control flow depends on values, and it has weights."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.full((4, 1, 1), 2.0))

    def forward(self, x):
        return x * self.gain if x.mean() > -100 else x


class Sneaky(nn.Module):
    """Taken for a layer that mixes no channels, and mixes them."""

    def forward(self, x):
        return x - x.mean(1, keepdim=True)


@pytest.mark.parametrize("channels", [1, 4])
def test_parameters_lie_branch_by_branch(channels):
    level, states = level_of(nn.Conv2d(3, 4 * channels, 3), nn.BatchNorm2d(4 * channels))
    for branch, expected in zip(level, states, strict=True):
        own = branch.state_dict()
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[name], expected[name]) for name in own)
        assert all(type(tensor) is nn.Parameter for tensor in branch.parameters())
    for moved in (level, copy.deepcopy(level), copy.deepcopy(level).double().to(memory_format=torch.channels_last)):
        for tensors in zip(*(branch.state_dict().values() for branch in moved), strict=True):
            size = tensors[0].numel() * tensors[0].element_size()
            assert [tensor.data_ptr() - tensors[0].data_ptr() for tensor in tensors] == [0, size, 2 * size]
            # Accelerate and others take tensors of one storage for tied.
            assert all(tensor.untyped_storage().nbytes() == size for tensor in tensors)
        assert moved._form().contiguous


def test_one_branch_is_the_block_itself():
    level, states = level_of(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), branches=1)
    assert {n: t.shape for n, t in level[0].state_dict().items()} == {n: t.shape for n, t in states[0].items()}


def test_single_branches_and_fewer_branches_agree_with_all():
    level, _ = level_of(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    level.group()
    inputs = [torch.randn(2, 3, 8, 8) for _ in range(3)]
    everything = level(Activations(inputs)).listed()
    for branch in range(3):
        assert torch.allclose(level.run_branch(branch, inputs[branch]), everything[branch], atol=1e-5)
    assert torch.allclose(level(Activations(inputs[:2])).listed()[1], everything[1], atol=1e-5)


def test_forms_of_activations_turn_into_each_other():
    values = [torch.randn(2, 3, 4, 4) for _ in range(3)]
    listed = Activations(values)
    packed = Activations(packed=listed.side_by_side(), count=3)
    assert all(torch.equal(a, b) for a, b in zip(packed.listed(), values, strict=True))
    assert torch.equal(packed.stacked(), listed.stacked()) and packed.stacked().shape == (2, 3, 3, 4, 4)
    forked = packed.some([0, 0, 1, 1, 2])
    assert torch.equal(forked.side_by_side(), torch.cat([values[p] for p in (0, 0, 1, 1, 2)], 1))


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6), nn.ReLU6(), nn.AvgPool2d(2)),
        (nn.Conv2d(4, 8, 3, stride=2, bias=False), nn.GroupNorm(2, 8), nn.SiLU()),
        (nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(4, 5), nn.Dropout(0.5)),
    ],
)
def test_the_self_check_passes_what_is_right(layers):
    assert self_check(block_of(*layers), torch.randn(1, 4, 16, 16)) == ""


@pytest.mark.parametrize(
    "layer",
    [
        Reversed(),  # per sample, one branch after another
        nn.Softmax(1),
        nn.Flatten(2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),  # branch by branch, in place
        nn.BatchNorm2d(4, momentum=None),
        nn.ConvTranspose2d(4, 6, 2),
    ],
)
def test_what_has_no_place_in_channels_is_run_in_another_form(layer):
    block = block_of(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), layer)
    assert self_check(block, torch.randn(1, 4, 16, 16)) == ""
    level = Level.of_copies(block, 3, lambda _: block.state_dict())
    level.group()
    has_weights = next(layer.parameters(), None) is not None
    assert ("2" in level.looped_layers) == has_weights
    assert not level.channelwise


def test_a_module_that_cannot_be_traced_is_looped_in_place_and_says_why():
    graph = fx.Graph()
    graph.output(graph.call_module("1", (graph.call_module("0", (graph.placeholder("x"),)),)))
    block = fx.GraphModule(nn.ModuleDict({"0": nn.Conv2d(4, 4, 3), "1": Undecided()}), graph)
    level = Level.of_copies(block, 3, lambda _: block.state_dict())
    level.group()
    assert level.fallback_reason == "" and "control flow" in level.looped_layers["1"]
    inputs = [torch.randn(2, 4, 9, 9) for _ in range(3)]
    level.executor = "looped"
    expected = level(Activations(inputs)).stacked()
    level.executor = "grouped"
    assert torch.allclose(level(Activations(inputs)).stacked(), expected, atol=1e-5)


def test_a_block_that_hands_on_more_than_tensors_is_looped_and_says_why():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_module("conv", (x,)), graph.call_function(getattr, (x, "shape"))))
    block = fx.GraphModule(nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3)}), graph)
    assert "returns values other than feature maps" in self_check(block, torch.randn(1, 4, 8, 8))


def test_several_tensors_cross_side_by_side():
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    graph.output((graph.call_module("conv", (a,)), graph.call_module("norm", (b,))))
    block = fx.GraphModule(nn.ModuleDict({"conv": nn.Conv2d(4, 3, 3), "norm": nn.BatchNorm2d(2)}), graph)
    assert self_check(block, (torch.randn(1, 4, 8, 8), torch.randn(1, 2, 5, 5))) == ""


def test_the_self_check_catches_a_wrong_rule(monkeypatch):
    """Rules that are wrong in one way each; a check that let one through would be worth nothing."""
    example = torch.randn(1, 4, 12, 12)
    block = block_of(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    assert self_check(block, example) == ""

    def first_branch_everywhere(layer, name, width, concatenated):
        own = getattr(layer.module, name)
        return None if own is None else own.view(-1, *own.shape[1:]).repeat(width.active, *[1] * max(own.ndim - 1, 0))

    monkeypatch.setattr(BranchLayer, "_packed", first_branch_everywhere)
    assert self_check(block, example) != ""
    monkeypatch.undo()

    def still_statistics(layer, x, width):
        rows = [layer.rows(name, width).clone() for name in ("running_mean", "running_var", "weight", "bias")]
        module = layer.module
        return torch.nn.functional.batch_norm(x, *rows, module.training, module.momentum, module.eps)

    monkeypatch.setitem(layer_forms.LAYERS, nn.BatchNorm2d, (layer_forms.Form.CHANNELS, still_statistics))
    assert "statistics in 1.running_mean" in self_check(block, example)
    monkeypatch.undo()

    monkeypatch.setattr(layer_forms, "PER_CHANNEL", (*layer_forms.PER_CHANNEL, Sneaky))
    layers = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3), "mix": Sneaky()})
    graph = fx.Graph()
    graph.output(graph.call_module("mix", (graph.call_module("conv", (graph.placeholder("x"),)),)))
    assert "differs in evaluation" in self_check(fx.GraphModule(layers, graph), example)


def test_the_self_check_refuses_to_pass_what_it_cannot_see():
    constant = block_of(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Hardtanh(-2, -1))
    assert "nothing is checked" in self_check(constant, torch.randn(1, 4, 8, 8))


def test_stochastic_depth_is_drawn_for_every_branch():
    from timm.layers import DropPath

    level, _ = level_of(nn.Conv2d(2, 2, 1), DropPath(0.5))
    level.group()
    level.executor = "grouped"
    level.train()
    torch.manual_seed(0)
    out = level(Activations([torch.ones(64, 2, 1, 1)] * 3)).stacked()  # (N, branches, C, 1, 1)
    dropped = (out == 0).flatten(2).all(-1)
    assert 0.3 < dropped.float().mean() < 0.7
    assert (dropped[:, 0] != dropped[:, 1]).any() and (dropped[:, 1] != dropped[:, 2]).any()


def test_on_a_cpu_light_levels_are_grouped_and_heavy_ones_run_branch_by_branch(monkeypatch):
    ran, original = [], Packed.__call__
    monkeypatch.setattr(Packed, "__call__", lambda *args: ran.append(args[2].active) or original(*args))
    monkeypatch.setattr(AnyLevel, "grouped_weights", 200)
    light, _ = level_of(nn.Conv2d(3, 4, 3))
    heavy, _ = level_of(nn.Conv2d(3, 8, 3))
    x = Activations([torch.randn(1, 3, 8, 8)] * 3)
    for level, without_gradients, with_gradients in ((light, [3], [3]), (heavy, [], [])):
        level.group()
        with torch.no_grad():
            level(x)
        assert ran == without_gradients
        ran.clear()
        level(x)
        assert ran == with_gradients
        ran.clear()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_auto_chooses_by_device_and_size(device):
    """Anything but a CPU counts as an accelerator, `meta` too: what is chosen depends on shapes alone."""
    convolutions, _ = level_of(nn.Conv2d(4, 8, 3, padding=1), branches=2)
    products, _ = level_of(nn.LayerNorm(8), nn.Linear(8, 8), branches=2)
    for level in (convolutions, products):
        level.eval().group()
    few, many = torch.empty(4, 8, device=device), torch.empty(300_000, 8, device=device)
    images = torch.empty(1, 4, 8, 8, device=device)
    assert convolutions._branches_per_call(Activations([images] * 2), 2) == 2
    assert products._branches_per_call(Activations([many] * 2), 2) == 1
    for inputs in (Activations([few] * 2), Activations(packed=torch.cat([few] * 2), count=2)):
        assert products._branches_per_call(inputs, 2) == (1 if device == "cpu" else 2)


@pytest.mark.parametrize("together", [1, 2, 3, 4, 6])
def test_branches_run_a_few_at_a_time_agree_with_all_at_once(monkeypatch, together):
    """Whatever share of the families runs together: siblings, half of them, or members of several families."""
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2)
    level, _ = level_of(*layers, branches=6)
    level.eval().group()
    for parents in ([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5], [0, 0, 1], [0, 0, 0, 0]):
        x = Activations([torch.randn(2, 4, 8, 8) for _ in range(parents[-1] + 1)])
        with torch.no_grad():
            level.executor = "looped"
            expected = level(x, parents).listed()
            level.executor = "auto"
            monkeypatch.setattr(level, "_branches_per_call", lambda x, count: together)
            actual = level(x, parents).listed()
            monkeypatch.undo()
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_siblings_read_their_parents_feature_map_without_a_copy(monkeypatch):
    shapes, original = [], F.conv2d
    monkeypatch.setattr(layers, "_CONVOLUTIONS", {2: lambda x, *a: shapes.append(tuple(x.shape)) or original(x, *a)})
    block = block_of(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3))
    level = Level.of_copies(block, 4, lambda _: block.state_dict())
    level.group()
    level.executor = "grouped"
    level(Activations([torch.randn(1, 4, 8, 8) for _ in range(2)]), [0, 0, 1, 1])
    assert shapes == [(1, 2 * 4, 8, 8), (1, 4 * 8, 8, 8)]
