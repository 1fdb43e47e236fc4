"""Exported graphs answer as the model does, at every depth and batch size, and share one file of weights."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import hierens
from hierens.export import formats
from hierens.export.export import ExportError
from hierens.export.weight_file import WeightFile
from support.exportable import MODELS, tree


def onnx_run(folder, depth):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(folder / f"depth_{depth}.onnx", providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


@pytest.fixture(autouse=True)
def openvino_chooses_its_instructions(monkeypatch):
    """OpenVINO's own copy of oneDNN reads this variable, which is for torch's, and crashes where the CPU has more."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)


def openvino_run(folder, depth):
    pytest.importorskip("openvino")
    core = formats._openvino_core()  # of two at a time one leaves the process without a stack for signals
    graph = core.read_model(folder / f"depth_{depth}.xml", folder / "weights.bin")
    compiled = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])


def torch_run(folder, depth):
    return torch.export.load(folder / f"depth_{depth}.pt2").module()


RUNS = {"onnx": onnx_run, "openvino": openvino_run, "torch-export": torch_run}
FAST = [("tree", "onnx"), ("tree", "openvino"), ("looped", "torch-export"), ("fused", "torch-export")]
SLOW = [(name, format) for format in RUNS for name in MODELS if (name, format) not in FAST]
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


def needs(format):
    for package in {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}.get(format, ()):
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model and where it was exported to, once for all tests: the exporters take seconds."""
    made = {}

    def get(name, format):
        needs(format)
        if (name, format) not in made:
            model = MODELS[name]().eval()
            folder = model.export(tmp_path_factory.mktemp("exported") / "out", format, check=False)
            made[name, format] = model, folder
        return made[name, format]

    return get


@pytest.mark.sampled
@torch.no_grad()
@pytest.mark.parametrize(("name", "format"), CASES)
def test_every_depth_answers_as_the_model(name, format, exported):
    model, folder = exported(name, format)
    size = model.pretrained_cfg["input_size"]
    answers = []
    for depth in range(model.depths):
        run = RUNS[format](folder, depth)
        for batch in (1, 5):
            x = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
            own = model(x, depth=depth)
            assert (run(x) - own).abs().max() <= 1e-4 * own.abs().max()
        answers.append(own)
    assert (answers[0] - answers[-1]).abs().max() > 1e-2 * answers[0].abs().max()  # a control: depths differ


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_depths_share_one_file_of_weights(format, exported):
    model, folder = exported("tree", format)
    weights = 4 * model.parameter_counts()[-1]
    assert (folder / "weights.bin").stat().st_size < 1.05 * weights
    assert sum(4 * count for count in model.parameter_counts()) > 1.5 * weights  # a control: apart they would be more


def test_weight_file_finds_prefixes_only_where_they_are():
    file = WeightFile()
    whole = bytes(range(256)) * 8
    assert file.place(whole) == file.place(whole[:1000]) == 0
    assert file.place(whole[:1000] + b"another end") > 0
    assert file.place(whole + whole) % 64 == 0
    assert len(file) < 5 * len(whole)


def test_manifest_and_what_stays_as_it_was(tmp_path):
    model = tree().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (tmp_path / "depth_7.onnx").write_text("of an earlier export")
    (tmp_path / "notes.txt").write_text("mine")
    folder = model.export(tmp_path, "torch-export", depths=[2, 0], size=(1, 32, 32))
    said = json.loads((folder / "export.json").read_text())
    assert {file.name for file in folder.iterdir()} == {
        "depth_0.pt2", "depth_2.pt2", "export.json", "notes.txt",
    }  # fmt: skip
    assert [(row["depth"], row["networks"], row["file"]) for row in said["depths"]] == [
        (0, 1, "depth_0.pt2"),
        (2, 4, "depth_2.pt2"),
    ]
    assert [row["macs"] for row in said["depths"]] == [model.macs((1, 32, 32))[depth] for depth in (0, 2)]
    assert all(0 <= row["difference"] <= 1e-4 for row in said["depths"])
    assert said["input"]["shape"] == ["batch", 1, 32, 32]
    assert said["preprocessing"]["mean"] == list(model.pretrained_cfg["mean"])
    assert said["label_names"] == ["shirt"] * 10
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["tree", "ensemble"])
def test_batch_norms_of_blocks_are_folded(name, exported):
    model, folder = exported(name, "onnx")
    import onnx

    graph = onnx.load(folder / f"depth_{model.depths - 1}.onnx", load_external_data=False).graph
    assert "Conv" in {node.op_type for node in graph.node}
    assert not [node for node in graph.node if node.op_type == "BatchNormalization" and "levels" in node.input[1]]


@pytest.mark.parametrize(("name", "format"), [("tree", "onnx"), ("tree", "openvino"), ("mobile", "torch-export")])
def test_files_name_nothing_of_this_machine(name, format, exported):
    _, folder = exported(name, format)
    for file in folder.iterdir():
        assert hierens.__path__[0].encode() not in file.read_bytes(), file


@pytest.mark.sampled
@torch.no_grad()
def test_int8_is_close_and_small(tmp_path):
    needs("onnx")
    model = tree(2).eval()
    x = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    folder = model.export(tmp_path / "out", quantize="int8", calibration=[(x, torch.zeros(8))])
    said = json.loads((folder / "export.json").read_text())
    assert said["quantize"] == "int8"
    assert all(1e-4 < row["difference"] < 0.1 for row in said["depths"])
    own = model(x, depth=1)
    assert (onnx_run(folder, 1)(x) - own).abs().max() < 0.1 * own.abs().max()
    assert (folder / "weights.bin").stat().st_size < 2 * model.parameter_counts()[-1]  # bytes: floats have 4


class Capricious(nn.Module):
    """A layer whose path depends on the pixels."""

    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_what_cannot_be_exported_says_why(tmp_path):
    torch.manual_seed(0)
    backbone = timm.create_model("resnet8_cifar", channels=(8, 8, 16), in_chans=1)
    backbone.layer2[0].act1 = Capricious()
    model = hierens.hierensify(backbone.eval(), blocks=2)
    model.pretrained_cfg.update(input_size=(1, 32, 32))
    with pytest.raises(ExportError, match=r"depth 1 cannot be written as a graph: .*data-dependent"):
        model.export(tmp_path / "out", "torch-export")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"format": "onxx"}, "did you mean 'onnx'"),
        ({"format": "torchscript"}, "has deprecated it"),
        ({"format": "plain"}, "save_pretrained"),
        ({"depths": [3]}, "some of 0 to 2"),
        ({"depths": []}, "some of 0 to 2"),
        ({"size": (3, 28, 28)}, r"\(1, H, W\)"),
        ({"size": (28, 28)}, r"\(1, H, W\)"),
        ({"size": (1, 0, 0)}, r"\(1, H, W\)"),
        ({"quantize": "int4"}, "'int8' or None"),
        ({"quantize": "int8"}, "needs calibration"),
        ({"quantize": "int8", "calibration": [torch.zeros(3)]}, "needs calibration"),
        ({"quantize": "int8", "format": "torch-export"}, "is for format='onnx'"),
    ],
)
def test_wrong_arguments(arguments, said, tmp_path):
    needs("onnx")
    with pytest.raises(ExportError, match=said):
        tree().export(tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_answers_something_else_is_refused(tmp_path, monkeypatch):
    needs("onnx")
    monkeypatch.setattr(WeightFile, "place", lambda self, content, place=WeightFile.place: place(self, content[::-1]))
    with pytest.raises(ExportError, match="differ from the model's by"):
        tree(2).export(tmp_path / "out", depths=[0])
    assert not list(tmp_path.iterdir())


def test_missing_packages(tmp_path, monkeypatch):
    import hierens.export.export as exporting
    import hierens.export.formats as formats

    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r'onnx and onnxscript: pip install -e ".*\[export\]"'):
        tree(2).export(tmp_path / "out")
    monkeypatch.undo()
    needs("onnx")
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="onnxruntime is not installed"):
        tree(2).export(tmp_path / "out", depths=[0])


SIGNALLED = """
import gc, signal, sys
import timm, torch, hierens
from pathlib import Path
from hierens.export.formats import OpenVino
backbone = timm.create_model("resnet8_cifar", channels=(8, 8, 16), in_chans=1)
model = hierens.hierensify(backbone, blocks=2)
model.pretrained_cfg.update(input_size=(1, 16, 16))
model.export(sys.argv[1], format="openvino")
runners = [OpenVino(Path(sys.argv[1])).runner(f"depth_{depth}.xml") for depth in (0, 1)]
del runners[0]
runners.clear()
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
signal.raise_signal(signal.SIGUSR1)
"""


@pytest.mark.slow
def test_a_signal_after_openvino_reaches_its_handler(tmp_path):
    """Two of its cores at once would leave the thread a stack for signals that is unmapped: SIGSEGV at any signal."""
    needs("openvino")
    command = [sys.executable, "-X", "faulthandler", "-c", SIGNALLED, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["handled"]), done.stderr
