"""One ONNX graph of all depths, which runs only those that a policy chooses.

With `Confidence`, images whose prediction is certain enough leave inside the graph, and the others go on with what has
been computed. With `FixedDepth`, the depth is an input. The policy's values are the defaults of optional inputs, so a
call can give others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hierens.branches.fused_level import FusedLevel
from hierens.branches.level import Level
from hierens.core.adaptive_base import AdaptiveBase
from hierens.core.modes import evaluating
from hierens.evaluation.uncertainty import certainty
from hierens.export.formats import INPUT, quiet
from hierens.export.graphs import TRACED_BATCH, for_inference, program
from hierens.inference.confidence import EVERYBODY, NOBODY, Confidence
from hierens.inference.policy import FixedDepth, Policy

FILE = "model.onnx"
Feeds = dict[str, NDArray[Any]]
RunAll = Callable[[Feeds], list[NDArray[Any]]]


class _ByConfidence(nn.Module):
    """The logits of every depth, and which images go on after each but the last, as `Confidence` decides."""

    def __init__(self, model: AdaptiveBase, policy: Confidence) -> None:
        super().__init__()
        self.model, self.measure = model, policy.measure

    def forward(self, images: Tensor, thresholds: Tensor, temperatures: Tensor) -> tuple[Tensor, ...]:
        logits: list[Tensor] = []
        votes: list[Tensor] = []
        further: list[Tensor] = []
        for step in self.model.anytime(images):
            votes.append(step.newest.argmax(-1))
            if step.leaves in self.model.sizes:
                depth = len(logits)
                logits.append(step.logits / temperatures[depth])
                if depth < self.model.depths - 1:
                    certain = certainty(logits[depth], torch.stack(votes, 1), self.measure)
                    further.append(~(certain >= thresholds[depth]))
        return (*logits, *further)


class _ByDepth(nn.Module):
    """The logits of every depth, and after each but the last whether all images go on."""

    def __init__(self, model: AdaptiveBase) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, depth: Tensor) -> tuple[Tensor, ...]:
        logits = [step.logits for step in self.model.anytime(images) if step.leaves in self.model.sizes]
        return (*logits, *(depth > smaller for smaller in range(len(logits) - 1)))


def defaults(model: AdaptiveBase, policy: Policy, size: tuple[int, ...]) -> dict[str, Tensor]:
    """The optional inputs of the graph and their values: thresholds and temperatures, or a depth.

    Raises:
        ValueError: the policy depends on time, or does not fit the model.
    """
    if not isinstance(policy, (Confidence, FixedDepth)):
        kind = getattr(policy, "kind", type(policy).__name__)
        raise ValueError(f"a graph can choose its depth by a policy 'confidence' or 'fixed', not {kind!r}.")
    with torch.no_grad(), evaluating(model):
        like = next(model.parameters())
        policy(model, torch.zeros(TRACED_BATCH, *size, device=like.device, dtype=like.dtype))
    if isinstance(policy, Confidence):
        missing = max(model.depths - 1, 1) - len(policy.thresholds)
        thresholds = [*policy.thresholds, *policy.thresholds[-1:] * missing]
        return {"thresholds": torch.tensor(thresholds), "temperatures": torch.ones(model.depths)}
    leaves = model.leaves_at(policy.depth, policy.leaves)
    if leaves not in model.sizes:
        raise ValueError(f"a graph runs the {model.unit} of a depth, {model.sizes}, not {leaves}.")
    return {"depth": torch.tensor(model.sizes.index(leaves))}


def write(model: AdaptiveBase, policy: Policy, folder: Path, size: tuple[int, ...]) -> None:
    """Write the graph, with its weights, from `images` (N, C, H, W) to `logits`, `leaves` and `macs` of each image.

    Raises:
        ValueError: as `defaults`.
    """
    import onnx_ir as ir

    from hierens.export.nested_graph import FlatGraph, nested

    optional, macs = defaults(model, policy, size), model.macs(size)
    plain: Any = for_inference(model).to(memory_format=torch.contiguous_format)
    plain.macs(size)  # counted before the trace, since counting runs the model
    for name, level in list(plain.named_modules()):
        if isinstance(level, FusedLevel):
            plain.set_submodule(name, Level(level.part(b, b + 1).first() for b in range(level.branches)))
    module = _ByConfidence(plain, policy) if isinstance(policy, Confidence) else _ByDepth(plain)
    inputs = {INPUT: torch.zeros(TRACED_BATCH, *size), **optional}
    with quiet():
        traced = program(module, inputs, contiguous=True)
        exported = torch.onnx.export(traced, (), dynamo=True, optimize=True, verbose=False, input_names=list(inputs))
    assert exported is not None
    found = exported.model
    logits, further = found.graph.outputs[: model.depths], found.graph.outputs[model.depths :]
    flat = FlatGraph(found.graph, logits, further, per_image=isinstance(policy, Confidence))
    graph = nested(flat, {"leaves": model.sizes, "macs": macs})
    for value in graph.inputs[1:]:
        value.const_value = ir.tensor(optional[str(value.name)].numpy(), name=value.name)
        graph.register_initializer(value)
    graph.opset_imports.update(found.opset_imports)
    ir.save(ir.Model(graph, ir_version=found.ir_version, functions=list(found.functions.values())), folder / FILE)


def runner(folder: Path) -> RunAll:
    """A function from inputs by name to the outputs that runs a written graph on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it would warn that optional inputs are not constants
    session = onnxruntime.InferenceSession(folder / FILE, options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)


@torch.no_grad()
def difference_of_rows(model: AdaptiveBase, policy: Confidence, run: RunAll, images: Tensor) -> float:
    """The difference from the model's outputs, relative to the largest logit, if some images leave at the first depth.

    The others go on to the last. Images are compared at the depth at which the graph says that they left.
    """
    like = next(model.parameters())
    images = images.to(like.device, like.dtype)
    with evaluating(model):
        first = model(images, depth=0)
        certain = certainty(first, first.argmax(-1)[:, None], policy.measure)
        thresholds = [float(certain.max() + certain.min()) / 2, *[NOBODY] * (model.depths - 2)]
        feeds = {INPUT: images.float().cpu().numpy(), "thresholds": np.array(thresholds, np.float32)}
        logits, leaves, _ = run(feeds)
        own = torch.cat([model(image[None], leaves=int(n)) for image, n in zip(images, leaves, strict=True)]).float()
    return float((torch.from_numpy(logits) - own.cpu()).abs().max() / own.abs().max().clamp_min(1e-12))


def at_depth(run: RunAll, policy: Policy, depth: int, depths: int) -> Callable[[NDArray[np.float32]], NDArray[Any]]:
    """A function from images to logits of one depth, for comparisons: all images leave there."""
    chosen: Feeds = {"depth": np.array(depth)}
    if isinstance(policy, Confidence):
        thresholds = [NOBODY if smaller < depth else EVERYBODY for smaller in range(max(depths - 1, 1))]
        chosen = {"thresholds": np.array(thresholds, np.float32)}
    return lambda images: run({INPUT: images, **chosen})[0]
