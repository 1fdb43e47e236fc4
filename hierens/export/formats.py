"""Formats of exported graphs: each writes the graphs of a model's depths, and runs them."""

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
_INLINE = 1024  # bytes up to which a tensor, such as a shape, is stored in the graph itself


class Format(ABC):
    """Writes graphs into a folder, the deepest first."""

    suffix: ClassVar[str]
    writes_with: ClassVar[tuple[str, ...]] = ()
    """packages needed for writing"""
    runs_with: ClassVar[str | None] = None
    """package needed by `runner`"""
    weights: ClassVar[str | None] = None
    """the file from which all graphs read their weights"""
    largest_batch: ClassVar[int | None] = None
    """largest batch, if it must be known at export"""
    separate: ClassVar[bool] = False
    """whether levels with token layers become a module per branch"""

    def __init__(self, folder: Path) -> None:
        self.folder, self._weights = folder, WeightFile()

    @abstractmethod
    def write(self, program: ExportedProgram, name: str, size: tuple[int, ...]) -> None:
        """Write the graph of one depth."""

    def finish(self) -> None:
        """Write the weights, if the graphs share them."""
        if self.weights is not None:
            self._weights.write(self.folder / self.weights)

    @abstractmethod
    def runner(self, name: str) -> Run:
        """A function from images to logits that runs a written graph."""

    @classmethod
    def missing(cls) -> list[str]:
        """Packages needed for writing that are not installed."""
        return [package for package in cls.writes_with if find_spec(package) is None]


class Onnx(Format):
    """ONNX graphs with their weights as external data in one file."""

    suffix = ".onnx"
    writes_with = ("onnx", "onnxscript")
    runs_with = "onnxruntime"
    weights = WEIGHTS

    def write(self, program: ExportedProgram, name: str, size: tuple[int, ...]) -> None:
        """Write the graph of one depth."""
        with quiet():
            exported = torch.onnx.export(
                program, (), dynamo=True, optimize=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT]
            )
        assert exported is not None
        self.share(exported.model, name)

    def share(self, model: Any, name: str) -> None:
        """Write a graph (`onnx_ir.Model`) whose weights are in the common file."""
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
            node.metadata_props.clear()  # debugging information of the exporter
        onnx_ir.save(model, self.folder / name)

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

    def runner(self, name: str) -> Run:
        """A session on the CPU."""
        core = _openvino_core()
        model = core.read_model(self.folder / name, self.folder / WEIGHTS)
        # By default it computes in bfloat16 if the processor supports this.
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda images: compiled(images)[0]


@functools.cache
def _openvino_core() -> Any:
    """OpenVINO's Core, created once per process and never freed.

    Every Core replaces the thread's signal stack and unmaps it when it is freed (OpenVINO 2026.4). With two at a time,
    the thread keeps an unmapped stack, and the next signal, also Ctrl-C, ends the process.
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
    separate = True  # it uses views of all branches' tokens where torch copies them
    largest_batch = 8  # the runtime plans its memory for this size; 16 or more became 15 (ExecuTorch 1.5)

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
    """Suppress the exporters' own messages."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
