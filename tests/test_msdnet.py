"""MSDNet: its authors' costs, timm's interface, and its own exits in a multi-exit network."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import hierens
from hierens.models import msdnet
from support.networks import randomize

SMALL = {"blocks": 3, "channels": 4, "growth_rate": 2, "exit_width": 6, "num_classes": 5}

# MACs of convolutions and linear layers with the inputs of ReLUs, pooled elements and linear biases, in millions, and
# parameters in millions, after every exit: of the configurations by which IMTA's authors (arXiv 1908.06294) train it.
COSTS = {
    "msdnet_cifar_7": ([15.14, 25.51, 37.10, 46.33, 57.34, 66.96, 75.94], 0.43, 3.07),
    "msdnet_cifar_10": ([15.14, 25.51, 37.79, 52.06, 62.18, 74.07, 87.73, 100.04, 110.12, 121.68], 0.43, 4.96),
    "msdnet_cifar_lin_5": ([6.86, 14.35, 27.54, 41.71, 58.48], 0.30, 2.08),
    "msdnet_cifar_lin_7": ([6.86, 14.35, 27.29, 48.45, 76.43, 108.85, 137.28], 0.30, 3.97),
    "msdnet_imagenet_4": ([339.90, 685.46, 1008.16, 1254.47, 1360.53], 4.24, 23.96),
    "msdnet_imagenet_6": ([514.66, 1171.18, 1844.52, 2501.40, 2742.06], 7.08, 56.53),
    "msdnet_imagenet_7": ([615.69, 1436.39, 2283.21, 2967.42, 3253.79], 8.76, 62.31),
}


def costs(network, size):
    """Cost after every exit, counted as the authors do, and parameters."""
    spent, found = 0, []

    def count(module, inputs, output):
        nonlocal spent
        if isinstance(module, nn.Conv2d):
            spent += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            spent += module.weight.numel() + module.bias.numel()
        elif isinstance(module, nn.ReLU):
            spent += output.numel()
        elif isinstance(module, nn.MaxPool2d):
            spent += output.numel() * module.kernel_size**2
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            spent += inputs[0].numel()

    for module in network.modules():
        module.register_forward_hook(count)
    with torch.device("meta"):
        maps = network.stem(torch.zeros(1, *size))
        parameters = sum(p.numel() for p in network.stem.parameters())
        for block, exit in zip(network.blocks, network.exits, strict=True):
            maps = block(maps)
            exit(maps[-1])
            parameters += sum(p.numel() for part in (block, exit) for p in part.parameters())
            found.append((spent / 1e6, parameters / 1e6))
    return zip(*found, strict=True)


@pytest.mark.parametrize("name", COSTS)
def test_costs_are_those_of_the_authors(name):
    with torch.device("meta"):
        network = timm.create_model(name).eval()
    expected, first, last = COSTS[name]
    spent, parameters = costs(network, network.pretrained_cfg["input_size"])
    assert spent == pytest.approx(expected, rel=0.005)
    assert (parameters[0], parameters[-1]) == pytest.approx((first, last), rel=0.005, abs=0.005)
    assert set(COSTS) == set(msdnet.__all__)


def small(**kwargs):
    torch.manual_seed(0)
    network = timm.create_model("msdnet_cifar_lin_5", **SMALL | kwargs).eval()
    randomize(network)
    return network


def images(count=3, **kwargs):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1), **kwargs)


@pytest.mark.sampled
@torch.no_grad()
def test_a_multi_exit_network_has_its_own_exits(tmp_path):
    network, x = small(), images()
    expected = torch.stack(network.forward_exits(x), 1)
    assert torch.equal(network(x), expected[:, -1])
    model = hierens.multi_exit(network)
    assert model.depths == 3 and torch.equal(model(x, reduce=False), expected)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in network.parameters())
    for step, logits in zip(model.anytime(x), expected.unbind(1), strict=True):
        assert torch.equal(step.logits, logits)
    fewer = model.keep_exits([0, 2])
    assert torch.equal(fewer(x, reduce=False), expected[:, [0, 2]])
    for saved in (model, fewer):
        saved.save_pretrained(tmp_path / str(saved.depths))
        loaded = hierens.from_pretrained(tmp_path / str(saved.depths))
        assert torch.equal(loaded(x, reduce=False), saved(x, reduce=False))
    model.reset_classifier(3)
    assert model(x, reduce=False).shape == (3, 3, 3)
    assert {f"{name}.weight" for name in model.pretrained_cfg["classifier"]} <= model.state_dict().keys()


@pytest.mark.sampled
def test_collaboration_is_as_wide_as_what_the_next_classifier_reads():
    with torch.device("meta"):
        large = timm.create_model("msdnet_imagenet_4")
    assert [exit.width for exit in large.exits[1:]] == [384, 352, 304, 560]  # the widths in the authors' code
    network = timm.create_model("msdnet_imagenet_4", channels=4, growth_rate=2, num_classes=3).eval()
    model = hierens.multi_exit(network, collaborate=True)
    read = [exit.fc.in_features for exit in network.exits[1:]]
    assert [embedding.embed[0].out_features for embedding in model.embeddings] == read and len(set(read)) > 1


@pytest.mark.parametrize("wrong", [{"exits": 4}, {"head": "conv"}, {"at": ["blocks.2"]}])
def test_other_exits_are_refused(wrong):
    with pytest.raises(ValueError, match="has 3 exits of its own: omit exits, at and head"):
        hierens.multi_exit(small(), **wrong)


@pytest.mark.parametrize("scaled", [True, "all"])
def test_equilibrium_scales_what_classifiers_read_or_all_that_crosses(scaled):
    """Section 3.1 of IMTA, written out: 1 / (K - i) before a classifier and (K - i - 1) / (K - i) after it."""
    network, x = small().double().train(), images(6, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    model = hierens.multi_exit(network).train()
    model.gradient_equilibrium = scaled
    sum(F.cross_entropy(y, labels) for y in model(x, reduce=False).unbind(1)).backward()
    own = {
        f"{'exits' if name.startswith('exits') else 'blocks'}.{name}": parameter.grad
        for name, parameter in model.named_parameters()
    }

    def times(value, factor):
        return value * factor + (value * (1 - factor)).detach()

    maps, loss, count = network.stem(x), 0, len(network.blocks)
    for i, (block, exit) in enumerate(zip(network.blocks, network.exits, strict=True)):
        maps = block(maps)
        rest = count - i
        loss = loss + F.cross_entropy(exit(times(maps[-1], 1 / rest)), labels)
        kept = [times(m, (rest - 1) / rest) for m in maps] if scaled == "all" else maps
        maps = [*kept[:-1], times(maps[-1], (rest - 1) / rest)]
    loss.backward()
    expected = sorted((p.grad for p in network.parameters()), key=lambda g: (g.shape, g.norm().item()))
    found = sorted(own.values(), key=lambda g: (g.shape, g.norm().item()))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_trees_of_it_are_exact():
    network, x = small(), images()
    tree = hierens.hierensify(network, 2)
    for depth in range(2):
        assert torch.allclose(tree(x, depth=depth), network(x), atol=1e-5)


def test_timms_tools():
    network, x = small(), images()
    maps = network.forward_intermediates(x, [0, 2], intermediates_only=True, stop_early=True)
    assert [m.shape[1:] for m in maps] == [(network.feature_info[i]["num_chs"], 8, 8) for i in (0, 2)]
    features = timm.create_model("msdnet_cifar_lin_5", features_only=True, out_indices=(0, 2), **SMALL)
    assert [m.shape[1] for m in features(x)] == features.feature_info.channels()
    plain = network.train()(x)
    network.set_grad_checkpointing()
    assert torch.allclose(network(x), plain, atol=1e-5)
    network.eval().reset_classifier(7)
    assert network(x).shape == (3, 7) and network.get_classifier().out_features == 7
    assert network.prune_intermediate_layers([1]) == [1] and len(network.blocks) == 2
