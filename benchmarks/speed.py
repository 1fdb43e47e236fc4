"""Time and memory of ensembles compared with alternatives; writes docs/results/speed.md and its figures.

python benchmarks/speed.py                                     # all parts: about an hour on two cores
python benchmarks/speed.py --parts inference --networks resnet18

All ways to run a cell alternate in one process for several rounds, so that disturbances affect all of them. Results are
saved in runs/speed/, in one file per part and network, so a part can be measured again separately. Run nothing else on
the machine meanwhile.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from torch import Tensor, nn
from torch.func import functional_call, vmap

import hierens
from hierens.core.tree import Tree
from hierens.evaluation.profiling import call_ms, table

ROOT = Path(__file__).parents[1]
RESULTS, KEPT = ROOT / "docs" / "results", ROOT / "runs" / "speed"
NETWORKS = ("hne_mobilenetv2_075", "resnet18", "resnet50", "efficientnet_b0")
PARTS = ("inference", "compiled", "training", "memory", "growth")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OURS, BACKBONE, INDEPENDENT = "hierens", "backbone, fused", "independent networks, fused"
MAX_ROUNDS, MIN_ROUNDS = 25, 3
FAR_BEHIND = 1.8
Way = Callable[[], Any]


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    parts: tuple[str, ...] = PARTS
    """parts to measure: inference, compiled, training, memory, growth"""
    networks: tuple[str, ...] = NETWORKS
    """backbones, each cut into four blocks"""
    batch_sizes: tuple[int, ...] = field(default_factory=lambda: (1, 32, 256) if DEVICE.type == "cuda" else (1, 8, 32))
    """images per call"""
    seconds: float = 4.0
    """duration of the rounds of one cell; at least five rounds are run"""
    size: int = 224
    """height and width of the images"""


def main(settings: Settings) -> None:
    """Measure the parts asked for, then write the page from all saved results."""
    warnings.filterwarnings("ignore")
    KEPT.mkdir(parents=True, exist_ok=True)
    for part, name in product(settings.parts, settings.networks):
        if part == "growth" and name != "resnet18":
            continue
        if part == "compiled" and name not in ("hne_mobilenetv2_075", "resnet18"):
            continue
        start = time.perf_counter()
        found = {
            "inference": inference,
            "compiled": compiled,
            "training": training,
            "memory": memory,
            "growth": growth,
        }[part](name, settings)
        record = {"machine": machine(), "seconds": time.perf_counter() - start, "rows": found}
        (KEPT / f"{part}-{name}.json").write_text(json.dumps(record, indent=1))
        print(f"{part} {name}: {record['seconds']:.0f} s", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "speed.md").write_text(page())
    print(f"wrote {RESULTS / 'speed.md'}")


# --- what is compared -------------------------------------------------------------------------------------------------


def tree_of(name: str, leaves: int = 8) -> hierens.HierarchicalEnsemble:
    """A tree of networks with independent random weights, in evaluation mode."""
    if name.startswith("hne_"):
        return timm.create_model(name, num_classes=1000).eval().to(DEVICE)
    backbone = timm.create_model(name)
    blocks = leaves.bit_length()
    return hierens.hierensify(backbone, blocks=blocks, init="reinit").eval().to(DEVICE)


class Vmapped:
    """Runs each level as one `torch.func.vmap` of its block over stacked parameters."""

    def __init__(self, model: hierens.HierarchicalEnsemble, depth: int) -> None:
        self.model, self.leaves = model, model.tree.leaves_at(depth)
        self.steps: list[tuple[Any, dict[str, Tensor], list[int] | None]] = []
        for index, level in enumerate(model.all_levels()):
            inner = index < model.tree.levels
            width = model.tree.width(index, self.leaves) if inner else self.leaves
            parents = [model.tree.parent(index, branch) for branch in range(width)] if inner else None
            states = [branch.state_dict() for branch in level[:width]]
            stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
            self.steps.append((level[0], stacked, parents))

    def __call__(self, x: Tensor) -> Tensor:
        values = x.unsqueeze(0)
        for block, stacked, parents in self.steps:
            if parents is not None:
                values = values[parents]
            values = vmap(lambda state, v, block=block: functional_call(block, state, (v,)))(stacked, values)
        return values.mean(0)


def packed_ensemble(name: str, networks: int) -> nn.Module | None:
    """Independent networks as grouped convolutions, with torch-uncertainty's packed layers."""
    arch = {"resnet18": 18, "resnet50": 50}.get(name)
    if arch is None or networks == 1:
        return None
    try:
        from torch_uncertainty.models.classification.resnet.packed import packed_resnet
    except ImportError:
        return None
    return packed_resnet(3, 1000, arch, num_estimators=networks, alpha=networks, gamma=1).eval().to(DEVICE)


def rounds(ways: dict[str, Way], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every way in every round, after a round for warm-up.

    A way that is much slower in the warm-up round, with calls of more than a second, is measured only there.
    """
    first = {name: timed(way) for name, way in ways.items()}
    much_slower = {name for name, ms in first.items() if ms > 1000 and ms > FAR_BEHIND * first.get(OURS, ms)}
    times: dict[str, list[float]] = {name: [first[name]] if name in much_slower else [] for name in ways}
    start = time.perf_counter()
    for count in range(1, MAX_ROUNDS + 1):
        for name in (name for name in ways if name not in much_slower):
            times[name].append(timed(ways[name]))
        elapsed = time.perf_counter() - start
        if count >= MIN_ROUNDS and elapsed > (seconds if count >= MIN_ROUNDS + 2 else 4 * seconds):
            break
    return times


def timed(way: Way) -> float:
    """Milliseconds of one call; the mean of several calls if one is short."""
    return call_ms(way, DEVICE, 0.05)


# --- the parts --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def inference(name: str, settings: Settings) -> list[dict[str, Any]]:
    """Time every depth and batch size in eager mode."""
    model = tree_of(name)
    plain = model.at_depth(0)
    fused, backbone = model.fuse(), plain.fuse()
    macs, rows = model.macs(), []
    images = torch.randn(1, model.in_chans, settings.size, settings.size, device=DEVICE)
    tuning = fused.tune(images, batch_sizes=settings.batch_sizes)
    for batch, depth in product(settings.batch_sizes, range(model.tree.depths)):
        x = torch.randn(batch, model.in_chans, settings.size, settings.size, device=DEVICE)
        last = x.contiguous(memory_format=torch.channels_last)
        networks = 2**depth
        by_vmap, packed = Vmapped(model, depth), packed_ensemble(name, networks)
        run = by_executor(model, x, depth)
        ways: dict[str, Way] = {
            OURS: lambda x=x, depth=depth: fused(x, depth=depth),
            BACKBONE: lambda x=x: backbone(x),
            "backbone": lambda x=x: plain(x),
            "backbone, channels last": lambda last=last: plain(last),
            INDEPENDENT: lambda x=x, networks=networks: [backbone(x) for _ in range(networks)],
            "looped": run("looped"),
            "grouped convolutions (the paper's way)": run("grouped"),
            "grouped, channels last": by_executor(model, last, depth)("grouped"),
            "vmap": lambda x=x, way=by_vmap: way(x),
        }
        if packed is not None:
            ways["torch-uncertainty, packed layers"] = lambda x=x, packed=packed: packed(x)
        rows.append({"batch": batch, "depth": depth, "macs": macs[depth], "ms": rounds(ways, settings.seconds)})
        ratio, which = best_rival(rows[-1])
        print(f"  {name} batch {batch} depth {depth}: {ratio:.2f} times {which}", flush=True)
    rows.append({"tuning": str(tuning)})
    return rows


def by_executor(model: hierens.HierarchicalEnsemble, x: Tensor, depth: int) -> Callable[[str], Way]:
    """A function that returns a call of the unfused model with a given executor."""

    def choose(executor: Any) -> Way:
        def way() -> Tensor:
            model.set_executor(executor)
            return model(x, depth=depth)

        return way

    return choose


@torch.no_grad()
def compiled(name: str, settings: Settings) -> list[dict[str, Any]]:
    """Time compiled models with frozen weights: the first two batch sizes, the first and the last depth."""
    import torch._inductor.config as inductor

    model, rows = tree_of(name), []
    plain, macs = model.at_depth(0), model.macs()
    fused, backbone = model.fuse(), plain.fuse()
    fused.tune(torch.randn(1, model.in_chans, settings.size, settings.size), batch_sizes=settings.batch_sizes)
    for batch, depth in product(settings.batch_sizes[:2], (0, model.tree.depths - 1)):
        x = torch.randn(batch, model.in_chans, settings.size, settings.size, device=DEVICE)
        with inductor.patch(freezing=True):
            ours = torch.compile(fused, fullgraph=True, dynamic=False)
            alone = torch.compile(backbone, fullgraph=True, dynamic=False)
            model.set_executor("grouped")
            grouped = torch.compile(model, fullgraph=True, dynamic=False)
            ways: dict[str, Way] = {
                OURS: lambda ours=ours, x=x, depth=depth: ours(x, depth=depth),
                BACKBONE: lambda alone=alone, x=x: alone(x),
                "grouped convolutions (the paper's way)": lambda way=grouped, x=x, depth=depth: way(x, depth=depth),
                "hierens, not compiled": lambda x=x, depth=depth: fused(x, depth=depth),
                "backbone, fused, not compiled": lambda x=x: backbone(x),
            }
            for way in ways.values():
                way()  # compiles
            times = rounds(ways, settings.seconds)
        torch.compiler.reset()
        rows.append({"batch": batch, "depth": depth, "macs": macs[depth], "ms": times})
    return rows


def training(name: str, settings: Settings) -> list[dict[str, Any]]:
    """Time a step of SGD with the mean of the leaves' losses: forward, backward, update."""
    rows = []
    model = tree_of(name).train()
    macs = model.macs()
    for batch, depth in product(settings.batch_sizes[1:], range(model.tree.depths)):
        x = torch.randn(batch, model.in_chans, settings.size, settings.size, device=DEVICE)
        last, labels = x.contiguous(memory_format=torch.channels_last), torch.randint(0, 1000, (batch,), device=DEVICE)
        tree, alone = model.at_depth(depth).train(), model.at_depth(0).train()

        def step(network: nn.Module, images: Tensor, executor: Any = None, labels: Tensor = labels) -> Way:
            optimiser = torch.optim.SGD(network.parameters(), lr=1e-6)

            def way() -> None:
                if executor:
                    network.set_executor(executor)  # type: ignore[operator]
                optimiser.zero_grad()
                logits = network(images, reduce=False)
                nn.functional.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1])).backward()
                optimiser.step()

            return way

        ways: dict[str, Way] = {
            OURS: step(tree, last, "auto"),
            "backbone": step(alone, x),
            "backbone, channels last": step(alone, last),
            "looped": step(tree, x, "looped"),
            "grouped convolutions (the paper's way)": step(tree, x, "grouped"),
            "grouped, channels last": step(tree, last, "grouped"),
        }
        if depth == model.tree.depths - 1 and name != "resnet50":
            networks = [model.at_depth(0).train() for _ in range(2**depth)]
            steps = [step(network, last) for network in networks]
            ways["independent networks, channels last"] = lambda steps=steps: [way() for way in steps]
        times = rounds(ways, settings.seconds)
        rows.append({"batch": batch, "depth": depth, "macs": macs[depth], "ms": times})
        if batch * macs[depth] > 1e11:
            break  # a larger step takes many seconds
    return rows


def memory(name: str, settings: Settings) -> list[dict[str, Any]]:
    """Peak memory of activations at every depth, at inference and in a training step."""
    model = tree_of(name)
    rows = inference_memory(model, settings)
    x = torch.randn(settings.batch_sizes[1], model.in_chans, settings.size, settings.size, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    for depth, checkpointing in product(range(model.tree.depths), (False, True)):
        tree = model.at_depth(depth).train()
        tree.set_grad_checkpointing(checkpointing)
        tree(x).sum().backward()  # allocates the gradients
        measured = peak(lambda tree=tree: tree(x).sum().backward())
        rows.append({"batch": x.shape[0], "depth": depth, "checkpointing": checkpointing, "bytes": measured})
    return rows


@torch.no_grad()
def inference_memory(model: hierens.HierarchicalEnsemble, settings: Settings) -> list[dict[str, Any]]:
    """Peak memory of activations at inference at every depth, and its bound."""
    fused, rows = model.fuse(), list[dict[str, Any]]()
    for batch in settings.batch_sizes[:2]:
        x = torch.randn(batch, model.in_chans, settings.size, settings.size, device=DEVICE)
        fused(x)
        own, kept = one_branch(fused, x)
        for depth in range(model.tree.depths):
            fused(x, depth=depth)
            width = [model.tree.width(level, 2**depth) for level in range(model.tree.levels)]
            held = [0, *(w * k for w, k in zip(width, kept, strict=False))]
            bound = x.nbytes + max(w * p + h for w, p, h in zip(width, own, held, strict=False))
            measured = peak(lambda x=x, depth=depth: fused(x, depth=depth))
            rows.append({"batch": batch, "depth": depth, "bytes": measured, "bound": bound})
    return rows


def one_branch(model: hierens.HierarchicalEnsemble, x: Tensor) -> tuple[list[int], list[int]]:
    """For one branch of each level: the peak memory while it runs, and the size of its output, in bytes."""
    own, kept, value = [], [], model._prepared(x)
    for level in list(model.all_levels())[: model.tree.levels]:
        level.run_branch(0, value)  # reorders the weights
        own.append(peak(lambda level=level, value=value: level.run_branch(0, value)))
        value = level.run_branch(0, value)
        kept.append(sum(t.nbytes for t in (value if isinstance(value, tuple) else (value,))))
    return own, kept


def peak(call: Way) -> int:
    """Peak memory that a call allocates, in bytes."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return int(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = recorded.profiler.kineto_results.events()
    now = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@torch.no_grad()
def growth(name: str, settings: Settings) -> list[dict[str, Any]]:
    """Time for 1 to 64 networks, and for several image sizes."""
    rows: list[dict[str, Any]] = []
    backbone = timm.create_model(name)
    tree = hierens.hierensify(backbone, branching=(1, 2, 4, 8), init="reinit").eval().to(DEVICE)
    fused = tree.fuse()
    x = torch.randn(1, 3, 128, 128, device=DEVICE)
    costs = fused.branch_macs((3, 128, 128))
    leaves = [1, 2, 4, 8, 16, 32, 64]
    ways: dict[str, Way] = {str(n): lambda n=n: fused(x, leaves=n) for n in leaves}
    times = rounds(ways, 3 * settings.seconds)
    rows += [{"leaves": n, "macs": tree.tree.cost(costs, n), "ms": {OURS: times[str(n)]}} for n in leaves]
    fused = hierens.hierensify(backbone, Tree.binary(4).levels, init="reinit").eval().to(DEVICE).fuse()
    for size in (64, 96, 128, 160, 192, 224, 288, 352):
        x = torch.randn(1, 3, size, size, device=DEVICE)
        ways = {str(depth): lambda depth=depth, x=x: fused(x, depth=depth) for depth in range(4)}
        times = rounds(ways, settings.seconds)
        macs = fused.macs((3, size, size))
        rows += [{"size": size, "depth": d, "macs": macs[d], "ms": {OURS: times[str(d)]}} for d in range(4)]
    return rows


# --- the page ---------------------------------------------------------------------------------------------------------


def machine() -> str:
    """Device and versions."""
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    versions = f"torch {torch.__version__}, timm {timm.__version__}, hierens {hierens.__version__}"
    return f"{device}, {platform.machine()}, fp32, {versions}"


def kept(part: str) -> dict[str, dict[str, Any]]:
    """The saved results of a part, by network."""
    files = {name: KEPT / f"{part}-{name}.json" for name in NETWORKS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def middle(row: dict[str, Any], way: str = OURS) -> float:
    """Median milliseconds."""
    return statistics.median(row["ms"][way])


def over(row: dict[str, Any], rival: str) -> float:
    """The ensemble's time divided by an alternative's: the median of the ratios of the rounds."""
    own, other = row["ms"][OURS], row["ms"][rival]
    if len(own) != len(other):
        return middle(row) / middle(row, rival)
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


def per_mac(row: dict[str, Any], base: float, rival: str = BACKBONE) -> float:
    """Time per multiply-accumulate, relative to the backbone's in the same cell."""
    return over(row, rival) / (row["macs"] / base)


def page() -> str:
    """The results page, from all saved results."""
    parts = [INTRODUCTION.format(machine=next(iter(kept("inference").values()))["machine"])]
    if found := {name: [r for r in v["rows"] if "ms" in r] for name, v in kept("inference").items()}:
        draw_ratios(found, RESULTS / "speed.png")
        parts += [verdict(found), *(inference_table(name, rows) for name, rows in found.items())]
    if found := {name: v["rows"] for name, v in kept("compiled").items()}:
        parts += [COMPILED, *(ways_table(name, rows) for name, rows in found.items())]
    if found := {name: v["rows"] for name, v in kept("training").items()}:
        parts += [TRAINING, *(training_table(name, rows) for name, rows in found.items())]
    if found := {name: v["rows"] for name, v in kept("memory").items()}:
        parts += [MEMORY, memory_table(found)]
    if found := {name: v["rows"] for name, v in kept("growth").items()}:
        draw_growth(next(iter(found.values())), RESULTS / "speed_growth.png")
        parts += [GROWTH]
    if found := {name: [r for r in v["rows"] if "ms" in r] for name, v in kept("inference").items()}:
        parts += [EVERYTHING, *(ways_table(name, rows) for name, rows in found.items())]
    return "\n".join([*parts, REPEAT])


INTRODUCTION = """# Speed

This page compares the latency of trees with their MACs. All ways to run a cell alternate in one process, for at least
three rounds (five or more in most cells). Times are medians over rounds; ratios are medians of the ratio of each round.
[Another page](gpu.md) covers GPUs. Measured on {machine}.

- *hierens*: `model.fuse()`, then `tune()`. All networks have independent random weights, 224 pixels, 1000 classes.
- *backbone, fused*: the tree's first network alone, `model.at_depth(0).fuse()`: the backbone run in the same way.
- *time per MAC*: milliseconds divided by multiply-accumulates, relative to that backbone in the same cell. Below 1.00,
  the ensemble needs less time per MAC than the backbone.
- *vs. best alternative*: the ensemble's time divided by that of the fastest alternative. *speed-up*: over the same
  number of independent networks, fused, to be compared with the *ratio of MACs*.

![Time per MAC at every depth](speed.png)
"""
COMPILED = """## Compiled

`torch.compile(model, fullgraph=True)` with Inductor and frozen weights (`torch._inductor.config.freezing`). Medians in
milliseconds; empty cells were not measured. Each depth is one graph, and returning to an earlier depth does not compile
again (`tests/test_compiling.py`).
"""
TRAINING = """## Training step

Forward, backward and SGD update with the mean of the leaves' losses, channels last. *per MAC*: as above, relative to
the backbone's step in channels last. Without `fuse()`, which is for inference only.
"""
MEMORY = """## Memory at inference

The peak memory of activations, from the allocator's record, for fused models with the default executor. The bound is
the size of the images in channels-last order, plus the maximum over the levels of *the number of branches times the
peak of one branch, plus the outputs of the previous level*. In these networks the first level, which has one branch,
needs the most memory at every depth, so more networks need no more activation memory than the backbone. Weights are
not included: those of all branches once, and oneDNN's reordered copy of those that ran.
"""
GROWTH = """## Time against networks and image size

One image and `resnet18`: a tree of 64 networks at 128 pixels (`branching=(1, 2, 4, 8)`), and a tree of eight networks
at 64 to 352 pixels.

![Time against networks and against pixels](speed_growth.png)
"""
EVERYTHING = """## All measurements

Medians in milliseconds. *spread*: the largest interquartile range, relative to the median.
"""
REPEAT = """## How to repeat it

```bash
pip install torch-uncertainty lightning  # one of the alternatives; left out if it is not installed
python benchmarks/speed.py
```
"""


def best_rival(row: dict[str, Any]) -> tuple[float, str]:
    """The ensemble's time divided by that of the fastest alternative with the same outputs, and its name."""
    alone = {"backbone", "backbone, channels last", BACKBONE} if row["depth"] else set()
    return max((over(row, way), way) for way in row["ms"] if way != OURS and way not in alone)


def verdict(found: dict[str, list[dict[str, Any]]]) -> str:
    """The summary of the page."""
    ratios = {(name, r["batch"], r["depth"]): per_mac(r, rows[0]["macs"]) for name, rows in found.items() for r in rows}
    deeper = {key: ratio for key, ratio in ratios.items() if key[2]}
    behind = {(name, r["batch"], r["depth"]): best_rival(r)[0] for name, rows in found.items() for r in rows}
    same = [
        statistics.median(a / b for a, b in zip(*(r["ms"][way] for way in (BACKBONE, INDEPENDENT)), strict=True))
        for rows in found.values()
        for r in rows
        if r["depth"] == 0
    ]
    noise = max(max(ratio, 1 / ratio) for ratio in same)
    slower = [f"{key[0]} batch {key[1]} depth {key[2]} ({ratio:.2f})" for key, ratio in behind.items() if ratio > 1.03]
    worst = max(ratios, key=ratios.__getitem__)
    gains = []
    for name, rows in found.items():
        for r in (r for r in rows if r["depth"] == max(q["depth"] for q in rows)):
            expected = 2 ** r["depth"] * rows[0]["macs"] / r["macs"]
            measured = 1 / over(r, INDEPENDENT)
            gains.append((measured / expected, name, r["batch"], measured, expected))
    reached = sum(gain[0] >= 1 for gain in gains)
    least = min(gains)
    return f"""## Summary

- Time per MAC: **{statistics.geometric_mean(ratios.values()):.2f} of the backbone's**, as the geometric mean over
  {len(ratios)} cells ({statistics.geometric_mean(deeper.values()):.2f} without depth 0), at most {ratios[worst]:.2f}
  ({worst[0]}, batch {worst[1]}, depth {worst[2]}); above 1.10 in {sum(r > 1.1 for r in ratios.values())} cells.
- Compared with the fastest alternative of each cell: at most {max(behind.values()):.2f} times its time; more than 3 %
  slower in {len(slower)} of {len(behind)} cells{": " + "; ".join(slower) if slower else ""}.
- Noise: at depth 0, *backbone, fused* and *independent networks, fused* are the same call of one network, but their
  times differ by up to {noise - 1:.0%}.
- The full ensemble compared with the same number of independent networks, both fused: the speed-up reaches the ratio of
  the MACs in {reached} of {len(gains)} cells. In the worst cell it is {least[3]:.2f} instead of {least[4]:.2f}
  ({least[1]}, batch {least[2]}).
"""


def inference_table(name: str, rows: list[dict[str, Any]]) -> str:
    """A table row per cell."""
    lines = []
    for row in rows:
        rival, which = best_rival(row)
        networks = 2 ** row["depth"]
        lines.append(
            (
                f"{row['batch']}",
                f"{networks}",
                f"{row['macs'] / 1e6:.0f} M",
                f"{middle(row):.2f}",
                f"{per_mac(row, rows[0]['macs']):.2f}",
                f"{rival:.2f} ({which})",
                f"{1 / over(row, INDEPENDENT):.2f}",
                f"{networks * rows[0]['macs'] / row['macs']:.2f}",
            )
        )
    header = ("batch", "networks", "MACs", "ms", "time per MAC", "vs. best alternative", "speed-up", "ratio of MACs")
    return f"## {name}\n\n{table(header, lines)}\n"


def ways_table(name: str, rows: list[dict[str, Any]]) -> str:
    """The median times of all ways."""
    ways = list(dict.fromkeys(way for row in rows for way in row["ms"]))
    lines = []
    for row in rows:
        spread = max(spread_of(times) for times in row["ms"].values())
        cells = [f"{middle(row, way):.1f}" if way in row["ms"] else "" for way in ways]
        lines.append((f"{row['batch']}", f"{row['depth']}", *cells, f"{spread:.0%}"))
    return f"### {name}\n\n{table(('batch', 'depth', *ways, 'spread'), lines)}\n"


def spread_of(times: list[float]) -> float:
    """The interquartile range, relative to the median."""
    if len(times) == 1:
        return 0.0
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / median


def training_table(name: str, rows: list[dict[str, Any]]) -> str:
    """The median times of all ways, and the time per MAC."""
    base = "backbone, channels last"
    ways = list(dict.fromkeys(way for row in rows for way in row["ms"]))
    lines = []
    for row in rows:
        ratio = per_mac(row, rows[0]["macs"], base)
        cells = [f"{middle(row, way):.0f}" if way in row["ms"] else "" for way in ways]
        lines.append((f"{row['batch']}", f"{row['depth']}", f"{ratio:.2f}", *cells))
    return f"### {name}\n\n{table(('batch', 'depth', 'per MAC', *ways), lines)}\n"


def memory_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Measured peak memory and its bound, in megabytes."""
    lines = [
        (name, f"{r['batch']}", f"{r['depth']}", f"{r['bytes'] / 1e6:.1f}", f"{r['bound'] / 1e6:.1f}")
        for name, rows in found.items()
        for r in rows
        if "bound" in r
    ]
    steps = [
        (name, f"{plain['batch']}", f"{plain['depth']}", f"{plain['bytes'] / 1e6:.0f}", f"{less['bytes'] / 1e6:.0f}")
        for name, rows in found.items()
        for plain, less in zip(*([r for r in rows if r.get("checkpointing") is c] for c in (False, True)), strict=True)
    ]
    inferring = table(("network", "batch", "depth", "measured (MB)", "bound (MB)"), lines)
    stepping = table(("network", "batch", "depth", "step (MB)", "with checkpointing (MB)"), steps)
    return (
        f"{inferring}\n\nA training step without and with `set_grad_checkpointing()`, which stores only the "
        f"activations between levels:\n\n{stepping}\n"
    )


def draw_ratios(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot time per MAC against depth, with a panel for each network."""
    figure, panels = axes(len(found))
    for panel, (name, rows) in zip(panels, found.items(), strict=True):
        for batch, marker in zip(dict.fromkeys(r["batch"] for r in rows), "osD", strict=False):
            cells = [r for r in rows if r["batch"] == batch]
            ratios = [per_mac(r, rows[0]["macs"]) for r in cells]
            panel.plot([2 ** r["depth"] for r in cells], ratios, marker=marker, label=f"batch {batch}")
        panel.axhline(1, color="0.5", linewidth=1)
        panel.set(title=name, xlabel="networks", xscale="log", xticks=[1, 2, 4, 8], xticklabels=[1, 2, 4, 8])
        panel.set(ylim=(0, 1.4))
        panel.minorticks_off()
    panels[0].set_ylabel("time per MAC (backbone = 1)")
    panels[0].legend(frameon=False, loc="lower left")
    figure.savefig(path)


def draw_growth(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot time against networks and image size, with a line proportional to the MACs."""
    figure, (left, right) = axes(2, 3.4)
    leaves = [r for r in rows if "leaves" in r]
    first = leaves[0]
    left.plot([r["leaves"] for r in leaves], [middle(r) for r in leaves], marker="o", label="measured")
    by_macs = [middle(first) * r["macs"] / first["macs"] for r in leaves]
    left.plot([r["leaves"] for r in leaves], by_macs, linestyle="--", color="0.5", label="one network's time per MAC")
    ticks = [r["leaves"] for r in leaves]
    left.set(xscale="log", yscale="log", xlabel="networks", ylabel="ms", xticks=ticks, xticklabels=ticks)
    for depth, marker in zip(range(4), "osD^", strict=True):
        cells = [r for r in rows if r.get("depth") == depth]
        right.plot([r["size"] for r in cells], [middle(r) for r in cells], marker=marker, label=f"{2**depth}")
    right.set(xlabel="pixels (height and width)", ylabel="ms")
    left.minorticks_off()
    left.legend(frameon=False)
    right.legend(frameon=False, title="networks")
    figure.savefig(path)


def axes(count: int, width: float = 2.6) -> tuple[Any, Sequence[Any]]:
    """A row of panels in the style of these pages."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(width * count, 3.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
