"""Capturing a call as a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_steps.speed_table import Call


def captured(call: Call, device: torch.device) -> Call:
    """A call as a CUDA graph, whose outputs stay in place; on a CPU the call itself."""
    if device.type != "cuda":
        call()
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # objects of the first call must be created outside the graph
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = call()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay
