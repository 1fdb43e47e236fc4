"""The page and the figure of benchmarks/drift.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drift_stream import BURST, BURST_S, EVERY_S, PHASES

from hierens.evaluation.profiling import table

NAMES = {
    "cheap": "thresholds, the cheapest that hold the bound",
    "cautious": "thresholds, cautious",
    "controller": "controller",
}
COLOURS = {"cheap": "C1", "cautious": "C3", "controller": "C0"}


def page(record: dict[str, Any], folder: Path) -> str:
    """The results page; draws its figure into the folder."""
    possible, impossible = record["loads"]
    draw(record, possible, folder / "drift.png")
    about = record["machine"]
    return TEXT.format(
        summary=summary(record, possible),
        possible=section(record, possible),
        impossible=section(record, impossible),
        target=record["target_ms"],
        bound=100 * record["agreement"],
        seconds=record["seconds"],
        batch=record["batch"],
        ratios=f"{possible:g} and {impossible:g}",
        costs=table(("load", "policy", "rate", "mean MACs", "shadow", "lost", "answered twice"), costs(record)),
        cores=about["cores"],
        processor=about["processor"],
        torch=about["torch"],
        burst=BURST,
        burst_s=BURST_S,
        every_s=EVERY_S,
    )


def section(record: dict[str, Any], load: float) -> str:
    """The table of a load: a row per policy and phase."""
    rows = []
    for name, title in NAMES.items():
        run = record["runs"].get(f"{load:g}/{name}")
        for phase, found in zip(PHASES, run["phases"] if run else (), strict=False):
            delay = "never" if found["delay"] is None else f"{found['delay']:.1f} s"
            numbers = (f"{100 * found['agreement']:.2f}", f"{found['p50']:.0f}", f"{found['p99']:.0f}")
            rows.append((title, phase, *numbers, f"{100 * found['late']:.1f}", f"{found['macs']:.2f}", delay))
    header = ("policy", "images", "agreement (%)", "p50 (ms)", "p99 (ms)", "late (%)", "MACs", "hold after")
    return table(header, rows)


def summary(record: dict[str, Any], load: float) -> str:
    """For which images each policy holds both bounds in the end, and after which delay."""
    lines = []
    for name, title in NAMES.items():
        run = record["runs"].get(f"{load:g}/{name}")
        held = [(phase, of["delay"]) for phase, of in zip(PHASES, run["phases"] if run else (), strict=False)]
        shown = ", ".join(f"{phase} (after {delay:.1f} s)" for phase, delay in held if delay is not None)
        lines.append(f"- {title}: {shown or 'none'}")
    return "\n".join(lines)


def costs(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """What each run cost and lost."""
    rows = []
    for key, run in record["runs"].items():
        load, name = key.split("/")
        images = sum(phase["images"] for phase in run["phases"])
        macs = sum(phase["images"] * phase["macs"] for phase in run["phases"]) / images
        rate = f"{run['rate']:.0f} of {record['capacity']:.0f} per s"
        shadow = f"{100 * run['shadow']:.1f}% of the time" if name == "controller" else ""
        rows.append((load, NAMES[name], rate, f"{macs:.2f}", shadow, f"{run['lost']}", f"{run['twice']}"))
    return rows


def draw(record: dict[str, Any], load: float, path: Path) -> None:
    """Plot agreement, latency and cost over time, with the bounds."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(7.6, 7.4), dpi=130, layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    for name, title in NAMES.items():
        run = record["runs"].get(f"{load:g}/{name}")
        if run:
            step = record["seconds"] * len(PHASES) / len(run["lines"])
            at = [(index + 0.5) * step for index in range(len(run["lines"]))]
            style = {"color": COLOURS[name], "linewidth": 2 if name == "controller" else 1.2}
            panels[0].plot(at, [100 * line["agreement"] for line in run["lines"]], label=title, **style)
            panels[1].plot(at, [line["p99"] for line in run["lines"]], **style)
            panels[2].plot(at, [line["macs"] for line in run["lines"]], **style)
    for panel in panels:
        for index, phase in enumerate(PHASES):
            start = index * record["seconds"]
            panel.axvspan(start, start + record["seconds"], color="0.95" if index % 2 else "1.0", zorder=0)
            if panel is panels[0]:
                middle = start + record["seconds"] / 2
                panel.text(middle, 1.01, phase, ha="center", transform=panel.get_xaxis_transform(), fontsize=9)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].axhline(100 * record["agreement"], color="0.4", linewidth=1, linestyle="--")
    panels[1].axhline(record["target_ms"], color="0.4", linewidth=1, linestyle="--")
    panels[0].set_ylabel("agreement (%)")
    panels[1].set(ylabel="99th percentile of latencies (ms)", yscale="log")
    panels[2].set(ylabel="MACs, share of all networks'", xlabel="seconds")
    figure.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path)


TEXT = """# Drift under load

Images of Fashion-MNIST's test set are answered one batch after the other while they turn noisy, blurred and dark, each
for {seconds:g} s, under a bursty load. [The controller](../how-to/serve.md#hold-a-latency-and-the-agreement)
(`LatencyObjective`) has two bounds: 99 % of all latencies within {target:g} ms, and {bound:g} % of the predicted
classes equal to those of all eight networks (*agreement*). It is compared with thresholds that were fitted once, by
`budgeted_batch` on clean held-out images, with batches of up to {batch} images: the cheapest that exceed the bound by
half a point on these images, and cautious ones, which agree for 99.95 % of them.

![Agreement, latency and cost over time](drift.png)

Both bounds are dashed; each point is an interval of two seconds.

## A load below the capacity

Images for which both bounds hold from a delay on until the next change:

{summary}

{possible}

*late*: share of images answered after the target. *MACs*: mean, in shares of those of all networks. *hold
after*: the delay after the change from which on every interval of {every_s:g} s (with one burst) until the next change
meets both bounds; *never* if the last such interval does not.

## A load above the capacity

After the change, as many networks as the agreement requires take longer than images arrive. The controller then keeps
the 99th percentile near the target, with the highest agreement that leaves time for it.

{impossible}

## Costs

{costs}

*rate*: mean rate of arrivals, and the rate that all networks can answer in the best batch size. *shadow*: images that
the controller evaluates with all networks after their answer, with the re-fits. *lost*: requests without an answer.

## What was measured

- **Arrivals** are a Poisson process, whose rate between bursts is {ratios} times what all networks can answer. In the
  last {burst_s:g} s of every {every_s:g} s it is {burst:g} times as high. Latencies are measured from the scheduled
  arrival.
- **Corruptions** are made: Gaussian noise with a standard deviation of 0.1 (of pixels from 0 to 1), a Gaussian blur
  with a standard deviation of 1.5 pixels, and brightness times 0.15, each rounded to 8 bits.
- **Images**: 2,500 of the test set, drawn at random for each request; thresholds and the controller's first points are
  fitted on 2,500 others.
- **Model**: `models/fashion-mnist-tree`, fused, one thread. Arrivals, queue and model share one process and one core.

```bash
python benchmarks/drift.py --data-dir DIR
```

Pinned with `taskset -c 0` to one of {cores} cores of {processor}, torch {torch}.
"""
