"""MSDNet: its authors' costs, timm's interface, and its own exits in a multi-exit network."""

import pytest
import timm
import torch
from torch import nn

from hierens.models import msdnet

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
