"""timm's own tests of models, run on hierens' entry points and on trees of diverse backbones.

They are read from a checkout of timm, of about the installed version:
`TIMM_CHECKOUT=path pytest -m slow tests/test_timm_suite.py`. `REFUSED` has the cases that are refused, and why.
"""

import copy
import fnmatch
import importlib.util
import os
import re
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import timm

from hierens.models import paper_networks, small_resnets

CHECKOUT = os.environ.get("TIMM_CHECKOUT", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOUT, reason="TIMM_CHECKOUT names no checkout of timm"),
]

TREES = (
    *("test_resnet", "test_byobnet", "test_efficientnet", "test_convnext", "test_nfnet", "test_vit", "test_mambaout"),
    *("mobilenetv3_small_050", "regnetx_002", "lcnet_035", "ghostnet_050", "repvgg_a0", "resmlp_12_224", "pit_ti_224"),
    "deit_tiny_distilled_patch16_224",
)
TRACED = ("test_model_forward_torchscript", "test_model_forward_fx", "test_model_backward_fx")
FEATURES = (
    "test_model_forward_features",
    "test_model_forward_intermediates_features",
    "test_model_forward_intermediates",
)
CASES = ("test_model_forward", "test_model_backward", "test_model_default_cfgs", *FEATURES, *TRACED)
NETWORKS = [
    *((name, None) for name in (*small_resnets.__all__, *paper_networks.__all__)),
    *(("hne", backbone) for backbone in TREES),
    *(("hne_exits", "test_resnet"), ("multi_exit", "test_resnet")),
]


@pytest.fixture(scope="module")
def suite(request):
    file = Path(CHECKOUT, "tests", "test_models.py")
    for marker in set(re.findall(r"pytest\.mark\.(\w+)", file.read_text())):
        request.config.addinivalue_line("markers", f"{marker}: of timm's tests")
    spec = importlib.util.spec_from_file_location("timm_test_models", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _made(entry, backbone, arguments):
    kwargs = dict(arguments)
    if backbone:
        kwargs |= {"backbone": backbone, **({"exits": 3} if entry == "multi_exit" else {"blocks": 3})}
    return timm.create_model(entry, **kwargs)


def create(entry, backbone, arguments):
    return copy.deepcopy(_made(entry, backbone, tuple(sorted(arguments.items()))))


# Why a case cannot pass on trees and multi-exit networks, and what timm's function raises. Ordinary backbones pass all.
NO_TRACE = (
    ValueError,
    r"use model\.export",
    "a trace cannot record the choice of a depth: export writes a graph per depth",
)
REFUSED = {
    "test_model_default_cfgs": (
        (AssertionError, ValueError),
        "unpooled feature|^$|exits need one class",
        "forward_features has an axis for the leaves, and exits cannot be without classes",
    ),
    **dict.fromkeys(TRACED, NO_TRACE),
}
OTHER_EXITS = (AssertionError, "No gradient for exits.0", "timm trains the prediction of the full depth alone")


def refusal(case, entry):
    if case == "test_model_backward" and "exit" in entry:
        return OTHER_EXITS
    return REFUSED.get(case) if entry.startswith(("hne", "multi_exit")) else None


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("entry, backbone", NETWORKS, ids=lambda value: value or "")
def test_timms_tests_pass_or_are_refused_for_a_reason(suite, monkeypatch, case, entry, backbone):
    name = backbone or entry  # timm's functions read the description of a backbone
    monkeypatch.setattr(
        suite, "create_model", lambda _, pretrained=False, **arguments: create(entry, backbone, arguments)
    )
    other = case == "test_model_default_cfgs" and any(fnmatch.fnmatch(name, it) for it in suite.NON_STD_FILTERS)
    test = getattr(suite, f"{case}_non_std" if other else case)
    batch = 2 if "backward" in case else 1
    reason = refusal(case, entry)
    with pytest.raises(reason[0], match=reason[1]) if reason else nullcontext():
        test(name, batch)
