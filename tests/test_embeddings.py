"""Trees of backbones without classifier: embeddings at every depth, and what needs classes refuses them."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F

import hierens
from hierens.cutting.cut import CutError
from hierens.evaluation.metrics import evaluate_model
from hierens.hub.cards import model_card
from hierens.inference.calibration import collect
from hierens.inference.confidence import Confidence
from hierens.inference.policy import FixedDepth
from hierens.training.config import TrainConfig
from hierens.training.trainer import Trainer
from support.networks import difference, randomize, tiny_backbone

ENCODER = {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2}
BACKBONES = {  # an Identity as the classifier, two of them, none
    "test_resnet": {"num_classes": 0},
    "deit_tiny_distilled_patch16_224": {"num_classes": 0, "img_size": 64, "depth": 3},
    "qwen3_vit_306m_enc": {**ENCODER, "global_pool": "avg"},
}


def made(name, **arguments):
    torch.manual_seed(0)
    backbone = timm.create_model(name, **arguments).eval()
    randomize(backbone)
    return backbone


@pytest.fixture(scope="module", params=BACKBONES)
def case(request):
    """A backbone, its tree of copies, a tree whose branches differ, and images."""
    backbone = made(request.param, **BACKBONES[request.param])
    copies = hierens.hierensify(backbone, 3)
    tree = hierens.hierensify(backbone, at=copies.arguments()["at"], looped=copies.looped)
    tree.break_symmetry(0.5)
    return backbone, copies, tree, torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tree():
    model = hierens.hierensify(tiny_backbone(num_classes=0), 2).eval()
    model.break_symmetry(0.5)
    return model


@torch.no_grad()
def test_copies_give_the_backbones_embedding_at_every_depth(case):
    backbone, copies, _, x = case
    expected = backbone(x)
    assert copies.num_classes == 0 and expected.ndim == 2
    assert all(difference(copies(x, depth=depth), expected) < 1e-5 for depth in range(copies.depths))


@torch.no_grad()
def test_a_depth_is_the_mean_of_its_leaves_by_every_path(case):
    *_, model, x = case
    leaves = {}
    for executor in ("grouped", "looped"):
        model.set_executor(executor)
        leaves[executor] = model(x, reduce=False)
    model.set_executor("auto")
    of = leaves["looped"]
    assert difference(leaves["grouped"], of) < 1e-5 and difference(of[:, 0], of[:, 3]) > 1e-3
    steps = [step.logits for step in model.anytime(x)]
    for depth, size in enumerate(model.sizes):
        expected = torch.stack([of[:, leaf] for leaf in range(size)]).sum(0) / size
        found = model(x, depth=depth), model.at_depth(depth)(x), steps[size - 1], model.prediction_weights(of)[:, depth]
        assert all(difference(one, expected) < 1e-5 for one in found)


@torch.no_grad()
def test_embeddings_are_combined_as_asked(tree):
    x = torch.randn(3, 1, 16, 16)
    first, second = tree(x, reduce=False).unbind(1)
    assert torch.equal(tree.embed(x, combine="concat"), torch.cat([first, second], 1))
    assert torch.allclose(tree.embed(x, combine="mean"), (first + second) / 2)
    assert torch.allclose(tree.embed(x), F.normalize((first + second) / 2))
    assert torch.allclose(tree.embed(x, depth=0), F.normalize(first), atol=1e-6)
    assert torch.allclose(tree.fuse().embed(x, leaves=1), F.normalize(first), atol=1e-5)


@torch.no_grad()
def test_saved_and_loaded_trees_embed_as_before(case, tmp_path):
    *_, model, x = case
    model.save_pretrained(tmp_path)
    loaded = hierens.from_pretrained(tmp_path), timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert all(again.num_classes == 0 and torch.equal(again(x), model(x)) for again in loaded)


@torch.no_grad()
def test_a_removed_classifier_leads_to_the_same_kind_of_model(tree, tmp_path):
    x = torch.randn(3, 1, 16, 16)
    headless = hierens.hierensify(tiny_backbone(num_classes=7), 2).eval()
    headless.load_state_dict(tree.state_dict(), strict=False)
    headless.reset_classifier(0)
    assert headless.state_dict().keys() == tree.state_dict().keys() and torch.equal(headless(x), tree(x))
    headless.save_pretrained(tmp_path)
    again = hierens.from_pretrained(tmp_path)
    assert torch.equal(again(x), tree(x))
    again.reset_classifier(5)
    assert again(x).shape == (3, 5)


@torch.no_grad()
def test_a_tree_of_embeddings_grows(tree, tmp_path):
    x = torch.randn(3, 1, 16, 16)
    grown = tree.grow()
    assert all(difference(grown(x, depth=depth + 1), tree(x, depth=depth)) < 1e-5 for depth in range(2))
    grown.save_pretrained(tmp_path)
    assert torch.equal(hierens.from_pretrained(tmp_path)(x), grown(x))


@torch.no_grad()
def test_encoders_without_pooling_keep_their_tokens(tmp_path):
    backbone = made("qwen3_vit_88m_enc", **ENCODER, out_features=24)
    model, x = hierens.hierensify(backbone, 2), torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, 4, 24) and difference(model(x), backbone(x)) < 1e-5
    assert model(x, reduce=False).shape == (2, 2, 4, 24)
    with pytest.raises(ValueError, match=r"one vector per image, and the leaves of this model give \(4, 24\)"):
        model.embed(x)


def test_an_export_states_the_shape_of_the_embeddings(tree, tmp_path):
    tree.export(tmp_path, format="torch-export", depths=[0], size=(1, 16, 16))
    assert json.loads((tmp_path / "export.json").read_text())["output"]["shape"] == ["batch", 8]


def test_the_card_of_embeddings_names_no_classes(tree):
    text = model_card(tree)
    assert "pipeline_tag: image-feature-extraction" in text and "the outputs are embeddings" in text
    assert "classes;" not in text and "argmax" not in text and "embeddings = model(images" in text


def test_policies_without_classes_work(tree):
    x = torch.randn(3, 1, 16, 16)
    assert torch.equal(FixedDepth(0)(tree, x).logits, tree(x, depth=0))


def batches(images=4):
    return [(torch.randn(images, 1, 16, 16), torch.zeros(images, dtype=torch.int64))]


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda m: Confidence((0.5,))(m, batches()[0][0]), "a policy by confidence"),
        (lambda m: collect(m, batches()), "calibration"),
        (lambda m: evaluate_model(m, batches()), "evaluation by accuracy"),
        (lambda m: m.reorder(batches()), "reordering"),
        (lambda m: Trainer(m, TrainConfig(cpu=True), batches(), batches()), "training on labels"),
        (lambda m: hierens.multi_exit(tiny_backbone(num_classes=0), 2), "a multi-exit network"),
        (lambda m: hierens.tree_with_exits(tiny_backbone(num_classes=0), 2), "a tree with exits"),
    ],
)
def test_what_needs_classes_refuses_embeddings(tree, call, what):
    with pytest.raises(ValueError, match=f"^{what} needs classes, and this model has no classifier: call reset_class"):
        call(tree)


def test_other_mistakes_end_in_one_sentence(tree):
    x = torch.randn(1, 1, 16, 16)
    with pytest.raises(ValueError, match="combine must be 'mean', 'normalized' or 'concat', got 'sum'"):
        tree.embed(x, combine="sum")
    with pytest.raises(ValueError, match=r"outputs are logits of 3 classes: call reset_classifier\(0\) first"):
        hierens.hierensify(tiny_backbone(num_classes=3), 1).embed(x)
    cut_off = tiny_backbone(num_classes=3)
    cut_off.fc = torch.nn.Identity()
    with pytest.raises(CutError, match="no classifier for its classes: call reset_classifier"):
        hierens.hierensify(cut_off, 2)
