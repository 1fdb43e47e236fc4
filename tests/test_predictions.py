"""The predictions of all depths as a matrix of weights over leaf logits."""

import inspect

import pytest
import timm
import torch

import hierens
from hierens.core.predictions import PredictionWeights
from hierens.core.protocol import AdaptiveModel

MODELS = {
    "tree": lambda backbone: hierens.hierensify(backbone, blocks=3),
    "fused tree": lambda backbone: hierens.hierensify(backbone, blocks=3).eval().fuse(),
    "tree with exits": lambda backbone: hierens.tree_with_exits(backbone, blocks=3),
    "exits": lambda backbone: hierens.multi_exit(backbone, exits=3),
    "ensemble of exits": lambda backbone: hierens.multi_exit(backbone, exits=3, weights=[1.0, 2.0, 5.0]),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param](timm.create_model("resnet10t", num_classes=10)).eval()


def test_predictions_are_the_matrix_times_the_leaf_logits(model):
    leaf_logits = torch.randn(4, model.leaves, 10, dtype=torch.float64)
    weights = model.prediction_weights
    matrix = weights.matrix(leaf_logits)
    assert matrix.shape == (model.depths, model.leaves)
    torch.testing.assert_close(matrix.sum(1), torch.ones(model.depths, dtype=torch.float64))
    torch.testing.assert_close(weights(leaf_logits), matrix @ leaf_logits)


def test_each_depth_predicts_its_row(model):
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        nested = model.prediction_weights(model(images, reduce=False))
        for depth in range(model.depths):
            torch.testing.assert_close(model(images, depth=depth), nested[:, depth], rtol=1e-4, atol=1e-5)


def test_a_leaf_that_is_not_finite_spoils_no_depth_without_it():
    leaf_logits = torch.zeros(1, 4, 3)
    leaf_logits[:, 3] = float("nan")
    assert PredictionWeights((1, 2, 4))(leaf_logits)[0].isfinite().all(1).tolist() == [True, True, False]
    leaf_logits = leaf_logits.flip(1)
    assert PredictionWeights((1, 2, 3, 4), num_exits=4)(leaf_logits)[0].isfinite().all(1).tolist() == [
        *(False, True, True, True)
    ]


def test_half_precision_and_autocast_do_not_round_predictions():
    leaf_logits = torch.randn(4, 8, 10).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        nested = PredictionWeights((1, 2, 4, 8))(leaf_logits)
    assert nested.dtype == torch.float32
    torch.testing.assert_close(nested[:, 3], leaf_logits.float().mean(1))


def test_every_model_has_the_shared_interface(model):
    assert isinstance(model, AdaptiveModel)
    for name, member in vars(AdaptiveModel).items():
        if inspect.isfunction(member) and not name.startswith("_"):
            own = inspect.signature(getattr(type(model), name)).parameters
            for parameter in inspect.signature(member).parameters.values():
                assert own[parameter.name].default == parameter.default, f"{name}({parameter.name})"
    assert list(inspect.signature(type(model).forward).parameters) == ["self", "x", "depth", "leaves", "reduce"]


def test_a_model_is_made_by_its_constructor(model):
    """What is made of another model has its record, its own copy of it, and names its own classifiers."""
    smaller = model.at_depth(0)
    assert smaller.num_classes == model.num_classes and smaller.pretrained_cfg is smaller.default_cfg
    smaller.pretrained_cfg["mean"] = (9.0, 9.0, 9.0)
    assert model.pretrained_cfg["mean"] != (9.0, 9.0, 9.0)
    if isinstance(smaller, hierens.FusedEnsemble):
        return  # its layers are packed, and have no names of single branches
    names = smaller.pretrained_cfg["classifier"]
    for name in [names] if isinstance(names, str) else names:
        assert smaller.get_submodule(name).out_features == 10
    first_conv = smaller.pretrained_cfg["first_conv"]
    assert smaller.get_submodule(first_conv).in_channels == 3
