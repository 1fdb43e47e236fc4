"""Worker of benchmarks/commits.py: times calls of the checkout on PYTHONPATH.

It also runs with older checkouts, so it imports only what those contain.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
import warnings
from typing import Any

import timm
import torch
from process_memory import forget_peak, memory_mb

import hierens

try:
    from hierens.objectives import Objective
except ModuleNotFoundError:  # its place in some older checkouts
    from hierens.losses import Objective

SMALL = "resnet8_cifar"  # the network of docs/results/cifar100.md; the overhead of calls dominates its training step
SMALL_ARGUMENTS = {"channels": [24, 48, 96], "stem_stride": 2, "num_classes": 100}


def serve() -> None:
    """Time the cell named on each line of the input, and print the result."""
    warnings.filterwarnings("ignore")
    made: dict[str, Any] = {}

    def tree(name: str) -> Any:
        if name not in made:
            made.clear()
            torch.manual_seed(0)
            backbone = timm.create_model(name, **(SMALL_ARGUMENTS if name == SMALL else {"num_classes": 1000}))
            is_tree = isinstance(backbone, hierens.HierarchicalEnsemble)
            made[name] = backbone if is_tree else hierens.hierensify(backbone, blocks=4, init="reinit", seed=0)
            del backbone
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what conversion freed is not memory of the calls that follow
        return made[name]

    def call(name: str, way: str, batch: int, depth: int) -> Any:
        key = f"{name} {way} {batch} {depth}"
        if key in made:
            return made[key]
        model, size = tree(name), 32 if name == SMALL else 224
        images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        if way == "training":
            labels = torch.randint(0, 100, (batch,), generator=torch.Generator().manual_seed(0))
            optimizer = torch.optim.SGD(model.train().parameters(), 1e-3)
            objective = Objective("independent+hierarchical_codistillation")

            def run() -> None:
                objective(model(images, reduce=False), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
        else:
            model.eval()
            if way == "fused":
                if "fused" not in made:
                    made["fused"] = model.fuse()
                model = made["fused"]

            def run() -> None:
                with torch.no_grad():
                    model(images, depth=depth)

        run()
        made[key] = run
        return run

    def losses(name: str, steps: int) -> list[float]:
        """Of the first training steps, from seeded weights and images; float64, since rounding grows with steps."""
        made.clear()
        model, size = tree(name).double().train(), 32 if name == SMALL else 64
        draw = torch.Generator().manual_seed(0)
        images = torch.randn(steps, 8, 3, size, size, generator=draw, dtype=torch.float64)
        labels = torch.randint(0, 100, (steps, 8), generator=draw)
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        objective, found = Objective("independent+hierarchical_codistillation"), []
        for of_step, targets in zip(images, labels, strict=True):
            loss = objective(model(of_step, reduce=False), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    for line in sys.stdin:
        asked = json.loads(line)
        if "steps" in asked:
            print(json.dumps({"losses": losses(asked["network"], asked["steps"])}), flush=True)
            continue
        run = call(*asked["cell"])
        start = time.perf_counter()
        for _ in range(asked["times"]):
            run()
        taken = (time.perf_counter() - start) / asked["times"]
        print(json.dumps({"s": taken, "peak_mb": memory_mb("VmHWM")}), flush=True)
        forget_peak()


if __name__ == "__main__":
    serve()
