"""Quantises exported ONNX graphs to 8-bit integers, with ONNX Runtime's static quantisation."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hierens.export.formats import INPUT, Format, Onnx, quiet

_WEIGHTED = ["Conv", "Gemm", "MatMul"]
_BETWEEN = ["Add", "Relu", "Clip"]  # quantised as well, so that a convnet needs no conversions between layers


def quantized(written: Format, folder: Path, names: Sequence[str], calibration: Sequence[Tensor]) -> Onnx:
    """The same graphs quantised, per channel; they share one file of weights as well.

    Args:
        written: the ONNX graphs.
        folder: an empty folder for the result.
        names: of the graphs, the deepest first.
        calibration: batches of images (N, C, H, W).
    """
    batches = [images.float().cpu().numpy() for images in calibration]
    result = Onnx(folder)
    for name in names:
        result.share(_quantized(written.folder / name, batches), name)
    result.finish()
    return result


def _quantized(file: Path, batches: list[NDArray[np.float32]]) -> Any:
    """The quantised graph (`onnx_ir.Model`)."""
    import onnx
    import onnx_ir
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left: Iterator[NDArray[np.float32]] = iter(batches)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            images = next(self._left, None)
            return None if images is None else {INPUT: images}

    with quiet(), tempfile.TemporaryDirectory() as scratch:
        ready, done = Path(scratch) / "ready.onnx", Path(scratch) / "done.onnx"
        options = onnxruntime.SessionOptions()  # folds the remaining batch norms
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(ready)
        onnxruntime.InferenceSession(onnx.load(file).SerializeToString(), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(ready)
        quantize_static(
            graph,
            done,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=_WEIGHTED if _has_tokens(graph) else _WEIGHTED + _BETWEEN,
            nodes_to_exclude=_batched(graph),
            extra_options={"MatMulConstBOnly": True},
        )
        return onnx_ir.from_proto(onnx.load(done))


def _has_tokens(graph: Any) -> bool:
    """Whether the graph is a transformer, whose sums and attention have too large a range for 8 bits."""
    return any(node.op_type == "LayerNormalization" for node in graph.graph.node)


def _batched(graph: Any) -> list[str]:
    """Batched matrix products with a weight per branch, which the runtime cannot quantise."""
    stacks = {weight.name for weight in graph.graph.initializer if len(weight.dims) > 2}
    return [node.name for node in graph.graph.node if node.op_type == "MatMul" and stacks & set(node.input)]
