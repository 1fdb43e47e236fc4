"""Tests the example server: a load surge, a killed replica, malicious uploads; writes docs/results/serving.md.

python benchmarks/serving_model.py --data-dir DIR          # trains the model, runs/serving/model
python benchmarks/serving.py --data-dir DIR                # six minutes on two otherwise idle cores
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import serving_page

import hierens
from hierens.training.config import DataConfig
from hierens.training.data.builtin import fashion_mnist
from support import hostile_uploads

RESULTS = ROOT / "docs" / "results"
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    data_dir: str
    """folder with the four idx files"""
    model: str = "runs/serving/model"
    """folder written by serving_model.py"""
    output: str = "runs/serving"
    """folder for the measurements"""
    only: tuple[str, ...] = ()
    """parts to measure: surge, kill, attack; the others are read from `output`"""
    per_request: int = 4
    """images per request"""
    target_ms: float = 500
    """target for the 99th percentile of latencies"""
    calm_s: float = 20
    """seconds of low load before and after the surge"""
    surge_s: float = 30
    """seconds of the surge"""
    surge: float = 3.0
    """load of the surge, as a multiple of the capacity at full depth"""
    kill_s: float = 60
    """seconds of load; a replica is killed after a quarter of them"""
    uploads: int = 200
    """number of malicious uploads"""
    port: int = 8765
    """port on the loopback address"""


def main(settings: Settings) -> None:
    """Measure the parts asked for, and write the page from all measurements."""
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    images, labels = fashion_mnist(DataConfig(dataset="fashion_mnist", data_dir=settings.data_dir), False)
    np.save(output / "images.npy", images)
    for part in (surge, kill, attack):
        if not settings.only or part.__name__ in settings.only:
            (output / f"{part.__name__}.json").write_text(json.dumps(part(settings, images, labels)))
    found = {p.__name__: json.loads((output / f"{p.__name__}.json").read_text()) for p in (surge, kill, attack)}
    serving_page.draw(found["surge"], settings, RESULTS / "serving.png")
    (RESULTS / "serving.md").write_text(serving_page.page(settings, found))
    print(f"wrote {RESULTS / 'serving.md'}")


# --- a server, and load -------------------------------------------------------------------------------------------


@contextmanager
def server(settings: Settings, **flags: Any) -> Iterator[psutil.Process]:
    """Run the example server in separate processes."""
    given = {"model": settings.model, "port": settings.port, "target_ms": settings.target_ms, **flags}
    command = [sys.executable, str(ROOT / "examples" / "serve.py")]
    for name, value in ({"max_batch": 1, "queue_high": 2, "threads": 1} | given).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    with (Path(settings.output) / "server.log").open("a") as log:
        process = psutil.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_ready(settings, 180)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_ready(settings: Settings, seconds: float) -> None:
    """Wait until /readyz returns 200."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if httpx.get(f"http://127.0.0.1:{settings.port}/readyz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise RuntimeError("the server did not become ready.")


def load(settings: Settings, **flags: Any) -> subprocess.Popen[bytes]:
    """Start a load generator; `rows` waits for it."""
    output = Path(settings.output)
    command = [sys.executable, str(ROOT / "benchmarks" / "serving_load.py"), "--per-request", str(settings.per_request)]
    command += ["--url", f"http://127.0.0.1:{settings.port}/predict", "--images", str(output / "images.npy")]
    command += ["--output", str(output / "load.jsonl")]
    for name, value in flags.items():
        values = [str(v) for pair in value for v in pair] if isinstance(value, list) else [str(value)]
        command += [f"--{name}", *values]
    return subprocess.Popen(command)


def rows(settings: Settings, loading: subprocess.Popen[bytes]) -> Rows:
    """Wait for a load generator and return its records."""
    if loading.wait(600):
        raise RuntimeError("the load failed.")
    return [json.loads(line) for line in (Path(settings.output) / "load.jsonl").read_text().splitlines()]


# --- 1. a surge ---------------------------------------------------------------------------------------------------


def surge(settings: Settings, images: Any, labels: Any) -> dict[str, Any]:
    """Low load, a surge, low load: at full depth, and with the load policy."""
    found: dict[str, Any] = {"calibration": depths(settings, images, labels)}
    with server(settings, policy="fixed"):
        rows(settings, load(settings, workers=4, seconds=4))  # warm
        found["capacity"] = sum(r["status"] == 200 for r in rows(settings, load(settings, workers=4, seconds=12))) / 12
        calm = (settings.calm_s, 0.5 * found["capacity"])
        phases = [calm, (settings.surge_s, settings.surge * found["capacity"]), calm]
        found["fixed"] = compact(rows(settings, load(settings, phases=phases)), labels, settings)
    with server(settings, policy="load"):
        rows(settings, load(settings, workers=2, seconds=4))
        wait_ready(settings, 10)
        time.sleep(5)  # without load the policy returns to full depth
        found["load"] = compact(rows(settings, load(settings, phases=phases)), labels, settings)
    return found


def compact(measured: Rows, labels: Any, settings: Settings) -> Rows:
    """Replace the classes by the number of images classified correctly."""
    kept = []
    for row in measured:
        answers = (row.pop("reply", None) or {}).get("answers", [])
        true = labels[row["index"] * settings.per_request :][: settings.per_request]
        right = [a["classes"][0]["index"] == int(y) for a, y in zip(answers, true, strict=False)]
        kept.append(row | {"right": sum(right), "depth": answers[0]["depth"] if answers else None})
    return kept


@torch.no_grad()
def depths(settings: Settings, images: Any, labels: Any) -> dict[str, Any]:
    """Accuracy of every depth on all test images, and its time for one request."""
    torch.set_num_threads(1)
    model = hierens.from_pretrained(settings.model)
    right = np.load(Path(settings.model) / "right.npy")  # (depths, images), of serving_model.py
    fast, x = model.fuse(), normalised(images[: settings.per_request])
    taken = []
    for depth in range(len(model.macs())):
        fast(x, depth=depth)
        times = []
        for _ in range(20):
            start = time.perf_counter()
            fast(x, depth=depth)
            times.append(1e3 * (time.perf_counter() - start))
        taken.append(statistics.median(times))
    accuracy = (100 * right.mean(1)).tolist()
    return {"macs": list(model.macs()), "ms": taken, "accuracy": accuracy, "full_right": right[-1].tolist()}


def normalised(images: Any) -> torch.Tensor:
    """Images (N, H, W) as the model takes them, (N, 1, H, W)."""
    return torch.from_numpy(np.array(images)).float().div(255).sub(0.286).div(0.353)[:, None]


# --- 2. a killed replica ------------------------------------------------------------------------------------------


def kill(settings: Settings, images: Any, labels: Any) -> dict[str, Any]:
    """Kill one of two replicas while both are working."""
    capacity = json.loads((Path(settings.output) / "surge.json").read_text())["capacity"]
    with server(settings, policy="load", replicas=2) as process:
        rows(settings, load(settings, workers=2, seconds=3))
        loading = load(settings, phases=[(settings.kill_s, 1.5 * capacity)])
        time.sleep(settings.kill_s / 4 + 3)  # the load generator encodes its PNGs first
        replicas(process)[0].kill()
        killed, noticed, again = time.perf_counter(), None, None
        while again is None and loading.poll() is None:
            time.sleep(0.2)
            running = metric(settings, "hierens_replicas")
            if running < 2 and noticed is None:
                noticed = time.perf_counter() - killed
            if running == 2 and noticed is not None:
                again = time.perf_counter() - killed
        measured = rows(settings, loading)
        second_tries = metric(settings, "hierens_second_tries_total")
    wrong, compared = compare(settings, measured, images)
    answered = [row for row in measured if row["status"] == 200]
    return {
        "sent": len(measured),
        "statuses": Counter(row["status"] for row in measured),
        "errors": sorted({row["reply"]["error"] for row in measured if row["status"] not in (0, 200)}),
        "lost": Counter(row["error"] for row in measured if row["status"] == 0),
        "second_tries": second_tries,
        "wrong": wrong,
        "compared": compared,
        "rate": 1.5 * capacity,
        "noticed_s": noticed,
        "again_s": again,
        "slowest_ms": max(row["ms"] for row in answered),
        "failed_from_to": [f(r["due"] for r in measured if r["status"] != 200) for f in (min, max)]
        if len(answered) < len(measured)
        else None,
    }


def metric(settings: Settings, name: str) -> float:
    """A value of /metrics."""
    found = httpx.get(f"http://127.0.0.1:{settings.port}/metrics", timeout=10).text
    return float(found.partition(f"\n{name} ")[2].split()[0])


def replicas(process: psutil.Process) -> list[psutil.Process]:
    """The replica processes, which the server's child, a forkserver, has started."""
    return [child for child in process.children(recursive=True) if child.ppid() != process.pid]


@torch.no_grad()
def compare(settings: Settings, measured: Rows, images: Any) -> tuple[int, int]:
    """The number of predictions that differ from the model's at their depth, and the number compared."""
    model = hierens.from_pretrained(settings.model).fuse()
    wanted: dict[int, list[tuple[int, dict[str, Any]]]] = {}
    for row in measured:
        if row["status"] == 200:
            for offset, answer in enumerate(row["reply"]["answers"]):
                wanted.setdefault(answer["depth"], []).append((row["index"] * settings.per_request + offset, answer))
    wrong = 0
    for depth, answers in wanted.items():
        unique = sorted({index for index, _ in answers})
        batches = np.array_split(unique, -(-len(unique) // 50))
        p = torch.cat([model(normalised(images[part]), depth=depth).softmax(-1) for part in batches])
        own = dict(zip(unique, p, strict=True))
        for index, answer in answers:
            given = torch.tensor([c["probability"] for c in answer["classes"]])
            its = own[index][[c["index"] for c in answer["classes"]]]
            wrong += not (torch.allclose(its, given, atol=1e-4) and given[0] >= own[index].max() - 1e-4)
    return wrong, sum(map(len, wanted.values()))


# --- 3. hostile uploads -------------------------------------------------------------------------------------------


def attack(settings: Settings, images: Any, labels: Any) -> dict[str, Any]:
    """Send every kind of upload that must be refused."""
    with server(settings, policy="load") as process:
        flags = {"workers": 4, "seconds": 3}
        rows(settings, load(settings, **flags))
        for case in hostile_uploads.cases(len(hostile_uploads.KINDS), 8_000_000, seed=1):  # warm-up: loads imports
            hostile_uploads.send("127.0.0.1", settings.port, case)
        before, alive = resident(process), {p.pid for p in process.children(recursive=True)}
        peak, statuses, unexpected = before, {}, []
        start = time.perf_counter()
        for case in hostile_uploads.cases(settings.uploads, 8_000_000):
            found = hostile_uploads.send("127.0.0.1", settings.port, case)
            statuses.setdefault(case.name, Counter())[found.status] += 1
            if found.status not in case.expected:
                unexpected.append((case.name, found.status))
            peak = {name: max(peak.get(name, 0), size) for name, size in resident(process).items()}
        seconds = time.perf_counter() - start
        served = Counter(row["status"] for row in rows(settings, load(settings, **flags)))
        after, died = resident(process), alive - {p.pid for p in process.children(recursive=True)}
    return {
        "statuses": statuses, "unexpected": unexpected, "before": before, "peak": peak, "after": after,
        "died": len(died), "served": served, "seconds": seconds,
    }  # fmt: skip


def resident(process: psutil.Process) -> dict[str, float]:
    """Resident memory of the gateway and the replica in megabytes."""
    named = zip(("gateway", "replica"), (process, *replicas(process)), strict=True)
    return {name: each.memory_info().rss / 1e6 for name, each in named}


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
