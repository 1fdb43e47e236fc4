"""Cuts: blocks of about equal work that compose to the backbone, and clear words where there are none."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hierens.core.timm_info import example_input, input_size
from hierens.cutting.cut import CutError, cut, cut_points

# Beyond the two families: the cutting knows none of them by name.
OTHERS = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_patch16_224": {},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 2, 1)},
    "convnext_atto": {},
    "regnetx_002": {},
    "densenet121": {"block_config": (2, 2, 2, 2)},
    "mobileone_s0": {},
    "resmlp_12_224": {},
}


def run(pieces, value):
    for piece in pieces:
        value = piece(*value) if isinstance(value, tuple) else piece(value)
    return value


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_pieces_compose_in_evaluation_and_in_training(backbone, images, blocks):
    cutting = cut(backbone, blocks)
    pieces = (*cutting.blocks, cutting.head, cutting.classifier)
    assert len(cutting.blocks) == blocks
    for training in (False, True):
        outputs, statistics = [], []
        for network in (nn.ModuleList(pieces), backbone):
            network.train(training)
            torch.manual_seed(0)
            with torch.no_grad():
                outputs.append(run(pieces, images) if network is not backbone else backbone(images))
            moments = {n.split(".", 1)[-1]: b for n, b in network.named_buffers() if network is not backbone}
            statistics.append(moments or dict(network.named_buffers()))
        assert torch.equal(*outputs), "training" if training else "evaluation"
        assert all(torch.equal(statistics[0][name], value) for name, value in statistics[1].items())


@pytest.mark.parametrize("name", ["resnet18", "resnet26d", "mobilenetv2_075", "efficientnet_b0", "mnasnet_small"])
def test_blocks_share_the_work(name, images):
    cutting = cut(timm.create_model(name).eval(), 4, example=images[:1])
    shares, value = [], images[:1]
    for piece in cutting.blocks:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            value = run([piece], value)
        shares.append(counter.get_total_flops())
    assert max(shares) <= 0.4 * sum(shares), [round(share / sum(shares), 2) for share in shares]


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_are_cut_the_same_way(name):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=5, **OTHERS[name]).eval()
    cutting = cut(network, 4)
    x = example_input(network, 2)
    with torch.no_grad():
        assert torch.equal(run((*cutting.blocks, cutting.head, cutting.classifier), x), network(x))
    own = {n for piece in (*cutting.blocks, cutting.head, cutting.classifier) for n, _ in piece.named_parameters()}
    assert own == {name for name, _ in network.named_parameters()}


def test_names_are_the_backbones_and_cuts_can_be_repeated_by_them(backbone, images):
    first = cut(backbone, 4)
    again = cut(backbone, at=first.at)
    assert again.at == first.at
    for one, other in zip(first.blocks, again.blocks, strict=True):
        assert one.state_dict().keys() == other.state_dict().keys()


def test_cuts_by_hand_open_what_is_in_the_way():
    network = timm.create_model("resnet10t", num_classes=3)
    cutting = cut(network, at=["layer1", "layer3.0"])
    assert cutting.at == ("layer1", "layer3")
    assert {name.split(".")[0] for name in cutting.blocks[1].state_dict()} == {"layer1", "layer2"}


def test_cut_points_tell_where_the_work_lies():
    points = cut_points(timm.create_model("resnet18"))
    shares = [point.macs_before for point in points]
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] < 1
    assert {point.name for point in points if point.stage_end} >= {"layer2", "layer3", "layer4"}
    assert all(point.crossing == 1 for point in points)


class InPlace(nn.Module):
    """A network whose second layer changes its input: a cut just before it would spoil the siblings' input."""

    num_classes = num_features = 4

    def __init__(self):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3), nn.ReLU()
        self.spoil = Spoiling()
        self.body, self.fc = nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward_features(self, x):
        return self.body(self.spoil(self.act(self.stem(x))))

    def forward(self, x):
        return self.fc(self.forward_features(x).mean((2, 3)))

    def get_classifier(self):
        return self.fc


class Spoiling(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.conv(x.add_(1))


def test_no_cut_before_an_in_place_change():
    points = [point.name for point in cut_points(InPlace())]
    assert "spoil" not in points and "body" in points


class Branching(InPlace):
    """Its forward pass asks for values."""

    def forward_features(self, x):
        return x if x.sum() > 0 else -x


def test_dropout_follows_the_mode_after_cutting():
    network = timm.create_model("mobilenetv2_035", num_classes=5, drop_rate=0.5).eval()
    cutting = cut(network, 2)
    x = torch.randn(2, 3, 64, 64)
    features = run(cutting.blocks, x)
    head = nn.ModuleList([cutting.head, cutting.classifier])
    assert torch.equal(run(head, features), run(head, features))
    head.train()
    assert not torch.equal(run(head, features), run(head, features))


def test_sizes_come_from_the_model():
    assert input_size(timm.create_model("resnet10t", in_chans=5)) == (5, 176, 176)
    assert input_size(timm.create_model("vit_tiny_patch16_224", img_size=64, in_chans=1)) == (1, 64, 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cut(nn.Linear(2, 2)), "torch.nn.modules.linear.Linear is not a timm model: give classifier="),
        (lambda: cut(Branching(), example=torch.randn(1, 3, 16, 16)), "Branching cannot be traced"),
        (lambda: cut(InPlace(), 9, example=torch.randn(1, 3, 16, 16)), "blocks=9 is more than .*: [2-4] at most"),
        (
            lambda: cut(timm.create_model("resnet10t"), at=["layer9"]),
            "no module named 'layer9'; it calls, among others: conv1",
        ),
        (lambda: cut(timm.create_model("resnet10t"), at=["fc"]), "before its head"),
        (lambda: cut(timm.create_model("resnet10t"), at=["layer2", "layer2"]), "without repetition"),
    ],
)
def test_what_cannot_be_cut_says_why(call, message):
    with pytest.raises(CutError, match=message):
        call()


@pytest.mark.sampled
def test_lists_that_a_backbone_writes_into_are_traced_to_their_makers():
    """HRNet's modules replace the entries of the list that the module before returned."""
    with torch.device("meta"):
        backbone = timm.create_model("hrnet_w32", num_classes=10).eval()
    cutting = cut(backbone, 4)
    assert len(cutting.blocks) == 4 and cutting.at[1].startswith("stage3")


def test_blocks_that_ask_for_a_list_get_one():
    """SelecSLS' blocks test whether they are given a list: one of them opened needs the one before opened too."""
    with torch.device("meta"):
        backbone = timm.create_model("selecsls60", num_classes=10).eval()
    at = cut(backbone, 4).at
    assert at[1].startswith("features.")
    assert cut(backbone, at=at).at == at
