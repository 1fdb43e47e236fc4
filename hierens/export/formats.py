"""How the graphs of a model's depths are written, and run, in each format."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from hierens.export.weight_file import WeightFile

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]
WEIGHTS = "weights.bin"
INPUT, OUTPUT = "images", "logits"
_INLINE = 1024  # bytes up to which a graph keeps a tensor itself: shapes and the like


class Format(ABC):
    """Writes graphs into a folder, the deepest first."""

    suffix: ClassVar[str]
    writes_with: ClassVar[tuple[str, ...]] = ()
    """packages that writing takes"""
    runs_with: ClassVar[str | None] = None
    """the package that `runner` takes"""
    weights: ClassVar[str | None] = None
    """the file that all graphs read their weights from"""
    largest_batch: ClassVar[int | None] = None
    """images at a time that graphs take, where they must know beforehand"""
    apart: ClassVar[bool] = False
    """whether levels with token layers become a module per branch"""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def write(self, program: ExportedProgram, name: str, size: tuple[int, ...]) -> None:
        """Write the graph of one depth."""

    def finish(self) -> None:  # noqa: B027 (not all of them share something)
        """Write what the graphs share."""

    @abstractmethod
    def runner(self, name: str) -> Run:
        """The runtime with a graph that was written: images to logits."""

    @classmethod
    def missing(cls) -> list[str]:
        """Packages that writing takes and that are not installed."""
        return [package for package in cls.writes_with if find_spec(package) is None]


class Onnx(Format):
    """ONNX graphs with their weights as external data in one file."""

    suffix = ".onnx"
    writes_with = ("onnx", "onnxscript")
    runs_with = "onnxruntime"
    weights = WEIGHTS

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._weights = WeightFile()

    def write(self, program: ExportedProgram, name: str, size: tuple[int, ...]) -> None:
        """Write the graph of one depth."""
        with quiet():
            exported = torch.onnx.export(
                program, (), dynamo=True, optimize=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT]
            )
        assert exported is not None
        self.share(exported.model, name)

    def share(self, model: Any, name: str) -> None:
        """Write a graph (`onnx_ir.Model`) whose weights lie in the common file."""
        import onnx_ir

        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor.nbytes > _INLINE:
                content = tensor.tobytes()
                value.const_value = onnx_ir.ExternalTensor(
                    WEIGHTS,
                    self._weights.place(content),
                    len(content),
                    tensor.dtype,
                    shape=tensor.shape,
                    name=value.name,
                    base_dir=self.folder,
                )
        for node in model.graph:
            node.metadata_props.clear()  # what the exporter notes for its own debugging
        onnx_ir.save(model, self.folder / name)

    def finish(self) -> None:
        """Write the weights."""
        self._weights.write(self.folder / WEIGHTS)

    def runner(self, name: str) -> Run:
        """A session on the CPU."""
        import onnxruntime

        session = onnxruntime.InferenceSession(self.folder / name, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {INPUT: images})[0]


class OpenVino(Format):
    """OpenVINO's intermediate representation: graphs in XML, their weights in one file."""

    suffix = ".xml"
    writes_with = ("openvino",)
    runs_with = "openvino"
    weights = WEIGHTS

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._weights = WeightFile()

    def write(self, program: ExportedProgram, name: str, size: tuple[int, ...]) -> None:
        """Write the graph of one depth."""
        import openvino

        with quiet(), tempfile.TemporaryDirectory() as scratch:
            model = openvino.convert_model(program)
            model.reshape([-1, *size])
            model.inputs[0].set_names({INPUT})
            model.outputs[0].set_names({OUTPUT})
            file = Path(scratch) / name
            openvino.save_model(model, file, compress_to_fp16=False)
            tree, content = ElementTree.parse(file), file.with_suffix(".bin").read_bytes()
        for data in tree.iterfind(".//layer[@type='Const']/data"):
            offset, length = int(data.attrib["offset"]), int(data.attrib["size"])
            data.set("offset", str(self._weights.place(content[offset : offset + length])))
        tree.write(self.folder / name)

    def finish(self) -> None:
        """Write the weights."""
        self._weights.write(self.folder / WEIGHTS)

    def runner(self, name: str) -> Run:
        """A session on the CPU."""
        core = _openvino_core()
        model = core.read_model(self.folder / name, self.folder / WEIGHTS)
        # By default it computes in bfloat16 where the processor can.
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda images: compiled(images)[0]


@functools.cache
def _openvino_core() -> Any:
    """OpenVINO, once for the process and to its end.

    Every Core gives the thread another stack for signals and unmaps it when it goes (OpenVINO 2026.4). Of two at a time
    the thread keeps a stack that is gone, and the next signal, Ctrl-C too, ends the process.
    """
    import openvino

    return openvino.Core()


class TorchExport(Format):
    """PyTorch's own archives, each with its weights."""

    suffix = ".pt2"

    def write(self, program: ExportedProgram, name: str, size: tuple[int, ...]) -> None:
        """Write the graph of one depth."""
        with quiet():
            torch.export.save(program, self.folder / name)

    def runner(self, name: str) -> Run:
        """A session on the CPU."""
        with quiet():
            module = torch.export.load(self.folder / name).module()
        return lambda images: module(torch.from_numpy(images)).detach().numpy()


class ExecuTorch(Format):
    """Programs for phones and other small devices, each with its weights, lowered to XNNPACK."""

    suffix = ".pte"
    writes_with = ("executorch",)
    runs_with = "executorch"
    apart = True  # it takes views of all branches' tokens where torch copies them
    largest_batch = 8  # the runtime plans its memory for that many; 16 or more became 15 (ExecuTorch 1.5)

    def write(self, program: ExportedProgram, name: str, size: tuple[int, ...]) -> None:
        """Write the graph of one depth."""
        with quiet():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            lowered.to_executorch().save(str(self.folder / name))

    def runner(self, name: str) -> Run:
        """A session on the CPU."""
        with quiet():
            from executorch.runtime import Runtime

            program = Runtime.get().load_program(str(self.folder / name))
            method = program.load_method("forward")
        return lambda images: method.execute([torch.from_numpy(images).contiguous()])[0].numpy()


FORMATS: dict[str, type[Format]] = {
    "onnx": Onnx,
    "openvino": OpenVino,
    "torch-export": TorchExport,
    "executorch": ExecuTorch,
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters say of their own workings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
