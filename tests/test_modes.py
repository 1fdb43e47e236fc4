"""Models made inside `torch.inference_mode()` are models like others: they answer alike, and can be trained."""

import pytest
import timm
import torch

import hierens

MAKERS = {
    "tree": lambda backbone: hierens.hierensify(backbone, 3),
    "multi-exit": lambda backbone: hierens.multi_exit(backbone, 3, weights="uniform", collaborate=True),
    "tree with exits": lambda backbone: hierens.tree_with_exits(backbone, 3),
}
WAYS = {
    "made": lambda saved, backbone, make: make(backbone),
    "made of a backbone made there": lambda saved, backbone, make: make(
        timm.create_model("resnet8_cifar", channels=(8, 8, 16), in_chans=1).eval()
    ),
    "loaded": lambda saved, backbone, make: hierens.from_pretrained(saved),
    "loaded by timm": lambda saved, backbone, make: timm.create_model(f"local-dir:{saved}", pretrained=True).eval(),
    "cut short": lambda saved, backbone, make: make(backbone).at_depth(1),
    "with other classes": lambda saved, backbone, make: reset(make(backbone)),
}
CHANGES = {
    "grown": lambda backbone: hierens.hierensify(backbone, 2, looped={}).grow(),
    "collaborating": lambda backbone: hierens.multi_exit(backbone, 3).with_collaboration(),
    "an exit": lambda backbone: hierens.tree_with_exits(backbone, 3, looped={}).at_depth(0),
}


def reset(model):
    model.reset_classifier(5)
    return model


def check_ordinary(model, images):
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_inference()]
    expected = model(images)
    with torch.inference_mode():
        assert torch.equal(model(images), expected)
    model.train()(images, reduce=False).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert not torch.equal(model.eval()(images), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MAKERS)
def test_models_made_in_inference_mode_can_be_trained(small_backbone, small_images, tmp_path, kind, way):
    if way.startswith("loaded"):
        MAKERS[kind](small_backbone).save_pretrained(tmp_path)
    with torch.inference_mode():
        model = WAYS[way](tmp_path, small_backbone, MAKERS[kind])
    check_ordinary(model, small_images)


@pytest.mark.parametrize("change", CHANGES)
def test_models_changed_in_inference_mode_can_be_trained(small_backbone, small_images, change):
    with torch.inference_mode():
        model = CHANGES[change](small_backbone)
    check_ordinary(model, small_images)
