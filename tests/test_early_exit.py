"""One ONNX graph of all depths decides as `Confidence` does, image by image, and computes no more than that."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import hierens
from hierens.evaluation.uncertainty import MEASURES, certainty
from hierens.export.export import ExportError
from hierens.inference.policies import Confidence, Deadline, FixedDepth
from support.exportable import MODELS, tree

FAST = [("tree", "agreement"), ("ensemble", "probability")]
SLOW = [("tree", measure) for measure in MEASURES if measure != "agreement"]
SLOW += [(name, "probability") for name in MODELS if name not in ("tree", "ensemble")]
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.fixture(scope="module", autouse=True)
def needs_onnx():
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)


def session(folder):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # as the documentation advises
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model and where its graph was written, once for all tests."""
    made = {}

    def get(name, policy):
        if (name, policy) not in made:
            model = MODELS[name]().eval()
            folder = model.export(tmp_path_factory.mktemp("exported") / "out", policy=policy)
            made[name, policy] = model, folder
        return made[name, policy]

    return get


def images_of(model, count=24):
    return 2 * torch.randn(count, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))


def compared(model, folder, images, policy, batch):
    """The graph's outputs, after they were compared with the policy's."""
    given = {"thresholds": np.array(policy.thresholds, np.float32)}
    run = session(folder)
    parts = [run.run(None, {"images": part.numpy(), **given}) for part in images.split(batch)]
    logits, leaves, macs = (torch.from_numpy(np.concatenate(each)) for each in zip(*parts, strict=True))
    own = policy(model, images)
    assert torch.equal(leaves, own.leaves) and torch.equal(macs, own.macs)
    assert (logits - own.logits).abs().max() <= 1e-5 * own.logits.abs().max().clamp_min(1)
    return leaves


def thresholds_between(model, images, measure):
    """Thresholds at which images leave at several depths: each in a gap between the certainties that come so far."""
    found = []
    for depth in range(model.depths - 1):
        probe = Confidence((*found, 2.0), measure)
        coming = probe(model, images).leaves > model.sizes[depth - 1] if depth else torch.ones(len(images)) > 0
        certain = certainties(model, images[coming], depth, measure).sort().values
        quarter = len(certain) // 4
        place = quarter + int(certain.diff()[quarter : len(certain) - quarter].argmax())
        found.append(float(certain[place] + certain[place + 1]) / 2)
    return tuple(found)


@torch.no_grad()
def certainties(model, images, depth, measure):
    leaf_logits = model(images, depth=depth, reduce=False)
    return certainty(model(images, depth=depth), leaf_logits.argmax(-1), measure)


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "measure"), CASES)
def test_the_graph_decides_as_the_policy(name, measure, exported):
    model, folder = exported(name, Confidence((0.5,), measure))
    images = images_of(model)
    policy = Confidence(thresholds_between(model, images, measure), measure)
    for batch in (24, 5, 1):
        leaves = compared(model, folder, images, policy, batch)
    used = set(leaves.tolist())
    assert used == set(model.sizes) or (measure != "probability" and len(used) > 1)  # a control: some leave early


def test_thresholds_and_temperatures_are_inputs_with_defaults(exported):
    policy = Confidence((0.5,), "agreement")
    model, folder = exported("tree", policy)
    images, run = images_of(model), session(folder)
    assert [own.name for own in run.get_inputs()] == ["images"]
    _, leaves, macs = run.run(None, {"images": images.numpy()})
    assert leaves.tolist() == policy(model, images).leaves.tolist()
    assert set(macs.tolist()) <= set(model.macs())
    never = np.array([2, 2], np.float32)
    halves = {"images": images.numpy(), "thresholds": never, "temperatures": np.full(3, 2, np.float32)}
    whole = run.run(None, {"images": images.numpy(), "thresholds": never})[0]
    assert np.abs(run.run(None, halves)[0] - whole / 2).max() < 1e-6
    said = json.loads((folder / "export.json").read_text())
    assert said["policy"] == policy.to_dict()
    assert {row["file"] for row in said["depths"]} == {"model.onnx"}
    assert {file.name for file in folder.iterdir()} == {"model.onnx", "export.json"}


def graphs(graph):
    """A graph, and those inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


@pytest.mark.parametrize("policy", [Confidence((0.5,), "agreement"), FixedDepth(1)])
def test_each_depth_has_its_own_layers_inside_an_if(policy, exported):
    import onnx

    model, folder = exported("tree", policy)
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    graph = onnx.load(folder / "model.onnx").graph
    convolutions = [sum(node.op_type == "Conv" for node in own.node) for own in graphs(graph)]
    of_one = convolutions[0]
    assert [count for count in convolutions if count] == [of_one, convolutions[1], convolutions[2]]
    weights = sum(len(own.raw_data) for each in graphs(graph) for own in each.initializer)
    assert weights <= 4.02 * model.parameter_counts()[-1]  # batch norms are folded


@torch.no_grad()
def test_the_depth_as_an_input(exported):
    model, folder = exported("tree", FixedDepth(1))
    images, run = images_of(model, 5), session(folder)
    for depth in range(model.depths):
        logits, leaves, macs = run.run(None, {"images": images.numpy(), "depth": np.array(depth)})
        assert (torch.from_numpy(logits) - model(images, depth=depth)).abs().max() <= 1e-5
        assert set(leaves) == {model.sizes[depth]} and set(macs) == {model.macs()[depth]}
    assert set(run.run(None, {"images": images.numpy()})[1]) == {2}


@pytest.mark.parametrize(
    ("policy", "arguments", "said"),
    [
        (Deadline(0.1), {}, "'confidence' or 'fixed', not 'deadline'"),
        (Confidence((0.5,) * 5), {}, "5 thresholds are for a model of 6 depths"),
        (FixedDepth(leaves=3), {}, r"the networks of a depth, \(1, 2, 4\), not 3"),
        (Confidence((0.5,)), {"format": "torch-export"}, "policy is for format='onnx'"),
        (Confidence((0.5,)), {"depths": [0]}, "with all depths"),
    ],
)
def test_what_cannot_be_written(policy, arguments, said, tmp_path):
    with pytest.raises(ExportError, match=said):
        tree().export(tmp_path / "out", policy=policy, **arguments)
    assert not list(tmp_path.iterdir())


def test_rows_that_answer_something_else_are_refused(tmp_path, monkeypatch):
    from hierens.export.nested_graph import _Scope

    right = _Scope._rows_in

    def of_others(self, around):
        """Rows of other images, unless all go on."""
        rows, count = right(self, around), self.op("Shape", [around.values[self.flat.graph.inputs[0]]], start=0, end=1)
        return self.op("Mod", [self.op("Add", [rows, self.op("Sub", [count, self.op("Size", [rows])])]), count])

    monkeypatch.setattr(_Scope, "_rows_in", of_others)
    with pytest.raises(ExportError, match="where images leave at several depths"):
        tree(2).export(tmp_path / "out", policy=Confidence((0.5,)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tree", "exits"])
def test_a_thousand_digits_at_three_thresholds(kind, tmp_path):
    """A trained tree, and exits without training; a quarter, half and three quarters of the images leave at once."""
    from sklearn.datasets import load_digits

    trained = hierens.from_pretrained(Path(__file__).parents[1] / "models" / "digits-tree").eval()
    model = trained if kind == "tree" else MODELS["exits"]()
    folder = model.export(tmp_path / "out", policy=Confidence((0.5,)))
    size = model.pretrained_cfg["input_size"]
    digits = torch.tensor(load_digits().images[:1000], dtype=torch.float32)[:, None] / 16
    images = torch.nn.functional.interpolate(digits, size[1:], mode="bilinear").expand(-1, *size[:1], -1, -1)
    images = (images - model.pretrained_cfg["mean"][0]) / model.pretrained_cfg["std"][0]
    certain = certainties(model, images, 0, "probability").sort().values
    for place in (250, 500, 750):
        threshold = float(certain[place - 1] + certain[place]) / 2
        for batch in (1000, 64, 1):
            leaves = compared(model, folder, images, Confidence((threshold,) * (model.depths - 1)), batch)
        assert (leaves == 1).sum() == 1000 - place
