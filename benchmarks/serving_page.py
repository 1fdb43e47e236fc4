"""The page and the figure of benchmarks/serving.py."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import timm
import torch

import hierens
from hierens.evaluation.profiling import table

Rows = list[dict[str, Any]]


def per_second(measured: Rows, settings: Any) -> list[dict[str, float]]:
    """Outcomes of the requests scheduled in each second."""
    seconds: dict[int, Rows] = {}
    for row in measured:
        seconds.setdefault(int(row["due"]), []).append(row)
    found = []
    for second, those in sorted(seconds.items()):
        answered = [row for row in those if row["status"] == 200]
        line = {"second": second, "rate": len(those), "refused": len(those) - len(answered)}
        if answered:
            ms = sorted(row["ms"] for row in answered)
            line |= {"p50": percentile(ms, 50), "p99": percentile(ms, 99)}
            line["depth"] = statistics.mean(row["depth"] for row in answered)
            line["accuracy"] = 100 * sum(row["right"] for row in answered) / len(answered) / settings.per_request
        found.append(line)
    return found


def percentile(values: list[float], percent: float) -> float:
    """The percentile of some values: the smallest value that `percent` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def draw(found: dict[str, Any], settings: Any, path: Path) -> None:
    """Plot both runs under the same load: rate, latency, depth, accuracy."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(7.2, 8.0), dpi=150, layout="constrained")
    panels = figure.subplots(4, 1, sharex=True)
    for name, label, colour in (("fixed", "fixed full depth", "C1"), ("load", "load policy", "C0")):
        lines = per_second(found[name], settings)
        at = [line["second"] + 0.5 for line in lines]
        if name == "load":
            panels[0].plot(at, [line["rate"] for line in lines], color="0.8", linewidth=5, label="due")
        panels[0].plot(at, [line["rate"] - line["refused"] for line in lines], color=colour, label=f"answered, {label}")
        shown = [line for line in lines if "p99" in line]
        at = [line["second"] + 0.5 for line in shown]
        panels[1].plot(at, [line["p99"] for line in shown], color=colour, label=f"p99, {label}")
        panels[1].plot(at, [line["p50"] for line in shown], color=colour, linestyle=":", label=f"p50, {label}")
        panels[2].plot(at, [line["depth"] for line in shown], color=colour)
        panels[3].plot(*coarse(found[name], settings), color=colour, marker="o", markersize=3)
    panels[1].axhline(settings.target_ms, color="0.5", linewidth=1)
    panels[0].set_ylabel("requests per second")
    panels[1].set(ylabel="latency (ms)", yscale="log")
    panels[2].set_ylabel("mean depth")
    panels[3].set(ylabel="accuracy (%), of 5 s", xlabel="second in which a request was due")
    for panel in panels:
        panel.axvspan(settings.calm_s, settings.calm_s + settings.surge_s, color="0.94", zorder=0)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8, loc="upper left")
    panels[1].legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    panels[1].set_ylim(top=1e5)
    figure.savefig(path)


def coarse(measured: Rows, settings: Any, seconds: int = 5) -> tuple[list[float], list[float]]:
    """Accuracy of the requests scheduled in each interval in which at least fifty images were answered."""
    bins: dict[int, Rows] = {}
    for row in measured:
        if row["status"] == 200:
            bins.setdefault(int(row["due"] // seconds), []).append(row)
    kept = {at: those for at, those in sorted(bins.items()) if len(those) * settings.per_request >= 50}
    accuracy = [100 * sum(r["right"] for r in those) / len(those) / settings.per_request for those in kept.values()]
    return [(at + 0.5) * seconds for at in kept], accuracy


def paired(measured: Rows, full: list[int], settings: Any) -> str:
    """Accuracy during the surge, compared with full depth on the same images."""
    end = settings.calm_s + settings.surge_s
    those = [row for row in measured if settings.calm_s <= row["due"] < end and row["status"] == 200]
    at = settings.per_request
    whole = [sum(full[row["index"] * at : (row["index"] + 1) * at]) for row in those]
    count = at * len(those)
    differences = [row["right"] - w for row, w in zip(those, whole, strict=True)]
    error = statistics.stdev(differences) * math.sqrt(len(differences)) / count
    return (
        f"{100 * sum(row['right'] for row in those) / count:.2f} % against {100 * sum(whole) / count:.2f} %, a "
        f"difference of {100 * sum(differences) / count:+.2f} ± {100 * error:.2f} points on {count} images"
    )


def summary(measured: Rows, settings: Any) -> list[tuple[str, ...]]:
    """A table row for each phase."""
    ends = (0.0, settings.calm_s, settings.calm_s + settings.surge_s, 2 * settings.calm_s + settings.surge_s)
    lines = []
    for name, start, end in zip(("calm", "surge", "calm again"), ends, ends[1:], strict=False):
        those = [row for row in measured if start <= row["due"] < end]
        answered = [row for row in those if row["status"] == 200]
        ms = [row["ms"] for row in answered]
        images = settings.per_request * len(answered)
        accuracy = sum(row["right"] for row in answered) / images
        lines.append(
            (
                name,
                f"{len(those) / (end - start):.1f}",
                f"{len(those)}",
                f"{sum(row['status'] == 503 for row in those)}",
                f"{sum(row['status'] not in (200, 503) for row in those)}",
                f"{percentile(ms, 50):.0f}",
                f"{percentile(ms, 99):.0f}",
                f"{100 * sum(value > settings.target_ms for value in ms) / len(ms):.1f}",
                f"{statistics.mean(row['depth'] for row in answered):.2f}",
                f"{100 * accuracy:.2f} ± {100 * math.sqrt(accuracy * (1 - accuracy) / images):.2f}",
            )
        )
    return lines


PHASE = ("phase", "per s", "sent", "503", "lost", "p50 (ms)", "p99 (ms)", "late (%)", "mean depth", "accuracy (%)")


def page(settings: Any, found: dict[str, Any]) -> str:
    """The results page."""
    measured, killed, attacked = found["surge"], found["kill"], found["attack"]
    calibration = measured["calibration"]
    depth_lines = [
        (f"{depth}", f"{2**depth}", f"{macs / 1e6:.0f} M", f"{ms:.1f}", f"{accuracy:.2f}")
        for depth, (macs, ms, accuracy) in enumerate(
            zip(calibration["macs"], calibration["ms"], calibration["accuracy"], strict=True)
        )
    ]
    kinds = [
        (name, ", ".join(f"{'closed' if status == '0' else status}: {n}" for status, n in sorted(counts.items())))
        for name, counts in attacked["statuses"].items()
    ]
    memory = [
        (name, *(f"{attacked[when].get(name, 0):.0f}" for when in ("before", "peak", "after")))
        for name in ("gateway", "replica")
    ]
    tries = killed["second_tries"]
    statuses = ", ".join(f"{count} times {status}" for status, count in sorted(killed["statuses"].items()))
    flags = " ".join(
        f"--{field.name.replace('_', '-')} {getattr(settings, field.name)}"
        for field in dataclasses.fields(settings)
        if field.name not in ("data_dir", "model", "output", "only") and getattr(settings, field.name) != field.default
    )
    return TEXT.format(
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        versions=f"hierens {hierens.__version__}, torch {torch.__version__}, "
        f"timm {timm.__version__}, Python {platform.python_version()}",
        settings=settings,
        capacity=measured["capacity"],
        images_per_s=measured["capacity"] * settings.per_request,
        paired=paired(measured["load"], measured["calibration"]["full_right"], settings),
        depths=table(("depth", "networks", "MACs", "ms per request, model alone", "accuracy (%)"), depth_lines),
        load=table(PHASE, summary(measured["load"], settings)),
        fixed=table(PHASE, summary(measured["fixed"], settings)),
        killed=killed,
        statuses=statuses,
        errors=" ".join(f"*{error}*" for error in killed["errors"]) or "none",
        second_tries=int(tries)
        if (tries := killed.get("second_tries", math.nan)) == tries
        else "not counted in this run",
        lost=sum(killed["lost"].values()),
        noticed="not seen" if killed["noticed_s"] is None else f"{killed['noticed_s']:.1f} s",
        again="not within the run" if killed["again_s"] is None else f"{killed['again_s']:.1f} s",
        attacked=attacked,
        count=sum(sum(counts.values()) for counts in attacked["statuses"].values()),
        unexpected=len(attacked["unexpected"]),
        kinds=table(("upload", "responses"), kinds),
        memory=table(("process", "before (MB)", "peak (MB)", "after (MB)"), memory),
        served=", ".join(f"{count} times {status}" for status, count in attacked["served"].items()),
        flags=f" {flags}" if flags else "",
    )


TEXT = """# Serving

This page tests [the server](../how-to/serve.md) under a load surge, when a replica is killed, and with malicious
uploads. Measured on {machine}, which also ran the load generator and other programs. {versions}.

## A surge of three times the capacity at full depth

![Rate, latency, depth and accuracy over time](serving.png)

The load policy (`--policy load --target-ms {settings.target_ms:g}`):

{load}

Fixed full depth (`--policy fixed`), the same arrivals:

{fixed}

*sent*: requests, at Poisson arrival times that do not depend on the responses; a latency is measured from the scheduled
time of its request. *503*: refused at once, with Retry-After. *lost*: no response within 10 s, another status or no
connection. *late*: answered later than the target. *accuracy*: of the answered images, from Fashion-MNIST's test set,
with its standard error.
The capacity at full depth is {capacity:.1f} requests ({images_per_s:.0f} images) per second in a closed loop of four
clients.

Accuracy during the surge, compared with full depth on the same images:
{paired}.
This model was trained for a few minutes; its accuracy does not increase significantly with depth.

Cost and accuracy of each depth on all 10,000 test images:

{depths}

### Choices and reasons

- The Fashion-MNIST networks of the other pages take less than a millisecond, so a server with one of them would mostly
  measure HTTP, decoding and the client. The model here is a tree of 16 `resnet8_cifar` with 64, 128 and 256 channels
  (`benchmarks/serving_model.py`), and a request holds {settings.per_request} PNG images, so most of the time is
  spent in the model.
- There is one replica with one thread, because the other core runs the gateway and the load generator.
- Requests are processed one at a time (`--max-batch 1`), because the images of a request already form a batch, and a
  larger batch would only take longer. Batching over requests is therefore not measured here. The policy reduces the
  depth when 2 requests are waiting (`--queue-high 2`).
- The load generator is a separate process (`benchmarks/serving_load.py`) and encodes its PNGs before it starts.

## A replica is killed

Two replicas receive {killed[rate]:.1f} requests per second; one is killed (SIGKILL) after a quarter of
{settings.kill_s:g} s.

- {killed[sent]} requests: {statuses}. Error messages: {errors}. Without a response: {lost}.
- Wrong predictions: {killed[wrong]} of {killed[compared]}, compared with the model's own probabilities at the same
  depth (within 0.0001).
- The gateway reports the replica as dead after {noticed}; a new one runs after {again}. The slowest response took
  {killed[slowest_ms]:.0f} ms. Requests of the dead replica that were sent to the other one: {second_tries}.

## Hostile uploads

{count} uploads, one after another, in {attacked[seconds]:.0f} s; {unexpected} received an undocumented response.
Processes that died: {attacked[died]}. Valid requests afterwards: {served}.

{kinds}

*closed*: the connection was closed without a status, in all these cases by the client. Resident memory:

{memory}

## How to repeat it

```bash
python benchmarks/serving_model.py --data-dir DIR
python benchmarks/serving.py --data-dir DIR{flags}
```
"""
