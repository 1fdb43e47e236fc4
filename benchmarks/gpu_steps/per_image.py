"""The step `per-image`: each image leaves at its own depth, in eager mode and with CUDA graphs.

In eager mode, the policy `Confidence` runs one branch after another. A CUDA graph has a fixed batch size. Therefore one
graph is captured for each depth and for each of some batch sizes (buckets). After a depth, the activations of the
images that go on are copied to the buffers of the smallest bucket that holds them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from speed import rounds
from torch import Tensor

from gpu_steps.cuda_graphs import captured
from gpu_steps.networks import NETWORKS, TINY, built
from gpu_steps.records import Context, Record, measure
from gpu_steps.speed_table import Call, quartiles
from hierens.branches.activations import Activations
from hierens.inference.confidence import NOBODY, Confidence
from hierens.models.ensemble import FusedEnsemble

MEASURED = {False: ("hne_resnet50_cifar_small", "resnet18"), True: ("tiny_resnet",)}
FULL, FULL_GRAPH, EAGER, GRAPHS = "full depth", "full depth, CUDA graph", "per image", "per image, CUDA graphs"
LEAVING = (0.25, 0.5, 0.75)  # share of the images that leave at each depth, of those that reach it
_BUCKETS = 8  # batch sizes with a graph: 1/8, 2/8, ... of the batch


def per_image(context: Context, batch_sizes: Sequence[int], seconds: float) -> int:
    """Time images that leave at different depths; write per-image.json.

    Args:
        context: folders and time limit.
        batch_sizes: images per call.
        seconds: duration of the rounds of one cell.

    Returns:
        The number of cells that remain.
    """
    cases = (
        (f"{name}, batch {batch}, {share:.0%} leave", 40, partial(_cell, context, name, batch, share, seconds))
        for name in MEASURED[context.tiny]
        for batch in batch_sizes
        for share in LEAVING
    )
    return measure(Record(context, "per-image", go_on=True), cases)


@torch.no_grad()
def _cell(context: Context, name: str, batch: int, share: float, seconds: float) -> dict[str, Any]:
    network = {**NETWORKS, **TINY}[name]
    if (exact := _difference(name, batch, context.device)) > 1e-3:
        raise ValueError(f"graphs give other outputs in float32: {exact:.1e} of the largest logit")
    model, walk, x = _prepared(name, batch, torch.bfloat16, context.device)
    thresholds = walk.thresholds(x, share)
    policy = Confidence(tuple(thresholds))
    ways: dict[str, Call] = {
        FULL: lambda: model(x),
        FULL_GRAPH: captured(lambda: model(x), context.device),
        EAGER: lambda: policy(model, x).logits,
        GRAPHS: lambda: walk(x, thresholds)[0],
    }
    times = rounds(ways, seconds)
    macs, leaves = model.macs(network.size), walk(x, thresholds)[1]
    return {
        "network": name,
        "batch": batch,
        "leaving": share,
        "precision": "bf16",
        "difference": exact,
        "macs": sum(macs[model.sizes.index(int(count))] for count in leaves) / batch / macs[-1],
        "leaves": [int((leaves == count).sum()) for count in model.sizes],
        "ms": {way: quartiles(own) for way, own in times.items()},
    }


@lru_cache(maxsize=1)
def _difference(name: str, batch: int, device: torch.device) -> float:
    """The largest difference from the policy's logits in float32, relative to the largest one."""
    model, walk, x = _prepared(name, batch, torch.float32, device)
    thresholds = walk.thresholds(x, 0.5)
    found, (logits, leaves) = Confidence(tuple(thresholds))(model, x), walk(x, thresholds)
    same = found.leaves == leaves  # rounding decides for images at a threshold
    if same.float().mean() < 0.95:
        raise ValueError(f"only {float(same.float().mean()):.0%} of the images left at the same depth")
    return float((found.logits - logits)[same.to(device)].abs().max() / logits.abs().max())


@lru_cache(maxsize=2)
def _prepared(
    name: str, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[FusedEnsemble, GraphedWalk, Tensor]:
    """A fused tree, its graphs, and images."""
    torch.manual_seed(0)
    x = torch.randn(batch, *{**NETWORKS, **TINY}[name].size, device=device, dtype=dtype)
    model = copy.deepcopy(built(name)).to(device).fuse().to(dtype)
    return model, GraphedWalk(model, x), x


class Segment:
    """The branches that a depth adds to the depth before it."""

    def __init__(self, model: Any, depth: int) -> None:
        tree, first, last = model.tree, (0, *model.sizes)[depth], model.sizes[depth]
        self.start = tree.first_new_level(first)  # the first of its levels with new branches
        self.parts: list[tuple[Any, list[int]]] = []
        for index in range(self.start, tree.levels):
            begin, end = tree.width(index, first), tree.width(index, last)
            above = tree.width(index - 1, first) if index > self.start else 0
            parents = [tree.parent(index, branch) - above for branch in range(begin, end)]
            self.parts.append((model.level(index).part(begin, end), parents))
        self.heads = [level.part(first, last) for level in (model.head, model.classifier)]

    def __call__(self, value: Any) -> tuple[Tensor, list[Any]]:
        """The sum of the new leaves' logits, and the output of the first branch of each level that was run."""
        activations, outputs = Activations([value]), []
        for part, parents in self.parts:
            activations = part(activations, parents)
            outputs.append(activations.listed()[0])
        for part in self.heads:
            activations = part(activations)
        return activations.stacked().float().sum(1), outputs


@dataclass
class _Graph:
    """A depth for one batch size: `replay` reads the inputs and writes the outputs."""

    replay: Callable[[], Any]
    value: Tensor
    total: Tensor
    outputs: list[Any]


class GraphedWalk:
    """Predictions of a fused binary tree whose images leave at different depths, with a CUDA graph per batch size.

    Args:
        model: the fused tree; a single tensor crosses each cut.
        images: a full batch, (N, C, H, W).
    """

    def __init__(self, model: Any, images: Tensor) -> None:
        self.sizes, self.batch = model.sizes, len(images)
        # Kept, because a graph does not own the weights that it reads.
        segments = self.segments = [Segment(model, depth) for depth in range(model.depths)]
        count = min(_BUCKETS, self.batch)
        self.buckets = sorted({-(-self.batch * (i + 1) // count) for i in range(count)})
        _, path = segments[0](images)
        inputs = [images, *(path[segment.start - 1] for segment in segments[1:])]
        self.places = [segment.start - 1 for segment in segments[1:]]  # of the inputs, in the outputs of the first
        classes = model.num_classes
        self.graphs = [
            {
                bucket: _graph(segment, size, value[:bucket], value.new_zeros(bucket, classes, dtype=torch.float32))
                for bucket in (self.buckets if size > 1 else [self.batch])
            }
            for segment, size, value in zip(segments, self.sizes, inputs, strict=True)
        ]

    def __call__(self, images: Tensor, thresholds: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Logits (N, classes), and the number of networks evaluated for each image (N,), on the CPU."""
        rows = torch.arange(len(images), device=images.device)
        leaves = torch.empty_like(rows)
        graph = self._graph_for(0, self.batch)
        graph.value.copy_(images)
        graph.replay()
        values, (total, certain) = [graph.outputs[2][place] for place in self.places], graph.outputs[:2]
        logits = torch.empty_like(total)
        for depth, size in enumerate(self.sizes):
            count = len(rows)
            logits[rows], leaves[rows] = total[:count] / size, size  # those that go on are overwritten
            if depth == len(self.sizes) - 1:
                break
            kept = (certain[:count] < thresholds[depth]).nonzero().flatten()  # waits for the device
            if not len(kept):
                break
            graph = self._graph_for(depth + 1, len(kept))
            rows = rows[kept]
            values = [value[kept] for value in values]
            graph.value[: len(kept)].copy_(values.pop(0))
            graph.total[: len(kept)].copy_(total[kept])
            graph.replay()
            total, certain = graph.outputs[:2]
        return logits, leaves.cpu()

    def thresholds(self, images: Tensor, share: float) -> list[float]:
        """Thresholds with which a share of the images that reach a depth leave there."""
        found: list[float] = []
        for depth in range(len(self.sizes) - 1):
            _, leaves = self(images, [*found, *[NOBODY] * (len(self.sizes) - 1 - depth)])
            reached = int((leaves == self.sizes[-1]).sum())
            certain = self._graph_for(depth, reached).outputs[1][:reached].sort(descending=True).values
            count = min(max(round(share * reached), 1), reached - 1)
            found.append(float(certain[count - 1 : count + 1].mean()) if reached > 1 else NOBODY)
        return found

    def _graph_for(self, depth: int, images: int) -> _Graph:
        return next(graph for bucket, graph in self.graphs[depth].items() if bucket >= images)


def _graph(segment: Segment, size: int, value: Tensor, total: Tensor) -> _Graph:
    value = value.clone(memory_format=torch.preserve_format)

    def run() -> tuple[Tensor, Tensor, list[Any]]:
        added, path = segment(value)
        summed = total + added
        return summed, (summed / size).softmax(-1).amax(-1), path

    outputs: list[Any] = []

    def call() -> Tensor:
        outputs[:] = run()
        return outputs[0]

    return _Graph(captured(call, value.device), value, total, outputs)
