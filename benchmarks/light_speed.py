"""Time of light trees and of the full tree, per depth and batch size; writes docs/results/light.md and its JSON file.

taskset -c 0 python benchmarks/light_speed.py    # one thread

All ways to run a cell alternate in one process, so that disturbances affect all of them. Run nothing else meanwhile.
"""

from __future__ import annotations

import json
import platform
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch

import hierens
from hierens.evaluation.profiling import call_ms, table

RESULTS = Path(__file__).parents[1] / "docs" / "results"
NETWORKS: dict[str, tuple[dict[str, Any], int]] = {  # arguments, and pixels
    "resnet14_cifar": ({"num_classes": 100}, 32),
    "resnet18": ({}, 64),
    "vit_tiny_patch16_224": ({"img_size": 64}, 64),
}
BATCH_SIZES, ROUNDS, SECONDS = (1, 8, 32), 3, 0.1
WAYS = ("full, fused", "light, fused, looped", "light, fused, grouped", "light, fused, auto", "light, looped")


def models(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A tree of each way to run one."""
    backbone = timm.create_model(name, **arguments).eval()
    full, light = (hierens.hierensify(backbone, 4, members=members, looped={}) for members in ("full", "rank1"))
    made: dict[str, Any] = {"full, fused": full.fuse(), "light, looped": light}
    light.set_executor("looped")
    for executor in ("looped", "grouped", "auto"):
        made[f"light, fused, {executor}"] = light.fuse()
        made[f"light, fused, {executor}"].set_executor(executor)
    return made


@torch.no_grad()
def measured(name: str) -> list[dict[str, Any]]:
    """Milliseconds of every way, the least of a few rounds, by depth and batch size."""
    arguments, pixels = NETWORKS[name]
    made, rows = models(name, arguments), []
    for batch in BATCH_SIZES:
        x = torch.randn(batch, 3, pixels, pixels)
        for depth in range(1, 4):
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(ROUNDS):
                for way in WAYS:
                    times[way].append(call_ms(partial(made[way], x, depth=depth), x.device, SECONDS))
            milliseconds = {way: round(min(found), 2) for way, found in times.items()}
            rows.append({"network": name, "pixels": pixels, "depth": depth, "batch": batch, "ms": milliseconds})
            print(name, depth, batch, milliseconds, flush=True)
    return rows


def page(environment: str, parameters: dict[str, dict[str, int]], rows: list[dict[str, Any]]) -> str:
    """The text of docs/results/light.md."""
    sizes = [
        (name, f"{own['one network'] / 1e6:.2f}", f"{own['full'] / 1e6:.2f}", f"{own['light'] / 1e6:.2f}")
        for name, own in parameters.items()
    ]
    times = [
        (
            row["network"],
            str(row["depth"]),
            str(row["batch"]),
            f"{row['ms'][WAYS[0]]:.2f}",
            *(f"{row['ms'][way] / row['ms'][WAYS[0]]:.2f}" for way in WAYS[1:]),
        )
        for row in rows
    ]
    return f"""# Light members: speed and size

This page is written by `benchmarks/light_speed.py`: trees of eight networks (`blocks=4`), `full` and `rank1` in all
levels. {environment}.

Parameters in millions:

{table(("network", "one network", "eight, full", "eight, light"), sizes)}

Milliseconds (the least of {ROUNDS} interleaved rounds) of the full tree, fused, with the executor `auto`; for the
others the ratio to it (below 1.00 is faster):

{table(("network", "depth", "batch", "full, fused (ms)", *WAYS[1:]), times)}
"""


def main() -> None:
    """Measure, and write the page."""
    torch.set_num_threads(1)
    environment = f"PyTorch {torch.__version__}, timm {timm.__version__}, {platform.machine()}, one thread"
    parameters, rows = {}, []
    for name, (arguments, _) in NETWORKS.items():
        with torch.device("meta"):
            backbone = timm.create_model(name, **arguments)
            trees = {m: hierens.hierensify(backbone, 4, members=m, looped={}) for m in ("full", "rank1")}
        own = {kind: trees[m].parameter_counts()[-1] for kind, m in (("full", "full"), ("light", "rank1"))}
        parameters[name] = own | {"one network": sum(p.numel() for p in backbone.parameters())}
        rows += measured(name)
        content = {"environment": environment, "parameters": parameters, "rows": rows}
        (RESULTS / "light_speed.json").write_text(json.dumps(content, indent=1) + "\n")
        (RESULTS / "light.md").write_text(page(environment, parameters, rows))


if __name__ == "__main__":
    main()
