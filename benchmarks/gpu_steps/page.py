"""The step `report`: writes docs/results/gpu.md from the results of the other steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_steps.per_image import EAGER, FULL, FULL_GRAPH, GRAPHS
from gpu_steps.records import read, write_whole
from gpu_steps.training import PLAN, TRAININGS
from hierens.evaluation.profiling import table

SHOWN = ("backbone", "looped", "grouped", "auto", "fused", "fused, tuned")
BASES = {
    "fused": "backbone, fused",
    "fused, tuned": "backbone, fused",
    "grouped, channels last": "backbone, channels last",
}

INTRODUCTION = """# On a GPU

This page is written by `benchmarks/gpu.py`, in steps of at most eight minutes each. The steps can be run one at a time
on any machine with a GPU. To continue a step that ran out of time, run it again.

```bash
python benchmarks/gpu.py speed
python benchmarks/gpu.py switching
python benchmarks/gpu.py per-image
python benchmarks/gpu.py light
python benchmarks/gpu.py train-distilled-1 --data-dir DIR   # then -2, -3; DIR has train/CLASS/ and test/CLASS/
python benchmarks/gpu.py train-labels-1 --data-dir DIR
python benchmarks/gpu.py train-msdnet-1 --data-dir DIR
python benchmarks/gpu.py report                             # writes this page
```

If the images must be transferred in small files, `pack` writes files of at most 30 MB (CIFAR-100: three for training,
one for testing, 103 MB in total). `join` decodes the files that exist and lists the missing ones. Without `--data-dir`,
training reads the images decoded by `join`. Training is resumed from checkpoints in `runs/gpu/`: copy that folder if
the next step runs on another machine.
"""
SPEED = """## Speed

A cell contains up to three numbers:

- microseconds per image;
- *time per MAC*, relative to the backbone run in the same way in the same cell (fused for fused). Below 1.00, the
  ensemble needs less time per MAC than the backbone;
- the *share of the roofline*: the minimum time for this device divided by the measured time.

The minimum time is the larger of two times: the operations divided by the measured peak rate of a large matrix product
in that precision, and the bytes divided by the measured rate of a large copy. The bytes are a lower bound for kernels
that work layer by layer: weights are read once per call, each input and output of a convolution or matrix product is
read or written once, and all operations between them are free. The share may exceed 100 % if activations stay in the
cache.

*auto* is the default executor, *tuned* is after `tune()`. `bf16`: weights and images are bfloat16; `fp32`: float32
without TF32; `tf32`: float32 with TF32 in matrix products and convolutions. Weights are random.
"""
SWITCHING = """## Switching depth

In bfloat16; fused, unless the row is marked *tree*. The device is synchronised after each call. *overhead*: the time of
a call if calls alternate between the first and the last depth, minus the mean time of calls at a constant depth.
*first call*: the time of the first call at the first and at the last depth, including compilation or capture.
"""
PER_IMAGE = """## Depth per image

Fused trees in bfloat16. At each depth, a share of the images that reach it leaves, and the others go on. *eager*: the
policy `Confidence`, which runs one branch after another. *CUDA graphs*: a graph for each depth and for each of eight
batch sizes; the images that go on are copied to the buffers of the smallest graph that holds them. *saved time*: with
CUDA graphs, relative to full depth as one CUDA graph. Weights and images are random; thresholds are chosen so that the
shares are met. The graphs are part of the benchmark (`benchmarks/gpu_steps/per_image.py`), not of the library.
"""
LIGHT = """## Light members

Trees of eight networks in bfloat16, with [light members](../how-to/light.md) (`rank1`) in all levels, compared with the
full tree. A cell is the time in milliseconds and its ratio to that of the full tree, fused, with the executor `auto`.
Grouped execution is the fastest for light members on this device, so `auto` groups fused light levels on GPUs.
"""
TRAINING = """## Training

On CIFAR-100 by the papers' recipes, but with as many epochs as fit into the time; the learning rate schedule covers the
whole training. The images are stored in the GPU's memory.

- *distilled* and *labels*: `hne_resnet50_cifar_small`, 16 networks, by the HNE paper's recipe (preset `paper-cifar`:
  SGD, a cosine, weight decay 5e-4, crops and flips; 200 epochs in the paper), with the objectives L_I + L_HD and L_I.
  Batches of 256 instead of 128, a learning rate of 0.2 instead of 0.1, and a warm-up of one epoch: an update takes
  about the same time with both batch sizes.
- *msdnet*: `msdnet_cifar_7` by the recipe of IMTA's authors for their first stage (preset `imta-stage1`: SGD with
  momentum, divided by 10 after 1/2 and 3/4 of the epochs, weight decay 1e-4, gradient equilibrium; 300 epochs), with
  batches of 256 instead of 64 and a learning rate of 0.2 instead of 0.1.
"""
MISSING = "Not measured yet: `python benchmarks/gpu.py {step}`.\n"


def write(results: Path, page: Path) -> Path:
    """Write the page to a file."""
    parts = [INTRODUCTION, SPEED, speed(read(results, "speed")), SWITCHING, switching(read(results, "switching"))]
    parts += [PER_IMAGE, per_image(read(results, "per-image")), LIGHT, light(read(results, "light")), TRAINING]
    for own in dict.fromkeys(one.plan for one in TRAININGS.values()):
        parts += [plan(read(results, own), own)]
        parts += [training(results, name) for name, one in TRAININGS.items() if one.plan == own]
    return write_whole(page, "\n".join(parts))


def speed(record: dict[str, Any] | None) -> str:
    """Peaks, a summary and a table for each network and precision."""
    rows = [row for row in (record or {}).get("rows", []) if "ms" in row]
    if record is None or not rows:
        return MISSING.format(step="speed")
    peaks = "; ".join(
        f"{name}: {found['operations_per_s'] / 1e12:.0f} TFLOP/s, {found['bytes_per_s'] / 1e9:.0f} GB/s"
        for name, found in record["peaks"].items()
    )
    parts = [f"{measured_on(record)} Measured peaks: {peaks}.\n", summary(rows)]
    groups = dict.fromkeys((row["network"], row["precision"]) for row in rows)
    for network, precision in groups:
        some = [row for row in rows if (row["network"], row["precision"]) == (network, precision)]
        parts.append(f"### {network}, {precision}\n\n{_speed_table(some)}\n")
    return "\n".join([*parts, _failures(record)])


def _speed_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        cells = []
        for way in SHOWN:
            ratio, share = per_mac(row, rows, way), row["least_ms"] / row["ms"][way][1]
            ratios = "" if way == "backbone" or ratio is None else f"{ratio:.2f}, "
            cells.append(
                f"{row['ms'][way][1] / row['batch'] * 1e3:.1f}"
                + (f" ({ratios}{share:.0%})" if way != "backbone" else "")
            )
        lines.append((f"{row['batch']}", f"{row['leaves']}", f"{row['macs'] / 1e6:.0f} M", *cells))
    return table(("batch", "networks", "MACs", *SHOWN), lines)


def per_mac(row: dict[str, Any], rows: Sequence[dict[str, Any]], way: str) -> float | None:
    """Time per MAC relative to the backbone run in the same way; None if the row of depth 0 is missing."""
    same = ("network", "precision", "batch")
    first = next((r for r in rows if r["depth"] == 0 and all(r[key] == row[key] for key in same)), None)
    if first is None:
        return None
    return float(row["ms"][way][1] / row["ms"][BASES.get(way, "backbone")][1] / (row["macs"] / first["macs"]))


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """A table row per precision and way."""
    lines = []
    for precision in dict.fromkeys(row["precision"] for row in rows):
        some = [row for row in rows if row["precision"] == precision]
        for way in (*SHOWN[1:], "grouped, channels last"):
            ratios = [ratio for row in some if row["depth"] and (ratio := per_mac(row, rows, way)) is not None]
            fastest = sum(min(SHOWN[1:], key=lambda name, row=row: row["ms"][name][1]) == way for row in some)
            off = max((row["difference"].get(way, 0.0) for row in some), default=0.0)
            mean = f"{statistics.geometric_mean(ratios):.2f}" if ratios else ""
            most = f"{max(ratios):.2f}" if ratios else ""
            lines.append((precision, way, mean, most, f"{fastest} of {len(some)}", f"{off:.1e}"))
    header = ("precision", "way", "time per MAC, geometric mean", "largest", "fastest", "difference to looped")
    return f"All depths except the first:\n\n{table(header, lines)}\n"


def switching(record: dict[str, Any] | None) -> str:
    """A table row per network, way and batch size."""
    rows = [row for row in (record or {}).get("rows", []) if "same_ms" in row]
    if record is None or not rows:
        return MISSING.format(step="switching")
    lines = [
        (
            row["network"] + ("" if row["form"] == "fused" else ", tree"),
            row["way"],
            f"{row['batch']}",
            *(f"{same[1]:.3f}" for same in row["same_ms"]),
            f"{row['alternating_ms'][1]:.3f}",
            f"{row['overhead_ms'] * 1e3:+.0f} us",
            " / ".join(f"{ms:.0f}" for ms in row["first_call_ms"]),
        )
        for row in rows
    ]
    header = (
        "network",
        "way",
        "batch",
        "first depth (ms)",
        "last (ms)",
        "alternating (ms)",
        "overhead",
        "first call (ms)",
    )
    return f"{measured_on(record)}\n\n{table(header, lines)}\n\n{_failures(record)}"


def per_image(record: dict[str, Any] | None) -> str:
    """A table row per network and share of leaving images."""
    rows = [row for row in (record or {}).get("rows", []) if "ms" in row]
    if record is None or not rows:
        return MISSING.format(step="per-image")
    lines = []
    for row in rows:
        ms = {way: times[1] for way, times in row["ms"].items()}
        lines.append(
            (
                row["network"],
                f"{row['batch']}",
                f"{row['leaving']:.0%}",
                f"{1 - row['macs']:.0%}",
                *(f"{ms[way]:.2f}" for way in (FULL, FULL_GRAPH, EAGER, GRAPHS)),
                f"{1 - ms[GRAPHS] / ms[FULL_GRAPH]:.0%}",
            )
        )
    header = (
        *("network", "batch", "leave per depth", "saved MACs", "full depth, eager (ms)", "full depth, CUDA graph (ms)"),
        *("per image, eager (ms)", "per image, CUDA graphs (ms)", "saved time"),
    )
    worst = max(row["difference"] for row in rows)
    return (
        f"{measured_on(record)} In float32, logits with CUDA graphs differ from those of `Confidence` by at most "
        f"{worst:.0e} of the largest logit.\n\n{table(header, lines)}\n\n{_failures(record)}"
    )


def light(record: dict[str, Any] | None) -> str:
    """A table row per network, batch size and depth."""
    rows = [row for row in (record or {}).get("rows", []) if "ms" in row]
    if record is None or not rows:
        return MISSING.format(step="light")
    shown = ("light, fused, grouped", "light, fused, looped", "light, looped")
    lines = []
    for row in rows:
        ms = {way: times[1] for way, times in row["ms"].items()}
        full = ms["full, fused"]
        cells = (f"{ms[way]:.2f} ({ms[way] / full:.2f})" for way in shown)
        lines.append((row["network"], f"{row['batch']}", f"{2 ** row['depth']}", f"{full:.2f}", *cells))
    header = ("network", "batch", "networks", "full, fused", *shown)
    return f"{measured_on(record)}\n\n{table(header, lines)}\n\n{_failures(record)}"


def plan(record: dict[str, Any] | None, name: str = PLAN) -> str:
    """The number of epochs, and the way to run a training step."""
    if record is None or "plan" not in record:
        return MISSING.format(step="plan") if name == PLAN else ""
    chosen = record["plan"]
    lines = [
        (
            ", ".join(filter(None, (way["executor"], "channels last" if way["channels_last"] else "contiguous"))),
            f"{way['images_per_s']:.0f}" if "images_per_s" in way else way["failed"],
        )
        for way in record["ways"]
    ]
    return (
        f"{measured_on(record)} {chosen['epochs']} epochs, {chosen['precision']}, {chosen['steps']} steps of "
        f"{chosen['minutes_per_step']:.0f} minutes.\n\n{table(('training step', 'images/s'), lines)}\n"
    )


def training(results: Path, name: str) -> str:
    """Accuracies of the last step of a training."""
    steps = sorted(results.glob(f"train-{name}-*.json"), key=lambda file: int(file.stem.split("-")[-1]))
    record = read(results, steps[-1].stem) if steps else None
    title = f"### {name}\n\n"
    if record is None or "done" not in record:
        return title + MISSING.format(step=f"train-{name}-1")
    minutes = sum(read(results, step.stem)["wall_s"] for step in steps) / 60  # type: ignore[index]
    said = f"{measured_on(record)} {record['done']} of {record['epochs']} epochs in {minutes:.0f} minutes"
    if rate := record.get("images_per_s"):
        said += f", {rate:.0f} images/s, waiting for data {record['data_wait']:.0%} of the time"
    said += f". {record['note']}" if "note" in record else ""  # written by hand: what else used the device
    if record["done"] < record["epochs"]:
        said += ". The training is not finished and its learning rate still high: the accuracies are not the recipe's"
    if not record["history"]:
        return f"{title}{said}.\n"
    last = record["history"][-1]
    header = ("exits" if TRAININGS[name].of_exits else "networks", "MACs", "parameters", "accuracy (%)")
    costs = zip(*(record.get(key, []) for key in ("leaves", "macs", "parameters")), last["accuracy"], strict=False)
    lines = [(f"{n}", f"{m / 1e6:.1f} M", f"{p / 1e6:.2f} M", f"{a:.2f}") for n, m, p, a in costs]
    return f"{title}{said}. After epoch {last['epoch']}:\n\n{table(header, lines)}\n"


def measured_on(record: dict[str, Any]) -> str:
    """Device, versions and number of missing cells."""
    about = record["machine"]
    tiny = "**Tiny settings: these times are meaningless.** " if record["tiny"] else ""
    clocks = about.get("clocks") or {}
    clock = f", {clocks['clocks.max.sm']} at most" if clocks.get("clocks.max.sm") else ""
    left = f" Not yet measured: {record['left']} cells." if record.get("left") else ""
    return f"{tiny}{about['device']}{clock}, torch {about['torch']}, hierens {about['hierens']}.{left}"


def _failures(record: dict[str, Any]) -> str:
    failed = [f"- {row['cell']}: {row['failed']}" for row in record["rows"] if "failed" in row]
    return "Without a figure:\n\n" + "\n".join(failed) + "\n" if failed else ""
