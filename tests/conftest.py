"""Fixtures of all tests: few threads, no network, small backbones, and runs that are made once per session."""

import copy
import os
import subprocess
import zlib
from functools import cache, cached_property
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import timm
import torch

import hierens
from support.accelerator import reset_accelerator
from support.families import FAMILIES, FAMILIES_OF_A_RUN
from support.networks import independent_tree, tiny_backbone, with_statistics

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
PARTS = 4


def pytest_addoption(parser):
    parser.addoption("--sample", action="store_true", help="run a quarter of the tests that are marked `sampled`")


def pytest_collection_modifyitems(config, items):
    """With `--sample`, select a quarter of the tests that are marked `sampled`: another one for each commit."""
    if not config.getoption("sample"):
        return
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    turn = zlib.crc32(head.stdout.encode())

    def is_drawn(item):
        return item.get_closest_marker("sampled") is None or (zlib.crc32(item.nodeid.encode()) + turn) % PARTS == 0

    config.hook.pytest_deselected(items=[item for item in items if not is_drawn(item)])
    items[:] = [item for item in items if is_drawn(item)]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    reset_accelerator()
    yield
    reset_accelerator()


class Family:
    """A small backbone, and trees of it that are converted when a test first asks for them."""

    def __init__(self, name):
        torch.manual_seed(0)
        self.backbone = with_statistics(timm.create_model(name, **FAMILIES[name]))

    @cached_property
    def copies(self):
        return hierens.hierensify(self.backbone, 4)

    @cached_property
    def independent(self):
        return independent_tree(self.backbone, 3)


@pytest.fixture(scope="module", params=FAMILIES_OF_A_RUN)
def family(request):
    """Every architecture that must work; in every run, a few of them."""
    return Family(request.param)


@pytest.fixture
def backbone(family):
    return copy.deepcopy(family.backbone)


@pytest.fixture
def copies(family):
    """A tree of four blocks, all branches alike."""
    return copy.deepcopy(family.copies)


@pytest.fixture
def independent(family):
    """A tree of three blocks with independent branches."""
    return copy.deepcopy(family.independent)


@pytest.fixture(scope="session")
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def small_backbone():
    """A ResNet-8 for grey images of 32 pixels, with three stages."""
    return copy.deepcopy(_small_backbone())


@pytest.fixture
def small_copies():
    """A tree of three blocks of it, all branches alike."""
    return copy.deepcopy(_small_copies())


@pytest.fixture
def small_independent():
    """A tree of three blocks of it with independent branches."""
    return copy.deepcopy(_small_independent())


@cache
def _small_backbone():
    return with_statistics(tiny_backbone((8, 8, 16)), size=32)


@cache
def _small_copies():
    return hierens.hierensify(_small_backbone(), 3)


@cache
def _small_independent():
    return independent_tree(_small_backbone(), 3)


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
