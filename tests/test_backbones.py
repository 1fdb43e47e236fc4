"""Networks that are not timm's: torchvision's models, and modules with skip connections that end in a convolution."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_model
from torch import nn
from torch.utils.data import DataLoader
from torchvision import models

import hierens
from hierens.cutting.cut import CutError
from hierens.hub.saving import SaveError
from hierens.training.config import TrainConfig
from hierens.training.trainer import Trainer
from support.networks import close, randomize

SIZE = (3, 32, 32)
MAKERS = {"tree": hierens.hierensify, "multi-exit": hierens.multi_exit, "tree with exits": hierens.tree_with_exits}


def conv(inputs, outputs, stride=1):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())


class Pixels(nn.Module):
    """A small U-Net: a skip connection crosses every cut between its ends."""

    num_features = "an attribute with a meaning of its own"

    def __init__(self):
        super().__init__()
        self.first, self.down, self.middle = conv(3, 6), conv(6, 8, 2), conv(8, 8)
        self.up, self.last = conv(14, 6), nn.Conv2d(6, 5, 1)

    def forward(self, x):
        skip = self.first(x)
        deep = F.interpolate(self.middle(self.down(skip)), scale_factor=2)
        return self.last(self.up(torch.cat([skip, deep], 1)))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = conv(3, 6), conv(6, 8, 2)
        self.third = nn.Sequential(conv(8, 8), conv(8, 8, 2))
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.third(self.second(self.first(x))).mean((2, 3)))


NETWORKS = {
    "torchvision's ShuffleNet": (lambda: models.ShuffleNetV2([1, 1, 1], [4, 8, 8, 16, 16], num_classes=4), "fc"),
    "torchvision's MobileNet": (lambda: models.MobileNetV2(4, 0.25, [[1, 8, 1, 1], [2, 16, 2, 2]]), "classifier"),
    "torchvision's ViT": (lambda: models.VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=4), "heads"),
    "pixels": (Pixels, "last"),
}


def network(make=Tiny):
    torch.manual_seed(0)
    made = make().eval()
    randomize(made)
    return made


@pytest.fixture(scope="module", params=NETWORKS)
def converted(request):
    make, classifier = NETWORKS[request.param]
    backbone = network(make)
    return backbone, hierens.hierensify(backbone, 3, classifier=classifier, input_size=SIZE)


@torch.no_grad()
def test_copies_of_any_network_equal_it_at_every_depth(converted):
    backbone, model = converted
    x = torch.randn(2, *SIZE)
    expected = backbone(x)
    for depth in range(model.depths):
        assert close(model(x, depth=depth), expected, 1e-5), depth
    assert close(model.at_depth(1)(x), expected, 1e-5)
    assert model.num_classes == expected.shape[1] and not hasattr(backbone, "_hierens_description")


@torch.no_grad()
def test_grouped_equals_looped_and_fused_for_any_network(converted):
    _, model = converted
    assert model.looped == {}
    model.break_symmetry(0.05)
    x = torch.randn(2, *SIZE)
    outputs = []
    for executor in ("looped", "grouped"):
        model.set_executor(executor)
        outputs.append(model(x, reduce=False))
    assert not close(outputs[0][:, 0], outputs[0][:, 1], 1e-3)
    assert close(outputs[1], outputs[0])
    assert close(model.fuse()(x, reduce=False), outputs[0])
    for step, leaves in zip(model.anytime(x), range(1, 5), strict=True):
        assert close(step.logits, outputs[0][:, :leaves].mean(1))


def plain_tree():
    model = hierens.hierensify(network(), 2, classifier="fc", input_size=SIZE)
    model.break_symmetry(0.05)
    return model


@torch.no_grad()
def test_exits_read_the_tokens_of_any_network():
    make, classifier = NETWORKS["torchvision's ViT"]
    backbone, x = network(make), torch.randn(2, *SIZE)
    assert close(hierens.multi_exit(backbone, 2, classifier=classifier, input_size=SIZE)(x), backbone(x), 1e-5)


@torch.no_grad()
def test_exits_and_growing_work_for_any_network():
    backbone, x = network(), torch.randn(2, *SIZE)
    expected = backbone(x)
    for make in (hierens.multi_exit, hierens.tree_with_exits):
        assert close(make(backbone, 2, classifier="fc", input_size=SIZE)(x), expected, 1e-5)
    model = plain_tree()
    assert close(model.grow()(x), model(x), 1e-5)
    model.reset_classifier(6)
    assert model(x).shape == (2, 6)


def test_weights_of_a_network_without_a_config_are_saved_and_loaded(tmp_path):
    model, x = plain_tree(), torch.randn(2, *SIZE)
    for save in (model.save_pretrained, lambda path: model.push_to_hub("user/name")):
        with pytest.raises(SaveError) as caught:
            save(tmp_path / "model")
        message = str(caught.value)
        assert message.count(". ") == 0 and "save_model" in message and "export" in message, message
    save_model(model, tmp_path / "weights.safetensors")
    again = hierens.hierensify(Tiny().eval(), 2, classifier="fc", input_size=SIZE)
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(again(x), model(x))


def test_networks_without_a_config_are_exported(tmp_path):
    plain_tree().export(tmp_path / "graphs", format="torch-export", depths=[0])
    assert (tmp_path / "graphs" / "depth_0.pt2").exists()


def test_timm_prepares_images_for_any_network():
    assert timm.data.resolve_model_data_config(plain_tree())["input_size"] == SIZE


def test_the_places_to_cut_any_network_are_listed():
    points = hierens.cut_points(network(), classifier="fc", input_size=SIZE)
    assert [point.name for point in points if point.stage_end] == ["second", "third", "third.1"]


def test_training_saves_the_weights_of_a_network_without_a_config(tmp_path):
    model = plain_tree()
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(SIZE, generator=generator), i % 4) for i in range(8)]
    config = TrainConfig(output_dir=str(tmp_path), batch_size=8, epochs=1, cpu=True)
    Trainer(model, config, DataLoader(data, 8), DataLoader(data, 8)).fit()
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


class Two(Tiny):
    def forward(self, x):
        return {"out": super().forward(x)}


MISTAKES = {
    "no such layer": (network, {"classifier": "fcc", "input_size": SIZE}, ["'fcc' is no layer", "classifier='fc'"]),
    "empty name": (network, {"classifier": "", "input_size": SIZE}, ["'' is no layer"]),
    "many layers": (network, {"classifier": "third", "input_size": SIZE}, ["holds 2 layers", "classifier='fc'"]),
    "not the last": (network, {"classifier": "first", "input_size": SIZE}, ["(2, 4)", "has 6 outputs", "the last"]),
    "no size": (network, {"classifier": "fc"}, ["given together", "input_size=(C, H, W)"]),
    "no classifier": (network, {"input_size": SIZE}, ["given together", "classifier='fc'"]),
    "two numbers": (network, {"classifier": "fc", "input_size": (32, 32)}, ["(C, H, W)", "got (32, 32)"]),
    "other channels": (network, {"classifier": "fc", "input_size": (1, 32, 32)}, ["does not run", "(2, 1, 32, 32)"]),
    "several outputs": (Two, {"classifier": "fc", "input_size": SIZE}, ["returns a dict", "the logits alone"]),
    "timm": (
        lambda: timm.create_model("test_resnet"),
        {"classifier": "fc", "input_size": SIZE},
        ["is a timm model", "omit classifier and input_size"],
    ),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("backbone, arguments, words", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_the_description_are_named(make, backbone, arguments, words):
    with pytest.raises(CutError) as caught:
        make(backbone(), 2, **arguments)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and all(word in message for word in words), message


def test_exits_of_networks_without_one_answer_per_image_are_refused():
    for make in (hierens.multi_exit, hierens.tree_with_exits):
        with pytest.raises(CutError, match="Pixels does not: use hierensify"):
            make(network(Pixels), 2, classifier="last", input_size=SIZE)


def test_new_classes_and_new_weights_need_a_timm_model():
    arguments = {"classifier": "fc", "input_size": SIZE}
    with pytest.raises(CutError, match="call reset_classifier"):
        hierens.multi_exit(network(), 2, num_classes=9, **arguments)
    with pytest.raises(ValueError, match="use 'copy'"):
        hierens.hierensify(network(), 2, init="reinit", **arguments)
