"""Dense prediction: whole segmentation networks as trees, the example that trains one, and its page."""

import json
import sys

import pytest
import segmentation as benchmark
import segmentation_models_pytorch as smp
import torch
import train_segmentation as example
from comparison import records

import hierens
from hierens.evaluation.dense import DenseMetrics
from hierens.evaluation.uncertainty import mutual_information
from hierens.inference.confidence import Confidence
from support.networks import close

SIZE = (3, 16, 16)


@pytest.fixture(scope="module")
def tree():
    torch.manual_seed(0)
    network = example.UNet((4, 4, 8), num_classes=3).eval()
    model = hierens.hierensify(network, 2, classifier="classifier", input_size=SIZE)
    with torch.no_grad():
        images = torch.randn(2, *SIZE)
        for depth in range(model.depths):
            assert close(model(images, depth=depth), network(images), 1e-5), depth
    model.break_symmetry(0.1)
    return model


def test_a_depth_of_pixels_leaf_by_leaf(tree):
    images = torch.randn(2, *SIZE)
    with torch.no_grad():
        leaf_logits = tree(images, reduce=False)
    assert leaf_logits.shape == (2, 2, 3, 16, 16)
    for step in tree.anytime(images):
        assert close(step.logits, leaf_logits[:, : step.leaves].mean(1))
    assert mutual_information(leaf_logits).shape == (2, 16, 16)


def test_no_images_have_no_pixels(tree):
    nothing = torch.zeros(0, *SIZE)
    assert tree(nothing).shape == (0, 3, 16, 16) and tree(nothing, reduce=False).shape == (0, 2, 3, 16, 16)
    assert [step.logits.shape for step in tree.anytime(nothing)] == [(0, 3, 16, 16)] * 2


def test_graphs_of_dense_predictions_say_their_shape(tree, tmp_path):
    tree.export(tmp_path / "graphs", format="torch-export", depths=[1])
    manifest = json.loads((tmp_path / "graphs" / "export.json").read_text())
    assert manifest["output"]["shape"] == ["batch", 3, 16, 16] and manifest["depths"][0]["difference"] < 1e-4


@pytest.mark.slow
def test_dense_predictions_as_onnx(tree, tmp_path):
    tree.export(tmp_path / "graphs", format="onnx")
    manifest = json.loads((tmp_path / "graphs" / "export.json").read_text())
    assert all(depth["difference"] < 1e-4 for depth in manifest["depths"])


def test_thresholds_need_one_prediction_per_image(tree):
    with pytest.raises(
        ValueError, match="a class for every pixel: use a policy that chooses the depth of a whole batch"
    ):
        Confidence((0.5,))(tree, torch.randn(2, *SIZE))


def test_metrics_of_a_tree(tree):
    found = DenseMetrics.of(tree, [(torch.randn(2, *SIZE), torch.randint(3, (2, 16, 16)))]).compute()
    assert found.count == 512 and len(found.miou) == 2 and len(found.leaf_miou) == 2


# --- the example ------------------------------------------------------------------------------------------------------


def test_images_are_photographs_with_digits():
    images, masks = example.digits_over_photographs(False, 4)
    again, other = example.digits_over_photographs(False, 4), example.digits_over_photographs(False, 4, seed=1)
    assert torch.equal(images, again[0]) and torch.equal(masks, again[1]) and not torch.equal(images, other[0])
    assert images.shape == (4, 3, 32, 32) and masks.unique().tolist() == [0, 1]
    assert (masks.flatten(1).double().mean(1) > 0.02).all()


def test_the_example_trains_a_tree(monkeypatch, capsys):
    flags = ["--cuts", "down3", "--images", "64", "--test-images", "8", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["train_segmentation.py", *flags])
    monkeypatch.setattr(example, "UNet", lambda: hierens_unet())
    example.main()
    assert "mIoU (%)" in capsys.readouterr().out


def hierens_unet(make=example.UNet):
    return make((4, 4, 4))


def test_the_page_is_written_from_records(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "RECORDS", tmp_path)
    monkeypatch.setattr(example, "UNet", hierens_unet)
    made = {name: benchmark.trained(name, 0, 1, 64, benchmark.SHOWN) for name in ("tree", "single")}
    for seed in range(2):
        for name in benchmark.ARMS:
            record = made["single" if name == "single" else "tree"] | {"seed": seed}
            records.write_json(records.record_file("segmentation", name, seed), record)
    written = benchmark.page(benchmark.read_records(), tmp_path)
    assert "| tree, L_I + L_HD" in written and "64 images are for training" in written
    assert (tmp_path / "segmentation.png").is_file() and (tmp_path / "segmentation_maps.png").is_file()


# --- networks of segmentation_models_pytorch --------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["Unet", "FPN"])
@torch.no_grad()
def test_networks_of_segmentation_models_pytorch(decoder):
    torch.manual_seed(0)
    small = {"decoder_channels": (8, 8, 8, 8, 4)} if decoder == "Unet" else {"decoder_pyramid_channels": 8}
    network = getattr(smp, decoder)("tu-test_resnet", encoder_weights=None, classes=3, **small).eval()
    network.requires_divisible_input_shape = False  # its check of sizes, which FPN has, cannot be traced
    model = hierens.hierensify(network, 2, classifier="segmentation_head.0", input_size=(3, 64, 64))
    images = torch.randn(2, 3, 64, 64)
    for depth in range(model.depths):
        assert close(model(images, depth=depth), network(images), 1e-5), depth
    model.break_symmetry(0.1)
    outputs = []
    for executor in ("looped", "grouped"):
        model.set_executor(executor)
        outputs.append(model(images, reduce=False))
    assert outputs[0].shape == (2, 2, 3, 64, 64) and close(outputs[1], outputs[0])
    assert close(model.at_depth(0)(images), outputs[0][:, 0])
