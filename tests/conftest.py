"""Fixtures of all tests: few threads, no network, small backbones, and runs that are made once per session."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import timm
import torch

from support.accelerator import reset_accelerator
from support.networks import tiny_backbone, with_statistics

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

SMALL = {"channels": (8, 16, 24, 32), "num_classes": 7}
FAMILIES = {
    # the ResNet family: plain, deep stem, wide, squeeze-and-excitation, anti-aliased, bottlenecks
    "resnet18": SMALL,
    "resnet10t": SMALL,
    "resnet26d": SMALL,
    "wide_resnet50_2": SMALL,
    "seresnet18": SMALL,
    "resnetblur18": SMALL,
    "seresnetaa50d": SMALL,
    "resnext50_32x4d": {"num_classes": 7, "channels": (32, 32, 32, 32)},
    "resnet14_cifar": {"channels": (8, 16, 32)},
    # the EfficientNet builder's family
    "mobilenetv2_035": {"num_classes": 7},
    "mobilenetv3_small_050": {"num_classes": 7},
    "mobilenetv4_conv_small_035": {"num_classes": 7},
    "efficientnet_b0": {"num_classes": 7},
    "tf_efficientnet_lite0": {"num_classes": 7},
    "efficientnet_es": {"num_classes": 7},
    "mnasnet_small": {"num_classes": 7},
    "mixnet_s": {"num_classes": 7},
    "fbnetc_100": {"num_classes": 7},
    "lcnet_050": {"num_classes": 7},
}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    reset_accelerator()
    yield
    reset_accelerator()


@pytest.fixture(params=FAMILIES)
def backbone(request):
    """A small backbone of every architecture that must work."""
    torch.manual_seed(0)
    return with_statistics(timm.create_model(request.param, **FAMILIES[request.param]))


@pytest.fixture(scope="session")
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def small_backbone():
    """A ResNet-8 for grey images of 32 pixels, with three stages."""
    return with_statistics(tiny_backbone((8, 8, 16)), size=32)


@pytest.fixture
def small_images():
    return torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Two short runs of the command line with different seeds, and what each printed: the second one by --json."""
    from support.command_line import SMALL, hierens

    directory = tmp_path_factory.mktemp("cli")
    printed = []
    for seed, flags in enumerate(([], ["--json"])):
        done = hierens("train", *SMALL, "--seed", seed, "--output-dir", directory / f"run{seed}", *flags)
        assert done.code == 0, done.err
        printed.append(done)
    return directory, *printed
