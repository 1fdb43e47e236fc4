"""Measures time and memory of `hierensify`; writes docs/results/conversion.md.

python benchmarks/conversion.py

Each backbone is converted in its own process. Time is given in seconds and in forward passes of the backbone (one
image, same process), memory in addition to the weights of the tree.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from comparison.records import machine, write_json
from process_memory import forget_peak, memory_mb

from hierens.evaluation.profiling import table

ROOT = Path(__file__).parents[1]
RECORD, PAGE = (ROOT / "docs" / "results" / name for name in ("runs/conversion.json", "conversion.md"))
BACKBONES = ("resnet50", "efficientnet_b4", "vit_base_patch16_224", "convnext_base")


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    backbones: tuple[str, ...] = BACKBONES
    """names of timm models; each is cut into four blocks"""


def convert(name: str) -> dict[str, Any]:
    """Convert one backbone in this process."""
    import timm
    import torch

    import hierens

    backbone = timm.create_model(name).eval()
    image = torch.randn(1, *backbone.pretrained_cfg["input_size"])

    def one_pass() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            backbone(image)
        return time.perf_counter() - start

    one_pass()
    before = statistics.median(one_pass() for _ in range(5))
    forget_peak()
    resident = memory_mb("VmRSS")
    start = time.perf_counter()
    tree = hierens.hierensify(backbone, blocks=4)
    seconds, peak = time.perf_counter() - start, memory_mb("VmHWM")
    after = statistics.median(one_pass() for _ in range(5))
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tree.state_dict().values()) / 1e6
    return {
        "backbone": name,
        "seconds": seconds,
        "pass_s": (before + after) / 2,  # the speed of the machine may change meanwhile
        "weights_mb": weights,
        "above_weights_mb": peak - resident - weights,
        "grouped": sum(level.grouped for level in tree.levels if level.branches > 1),
    }


def main(settings: Settings) -> None:
    """Convert each backbone and write the page."""
    rows = []
    for name in settings.backbones:
        done = subprocess.run([sys.executable, __file__, "one", name], stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    write_json(RECORD, {"machine": machine(), "rows": rows})
    PAGE.write_text(page(json.loads(RECORD.read_text())))
    print(f"wrote {PAGE}")


def page(record: dict[str, Any]) -> str:
    """The results page."""
    cells = [
        (
            row["backbone"],
            f"{row['seconds']:.1f}",
            f"{row['pass_s']:.3f}",
            f"{max(row['seconds'] - 3, 0) / row['pass_s']:.1f}",
            f"{row['weights_mb']:.0f}",
            f"{row['above_weights_mb']:.0f}",
            f"{row['grouped']}",
        )
        for row in record["rows"]
    ]
    header = (
        *("backbone", "conversion (s)", "one pass (s)", "passes beyond 3 s"),
        *("weights of the tree (MB)", "peak above them (MB)", "grouped levels"),
    )
    about = record["machine"]
    return f"""# The cost of conversion

`hierensify(backbone, blocks=4)` cuts the backbone, copies its blocks into a tree of eight networks, and compares every
grouped block with a loop. *Passes beyond 3 s*: the time of the conversion minus three seconds, in forward passes of the
backbone on one image in the same process. *Peak above them*: the largest resident memory during the conversion, minus
the memory that the process used before and minus the weights of the tree.

{table(header, cells)}

Measured on {about["cores"]} cores of {about["processor"]} ({about["instructions"]}), torch {about["torch"]}:
`python benchmarks/conversion.py`.
"""


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(convert(sys.argv[2])))
    else:
        main(tyro.cli(Settings, description=__doc__))
