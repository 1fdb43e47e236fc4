"""Measures policies and calibration: accuracy against mean cost, deadlines on a busy machine, uncertainty.

python benchmarks/paper.py --data fashion_mnist --data-dir DIR --only tree-labels tree-distilled    trains the models
python benchmarks/adaptive.py --data-dir DIR                   writes docs/results/adaptive.md and its figures
python benchmarks/adaptive.py --data-dir DIR --only deadline   measures one part again; the others are read from files

Each half of the test set serves as calibration set for the other half. Every test image is therefore evaluated once,
with thresholds that were chosen on other images.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
import tyro
from comparison.recipes import configured
from comparison.records import test_images
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader

import hierens
from hierens.evaluation.metrics import as_record, evaluate_model, ood_auroc
from hierens.evaluation.profiling import millions, table
from hierens.evaluation.uncertainty import MEASURES, Measure, mutual_information
from hierens.inference.calibration import (
    CalibrationSet,
    calibrate,
    collect,
    exits,
    fit_temperatures,
    mean_cost,
)
from hierens.inference.conformal import fit_prediction_sets
from hierens.inference.policies import Deadline, FixedDepth, Prediction

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
KEPT = ROOT / "runs" / "adaptive"
PARTS = ("curve", "uncertainty", "deadline")
SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.9)  # budgets, from the cost of depth 0 to full cost
DATA = "fashion_mnist"
OBJECTIVES = {"L_I": "tree-labels", "L_I + L_HD": "tree-distilled"}  # rows of benchmarks/comparison/recipes.py
MISS_RATE = 0.05


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    data_dir: str = ""
    """folder of the data"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of the trained models"""
    only: tuple[str, ...] = PARTS
    """parts to measure again"""
    requests: int = 1000
    """number of requests with a deadline"""
    images: int = 256
    """images per request"""
    threads: int = 1
    """CPU threads"""


def main(settings: Settings) -> None:
    """Measure, save the results, and write the page."""
    torch.set_num_threads(settings.threads)
    KEPT.mkdir(parents=True, exist_ok=True)
    if unknown := set(settings.only) - set(PARTS):
        raise ValueError(f"there is no part {', '.join(unknown)}: choose {', '.join(PARTS)}.")
    for part in settings.only:
        result = {"curve": curve, "uncertainty": uncertainty, "deadline": deadline}[part](settings)
        (KEPT / f"{part}.json").write_text(json.dumps(result))
    kept = {
        part: json.loads((KEPT / f"{part}.json").read_text()) for part in PARTS if (KEPT / f"{part}.json").is_file()
    }
    (RESULTS / "adaptive.md").write_text(page(settings, kept))
    print(f"wrote {RESULTS / 'adaptive.md'}")


def models(settings: Settings, objective: str) -> list[Any]:
    """The trained models of an objective, one per seed."""
    folders = [Path("runs/comparison", DATA, OBJECTIVES[objective], f"{seed}", "model") for seed in settings.seeds]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise ValueError(f"{missing[0]} does not exist: train it with benchmarks/paper.py --data fashion_mnist.")
    return [hierens.from_pretrained(folder).eval() for folder in folders]


def test_loader(settings: Settings) -> DataLoader[Any]:
    """The test images in batches."""
    return DataLoader(test_images(configured(DATA, "tree-labels", 0, settings.data_dir, ""), DATA), 500)


def halves(answers: CalibrationSet) -> list[CalibrationSet]:
    """The images with even indices, and those with odd indices."""
    return [
        dataclasses.replace(
            answers, logits=answers.logits[i::2], votes=answers.votes[i::2], labels=answers.labels[i::2]
        )
        for i in (0, 1)
    ]


# --- accuracy against mean cost ---------------------------------------------------------------------------------------


def curve(settings: Settings) -> dict[str, Any]:
    """Accuracy and mean MACs of fixed depths, of thresholds per depth, and of one threshold for all depths."""
    found: dict[str, Any] = {}
    for objective in OBJECTIVES:
        runs = [_curve(collect(model, test_loader(settings))) for model in models(settings, objective)]
        found[objective] = {name: np.mean([run[name] for run in runs], 0).tolist() for name in runs[0]}
        found[objective]["off"] = [off for run in runs for off in run["off"]]
    return found


def _curve(answers: CalibrationSet) -> dict[str, Any]:
    right = answers.logits.argmax(-1) == answers.labels[:, None]
    least, most = answers.macs[0], answers.macs[-1]
    of_run: dict[str, Any] = {"fixed": [answers.macs, (100 * right.double().mean(0)).tolist()], "off": []}
    one, other = halves(answers)
    for measure in MEASURES:
        points: dict[str, list[tuple[float, float]]] = {f"budget, {measure}": [], f"confidence, {measure}": []}
        for budget in (least + share * (most - least) for share in SHARES):
            both = [
                _judged(judged, measure, calibrate(held_out, held_out, budget, measure).thresholds)
                for held_out, judged in ((one, other), (other, one))
            ]
            of_run["off"] += [cost / budget - 1 for cost, _ in both]
            points[f"budget, {measure}"].append(_mean(both))
            both = [
                _judged(judged, measure, _same_for_all(held_out, measure, budget))
                for held_out, judged in ((one, other), (other, one))
            ]
            points[f"confidence, {measure}"].append(_mean(both))
        of_run.update({name: np.transpose(values).tolist() for name, values in points.items()})
    return of_run


def _same_for_all(answers: CalibrationSet, measure: Measure, budget: float) -> tuple[float, ...]:
    """One threshold for all depths: of a grid, the one whose cost on held-out images is closest to the budget."""
    sure = answers.certainties(measure)
    below = sure.shape[1] - 1
    grid = sure[:, 0].double().quantile(torch.linspace(0, 1, 201, dtype=torch.float64)).tolist()
    return (min(grid, key=lambda value: abs(mean_cost(sure, [value] * below, answers.macs) - budget)),) * below


def _judged(answers: CalibrationSet, measure: Measure, thresholds: tuple[float, ...]) -> tuple[float, float]:
    """Mean MACs, and accuracy in percent."""
    sure = answers.certainties(measure)
    leave = exits(sure, thresholds)
    chosen = answers.logits[torch.arange(len(leave)), leave].argmax(-1)
    return mean_cost(sure, thresholds, answers.macs), 100 * float((chosen == answers.labels).double().mean())


def _mean(both: list[tuple[float, float]]) -> tuple[float, float]:
    return mean(cost for cost, _ in both), mean(accuracy for _, accuracy in both)


def above(found: dict[str, Any], way: str) -> list[float]:
    """Differences between a curve and that of fixed depths, interpolated linearly, in points of accuracy."""
    macs, accuracy = found[way]
    return (np.array(accuracy) - np.interp(macs, *found["fixed"])).tolist()


# --- uncertainty ------------------------------------------------------------------------------------------------------


def uncertainty(settings: Settings) -> dict[str, Any]:
    """Quality of probabilities per depth before and after calibration, and detection of out-of-distribution images."""
    found: dict[str, Any] = {}
    loader = test_loader(settings)
    mean_, std = 0.286, 0.353  # the recipe's
    digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    unknown = (F.interpolate(digits, (28, 28), mode="bilinear") - mean_) / std
    for objective in OBJECTIVES:
        records: list[dict[str, list[float]]] = []
        for model in models(settings, objective):
            record = as_record(evaluate_model(model, loader))
            answers = collect(model, loader)
            one, other = halves(answers)
            for name, values in _calibrated(one, other).items():
                record[name] = [(a + b) / 2 for a, b in zip(values, _calibrated(other, one)[name], strict=True)]
            record.update(_detection(model, loader, unknown))
            records.append(record)
        found[objective] = records
    return found


def _calibrated(held_out: CalibrationSet, judged: CalibrationSet) -> dict[str, list[float]]:
    """Calibration error with a temperature per depth; coverage and size of prediction sets."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    temperatures, sets = fit_temperatures(held_out), fit_prediction_sets(held_out, MISS_RATE)
    result: dict[str, list[float]] = {"temperature": list(temperatures.values), "ece_after": [], "hit": [], "size": []}
    for depth in range(judged.logits.shape[1]):
        logits = judged.logits[:, depth]
        p = temperatures(logits, depth)
        result["ece_after"].append(float(multiclass_calibration_error(p, judged.labels, p.shape[1], 15, "l1")))
        inside = sets(logits, depth)
        result["hit"].append(100 * float(inside.gather(1, judged.labels[:, None]).double().mean()))
        result["size"].append(float(inside.sum(1).double().mean()))
    return result


@torch.no_grad()
def _detection(model: Any, loader: DataLoader[Any], unknown: Tensor) -> dict[str, list[float]]:
    """AUROC of detecting digits among clothes, by entropy of the prediction and by mutual information."""
    known = torch.cat([model(images, reduce=False) for images, _ in loader])
    others = torch.cat([model(images, reduce=False) for images in unknown.split(500)])
    sizes = [2**b for b in range(len(model.macs()))]
    scores = {
        "ood_entropy": lambda logits: torch.special.entr(logits.mean(1).softmax(-1)).sum(-1),
        "ood_information": mutual_information,
    }
    return {
        name: [100 * ood_auroc(score(known[:, :n]), score(others[:, :n])) for n in sizes]
        for name, score in scores.items()
    }


# --- deadlines --------------------------------------------------------------------------------------------------------


def deadline(settings: Settings) -> dict[str, Any]:
    """Requests with random deadlines between the times of the first and last depth, alone and beside a busy process."""
    images, labels = (torch.cat(parts) for parts in zip(*test_loader(settings), strict=True))
    model = models(settings, "L_I + L_HD")[0].fuse()
    draw = random.Random(0)

    def requests(count: int, answer: Callable[[Tensor], Prediction]) -> list[tuple[float, Prediction, float]]:
        """Milliseconds, prediction and accuracy of each request, with random pauses between requests."""
        found = []
        for _ in range(count):
            chosen = slice(first := draw.randrange(len(images) - settings.images), first + settings.images)
            start = time.perf_counter()
            given = answer(images[chosen])
            taken = 1e3 * (time.perf_counter() - start)
            right = (given.logits.argmax(-1) == labels[chosen]).double().mean()
            found.append((taken, given, 100 * float(right)))
            time.sleep(draw.expovariate(50))
        return found

    fastest = float(np.quantile([taken for taken, *_ in requests(300, lambda x: FixedDepth(0)(model, x))], 0.99))
    everything = Deadline(1e6)  # evaluates all leaves, one by one
    slowest = float(np.median([taken for taken, *_ in requests(100, lambda x: everything(model, x))]))
    found: dict[str, Any] = {"fastest": fastest, "slowest": slowest, **dataclasses.asdict(settings)}
    for name, busy_processes in (("alone", 0), ("beside a busy process", 1)):
        policy, limits = Deadline(slowest), [draw.uniform(fastest, slowest) for _ in range(settings.requests)]
        remaining = iter(limits)
        busy = [multiprocessing.Process(target=_keep_busy, args=(seed,), daemon=True) for seed in range(busy_processes)]
        for process in busy:
            process.start()
        try:
            policy.learn(model, images[: settings.images])
            served = requests(
                settings.requests, lambda x, policy=policy, left=remaining: policy.within(model, x, next(left))
            )
        finally:
            for process in busy:
                process.terminate()
        late = [taken - limit for (taken, *_), limit in zip(served, limits, strict=True)]
        found[name] = {
            "in_time": 100 * mean(gap <= 0 for gap in late),
            "worst": max(late),
            "accuracy": mean(right for *_, right in served),
            "leaves": mean(float(given.leaves[0]) for _, given, _ in served),
            "used": 100 * mean(taken / limit for (taken, *_), limit in zip(served, limits, strict=True)),
        }
    return found


def _keep_busy(seed: int) -> None:
    """Alternate between random periods of full load on one core and of rest."""
    draw = random.Random(seed)
    while True:
        until = time.perf_counter() + draw.uniform(0.05, 0.95)
        while time.perf_counter() < until:
            pass
        time.sleep(draw.uniform(0.05, 0.95))


# --- the page ---------------------------------------------------------------------------------------------------------


def page(settings: Settings, kept: dict[str, dict[str, Any]]) -> str:
    """The results page."""
    return f"""# Adaptive inference

The models are those of [the paper's comparisons](paper.md): Fashion-MNIST, eight networks, {len(settings.seeds)} seeds.
Each half of the 10,000 test images is the calibration set for the other half.

{_curve_page(kept["curve"]) if "curve" in kept else ""}
{_uncertainty_page(kept["uncertainty"]) if "uncertainty" in kept else ""}
{_deadline_page(kept["deadline"]) if "deadline" in kept else ""}
## How to repeat it

```bash
python benchmarks/paper.py --data fashion_mnist --data-dir DIR --only tree-labels tree-distilled
python benchmarks/adaptive.py --data-dir DIR
```

hierens {hierens.__version__}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()},
{platform.machine()}, {os.cpu_count()} cores, one thread.
"""


def _curve_page(found: dict[str, Any]) -> str:
    _draw(found)
    text = """## Accuracy against mean cost

![Accuracy against mean multiply-accumulates](adaptive.png)

*Budget*: a threshold per depth, chosen by `calibrate(budget=...)`. *Confidence*: one threshold for all depths, chosen
for the same cost. *Fixed*: linear interpolation between the fixed depths, the result of choosing a depth at random for
each image.
"""
    for objective in OBJECTIVES:
        these = found[objective]
        rows = []
        for position, share in enumerate(SHARES):
            macs = these["budget, probability"][0][position]
            rows.append(
                (
                    f"{100 * share:.0f} %",
                    millions(macs),
                    f"{np.interp(macs, *these['fixed']):.2f}",
                    *(
                        f"{these[f'{way}, {measure}'][1][position]:.2f}"
                        for way in ("budget", "confidence")
                        for measure in MEASURES
                    ),
                )
            )
        header = (
            "budget beyond depth 0",
            "MACs",
            "fixed",
            *(f"{way}, {m}" for way in ("budget", "confidence") for m in MEASURES),
        )
        lowest = {way: min(above(these, way)) for way in these if way not in ("fixed", "off")}
        rows.append(("smallest difference to fixed", "", "", *(f"{lowest[name]:+.2f}" for name in header[3:])))
        text += f"""
### Trained with {objective}

Fixed depths: {", ".join(f"{right:.2f} % at {millions(macs)}" for macs, right in zip(*these["fixed"], strict=True))}.

{table(header, rows)}

The cost on the other half differs from the budget by at most {100 * max(map(abs, these["off"])):.1f} % in each of the
{len(these["off"])} calibrations (seed, half, measure, budget), and by {100 * mean(map(abs, these["off"])):.1f} % on
average.
"""
    return text


def _draw(found: dict[str, Any]) -> None:
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    for axes, objective in zip(figure.subplots(1, len(OBJECTIVES)), OBJECTIVES, strict=True):
        these = found[objective]
        for measure in MEASURES:
            macs, accuracy = these[f"budget, {measure}"]
            axes.plot([m / 1e6 for m in macs], accuracy, ".-", lw=1, label=f"budget, {measure}")
        macs, accuracy = these["confidence, probability"]
        axes.plot([m / 1e6 for m in macs], accuracy, ".--", lw=1, label="one threshold, probability")
        macs, accuracy = these["fixed"]
        axes.plot([m / 1e6 for m in macs], accuracy, "ko-", label="fixed depths")
        axes.set(xlabel="million multiply-accumulates per image, mean", ylabel="accuracy (%)", title=objective)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(RESULTS / "adaptive.png", dpi=150)


def _uncertainty_page(found: dict[str, Any]) -> str:
    text = f"""## Uncertainty

Values per depth, mean over seeds. Temperatures and prediction sets are fitted on the calibration half; the sets may
miss the true class in at most {100 * MISS_RATE:.0f} % of the images. The out-of-distribution images are scikit-learn's
digits, enlarged to 28 pixels, to be detected among Fashion-MNIST's test images; an AUROC of 50 % is chance level.
"""
    rows_of = {
        "accuracy": ("accuracy (%)", 2),
        "nll": ("negative log-likelihood", 3),
        "brier": ("Brier score", 3),
        "ece": ("calibration error", 3),
        "temperature": ("fitted temperature", 2),
        "ece_after": ("calibration error with this temperature", 3),
        "aurc": ("area under risk-coverage", 4),
        "hit": (f"sets that contain the class (%), target {100 * (1 - MISS_RATE):.0f}", 1),
        "size": ("classes per set", 2),
        "mutual_information": ("mutual information (nats)", 3),
        "variance": ("variance between networks", 4),
        "ood_entropy": ("digits detected by entropy (AUROC, %)", 1),
        "ood_information": ("digits detected by mutual information (AUROC, %)", 1),
    }
    for objective in OBJECTIVES:
        rows = [
            (title, *(f"{value:.{digits}f}" for value in np.mean([record[name] for record in found[objective]], 0)))
            for name, (title, digits) in rows_of.items()
        ]
        text += f"\n### Trained with {objective}\n\n{table(('networks', '1', '2', '4', '8'), rows)}\n"
    return text


def _deadline_page(found: dict[str, Any]) -> str:
    rows = [
        (
            name,
            f"{got['in_time']:.1f}",
            f"{got['worst']:+.1f}",
            f"{got['used']:.0f}",
            f"{got['leaves']:.2f}",
            f"{got['accuracy']:.2f}",
        )
        for name, got in found.items()
        if isinstance(got, dict)
    ]
    header = ("machine", "in time (%)", "latest (ms after the deadline)", "time used (%)", "networks", "accuracy (%)")
    return f"""## Deadlines

{found["requests"]:,} requests of {found["images"]} images have deadlines drawn uniformly between
{found["fastest"]:.1f} ms, the 99th percentile of the time of depth 0, and {found["slowest"]:.1f} ms, the median time of
depth 3 (leaf by leaf, fused, one thread, no other process). The pause between requests is 20 ms on average. The
busy process uses one core fully for 0.05 to 0.95 s, then rests for 0.05 to 0.95 s.

{table(header, rows)}
"""


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
