"""Converts timm's architectures and checks the results; writes docs/results/zoo.md.

python benchmarks/zoo.py               # cuts every variant, without weights; converts and checks one of each model file
python benchmarks/zoo.py --only vgg    # prints what is found for one model file

Results are saved in runs/zoo/ as they are found, so an interrupted sweep can be resumed.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from timm.models import model_entrypoint
from torch import Tensor, nn

import hierens
from hierens.branches.self_check import reasons_to_loop
from hierens.core.modes import quiet_dropout
from hierens.cutting.cut import cut

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.networks import difference, few_pixels, randomize

RESULTS, KEPT = ROOT / "docs" / "results", ROOT / "runs" / "zoo"
_PER_POOL = 40  # architectures after which worker processes are replaced
EXACT = 1e-4  # relative to the largest logit
BLOCKS = 4
LARGE = 25.0  # million parameters above which a tree has four networks instead of eight and is not compiled
HUGE = 200.0  # million parameters above which it has two networks
SHALLOW: dict[str, dict[str, Any]] = {"deepseek_vit_412m": {"depth": 8}}  # 8 of its 32 equal layers, to save memory


@dataclass(frozen=True)
class Settings:
    """Settings of the sweep."""

    processes: int = 2
    """worker processes, with one thread each"""
    only: tuple[str, ...] = ()
    """model files to examine; the page is then not written. All by default"""


def main(settings: Settings) -> None:
    """Run the checks, then write the page."""
    KEPT.mkdir(parents=True, exist_ok=True)
    names = [name for name in architectures() if not settings.only or model_file(name) in settings.only]
    variants = _kept("variants", cut_only, names, settings.processes)
    smallest = smallest_variants(variants)
    order = sorted(smallest.values(), key=lambda name: variants[name]["millions"])
    families = _kept("families", examine, order, settings.processes)
    if settings.only:
        print(json.dumps({name: families[name] for name in order}, indent=1))
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "zoo.md").write_text(page(smallest, families, variants))
    print(f"wrote {RESULTS / 'zoo.md'}")


# --- one architecture -------------------------------------------------------------------------------------------------


def architectures() -> list[str]:
    """All variants that timm itself registers."""
    return [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("timm.")]


def model_file(name: str) -> str:
    """The file of timm that defines a variant."""
    return model_entrypoint(name).__module__.rpartition(".")[2]


def smallest_variants(variants: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The variant with the fewest parameters of every model file."""
    chosen: dict[str, str] = {}
    built = [name for name in variants if "millions" in variants[name]]
    for name in sorted(built, key=lambda name: variants[name]["millions"]):
        chosen.setdefault(model_file(name), name)
    return dict(sorted(chosen.items()))


def cut_only(name: str) -> dict[str, Any]:
    """Millions of parameters of a variant on the meta device, and where it is cut or why it cannot be."""
    with torch.device("meta"):
        backbone = timm.create_model(name, num_classes=10).eval()
    found = {"millions": sum(p.numel() for p in backbone.parameters()) / 1e6}
    return found | _safely(lambda _: {"at": cut(backbone, BLOCKS).at}, name)


@torch.no_grad()
def examine(name: str, thorough: bool = True) -> dict[str, Any]:
    """All checks of one architecture; compilers are only tried if `thorough`."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=10, **SHALLOW.get(name, {})).eval()
    randomize(backbone)
    x = few_pixels(backbone)
    start = time.perf_counter()
    millions = sum(p.numel() for p in backbone.parameters()) / 1e6
    branching = (1, 1, 1, 2) if millions > HUGE else (1, 1, 2, 2) if millions > LARGE else (1, 2, 2, 2)
    reasons = reasons_to_loop(cut(backbone, BLOCKS).parts, backbone)  # of every block, also where a tree has one branch
    model = hierens.hierensify(backbone, branching=branching, looped=reasons).eval()
    found: dict[str, Any] = {
        "seconds": time.perf_counter() - start,
        "pixels": x.shape[-1],
        "at": model._model_args["at"],
    }
    found["executors"] = [_executor(level) for level in model.all_levels()]
    found["looped"] = {**model.looped, **_looped_layers(model)}
    expected = backbone(x)
    depths = range(model.tree.depths)
    found["copy"] = max(difference(model(x, depth=depth), expected) for depth in depths)
    others: dict[str, Callable[[], Any]] = {
        "eval": lambda: _packed_against_looped(model, x, False),
        "train": lambda: _packed_against_looped(model, x, True),
        "deepcopy": lambda: _same(copy.deepcopy(model), model, x),
        "saved": lambda: _saved(model, x),
        "bfloat16": lambda: _half(model, x, torch.bfloat16),
        "float16": lambda: _half(model, x, torch.float16),
    }
    compilers: dict[str, Callable[[], Any]] = {
        "compiled": lambda: _same(torch.compile(model.at_depth(1), backend="aot_eager"), model.at_depth(1), x),
        "exported": lambda: _same(torch.export.export(model.at_depth(1), (x,)).module(), model.at_depth(1), x),
    }
    for what, try_out in (others | compilers if thorough and millions <= LARGE else others).items():
        try:
            found[what] = try_out()
        except Exception as error:
            found[what] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
        torch.compiler.reset()
    return found


def _executor(level: Any) -> str:
    if level.fallback_reason:
        return "looped"
    inner = ", layers looped" if level.looped_layers else ""
    return ("grouped" if level.channelwise else "batched") + inner


def _looped_layers(model: hierens.HierarchicalEnsemble) -> dict[str, str]:
    levels = enumerate(model.all_levels())
    return {f"{index}.{name}": why for index, level in levels for name, why in level.looped_layers.items()}


def _packed_against_looped(model: hierens.HierarchicalEnsemble, x: Tensor, training: bool) -> float:
    """The largest difference between the executors, for a tree of different networks without dropout."""
    tree = copy.deepcopy(model)
    tree.break_symmetry(noise=0.3)
    if tree.tree.leaves == 8:
        try:
            tree.double().set_executor("looped")
            tree(x.double(), depth=0)
        except Exception:  # the model creates float32 values itself
            tree.float()
    outputs = []
    for executor in ("looped", "grouped"):
        own = copy.deepcopy(tree).train(training)
        quiet_dropout(own)
        own.set_executor(executor)
        outputs.append(own(x.to(next(own.parameters()).dtype), reduce=False))
    return difference(*outputs)


def _same(other: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> bool:
    return difference(other(x), model(x)) < EXACT


def _saved(model: hierens.HierarchicalEnsemble, x: Tensor) -> bool:
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return _same(hierens.from_pretrained(directory), model, x)


def _half(model: hierens.HierarchicalEnsemble, x: Tensor, dtype: torch.dtype) -> bool:
    tree = copy.deepcopy(model).to(dtype)
    return bool(tree(x[:1].to(dtype), depth=1).isfinite().all())


# --- many of them -----------------------------------------------------------------------------------------------------


def _kept(
    what: str,
    examine_one: Callable[[str], dict[str, Any]],
    names: Iterable[str],
    processes: int,
) -> dict[str, dict[str, Any]]:
    """Results by name: saved ones and new ones. The record of an architecture that fails contains the error."""
    file = KEPT / f"{what}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    found = {record.pop("name"): record for record in map(json.loads, lines)}
    missing = [name for name in names if name not in found]
    with file.open("a") as log:
        for name, record in _spread(examine_one, missing, processes):
            found[name] = record
            log.write(json.dumps({"name": name, **record}) + "\n")
            log.flush()
            print(f"{what} {len(found)}: {name} {record.get('error', '')}", flush=True)
    return found


def _spread(
    examine_one: Callable[[str], dict[str, Any]], names: list[str], processes: int
) -> Iterable[tuple[str, dict[str, Any]]]:
    """Run in worker processes that are replaced regularly, because compilers and allocators keep memory."""
    for start in range(0, len(names), _PER_POOL):
        with ProcessPoolExecutor(processes, get_context("spawn"), _quiet) as pool:
            waiting = {pool.submit(_safely, examine_one, name): name for name in names[start : start + _PER_POOL]}
            try:
                for future in as_completed(waiting):
                    yield waiting[future], future.result()
            except BrokenProcessPool as error:
                raise SystemExit("a process died, probably out of memory: resume with --processes 1") from error


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")


def _safely(examine_one: Callable[[str], dict[str, Any]], name: str) -> dict[str, Any]:
    try:
        return examine_one(name)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"}


# --- the page ---------------------------------------------------------------------------------------------------------


def page(smallest: dict[str, str], families: dict[str, dict[str, Any]], variants: dict[str, dict[str, Any]]) -> str:
    """The results page."""
    rows = {file: families[name] for file, name in smallest.items()}
    converted = {file: row for file, row in rows.items() if "error" not in row}
    tried = [row for row in converted.values() if "compiled" in row]
    exact = [file for file, row in converted.items() if row["copy"] <= EXACT]
    lines = [_row(file, smallest[file], variants[smallest[file]]["millions"], row) for file, row in rows.items()]
    failed = [f"- `{file}` (`{smallest[file]}`): {row['error']}" for file, row in rows.items() if "error" in row]
    levels = Counter(name for row in converted.values() for name in row["executors"][:BLOCKS])
    checks = {
        what: sum(row.get(what) is True for row in converted.values())
        for what in ("deepcopy", "saved", "bfloat16", "float16", "compiled", "exported")
    }
    packed = {
        mode: sum(isinstance(row[mode], float) and row[mode] <= EXACT for row in converted.values())
        for mode in ("eval", "train")
    }
    return f"""# Supported architectures

The smallest variant of each of timm's {len(rows)} model files is cut into {BLOCKS} blocks and converted into a tree of
eight networks (four above {LARGE:g} million parameters, two above {HUGE:g}). All weights are random, also those that
initialisation sets to zero. The inputs are two images. Built with fewer of their equal layers, to save memory:
{", ".join(f"`{name}` ({settings})" for name, settings in SHALLOW.items())}.

- **{len(exact)} of {len(rows)} model files convert exactly**: at every depth, the logits of a tree of copies differ
  from the backbone's by at most {EXACT:g} of the largest logit.
- Of {sum(levels.values())} blocks, {", ".join(f"{count} are {name}" for name, count in levels.most_common())}.
  *Grouped*: the feature maps of the branches are concatenated along the channels. *Batched*: some layers concatenate
  the branches along the batch and use batched matrix products.
- The grouped executor gives the outputs of the looped one, with different weights in every branch, for
  {packed["eval"]} of {len(converted)} in evaluation and {packed["train"]} in training. The self-check also compares
  running statistics; the tests compare gradients for a sample of architectures.
- {checks["deepcopy"]} give the same outputs after `copy.deepcopy`, and {checks["saved"]} after saving and loading.
  {checks["bfloat16"]} give finite logits in bfloat16 on the CPU, {checks["float16"]} in float16. Of {len(tried)} tried
  at two networks, {checks["compiled"]} give the same outputs with `torch.compile` (without code generation) and
  {checks["exported"]} with `torch.export`.
{_registry_line(variants)}
## What does not convert

{chr(10).join(failed) or "Nothing."}

## By model file

*copy*: the largest difference from the backbone over all depths. *eval*, *train*: the largest difference between the
grouped and the looped executor. *blocks*: the executor of each block, in order: g grouped, b batched, l looped; + if
some layers of the block are looped.

| model file | variant | M parameters | blocks | copy | eval | train | compile | export | half |
| --- | --- | ---: | --- | ---: | ---: | ---: | --- | --- | --- |
{chr(10).join(lines)}

## Why blocks or layers are looped

{_reasons(converted)}

## How to repeat it

```bash
python benchmarks/zoo.py
```

hierens {hierens.__version__}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()},
{platform.machine()}, {os.cpu_count()} cores.
"""


def _row(file: str, name: str, millions: float, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {file} | `{name}` | {millions:.1f} | not cut | | | | | | |"
    short = " ".join(e[0] + "+" * ("layers" in e) for e in row["executors"][:BLOCKS])
    numbers = [f"{row[k]:.0e}" if isinstance(row[k], float) else "fails" for k in ("copy", "eval", "train")]
    marks = ["yes" if row.get(k) is True else "no" if k in row else "" for k in ("compiled", "exported")]
    half = " ".join(k for k in ("bfloat16", "float16") if row.get(k) is True) or "no"
    return f"| {file} | `{name}` | {millions:.1f} | {short} | {' | '.join([*numbers, *marks])} | {half} |"


def _reasons(rows: dict[str, dict[str, Any]]) -> str:
    """Each reason once, with the model files that it applies to."""
    files: dict[str, list[str]] = {}
    for file, row in rows.items():
        for why in dict.fromkeys(row["looped"].values()):
            files.setdefault(why, []).append(file)
    ordered = sorted(files.items(), key=lambda item: (-len(item[1]), item[0]))
    return "\n".join(f"- {why}: {', '.join(names)}" for why, names in ordered) or "None is."


def _registry_line(variants: dict[str, dict[str, Any]]) -> str:
    refused = {name: row["error"] for name, row in variants.items() if "error" in row}
    listed = "".join(f"\n    - `{name}`: {error}" for name, error in refused.items())
    share = 1 - len(refused) / len(variants)
    return f"""- Of all {len(variants)} variants of the registry, built on the meta device,
  **{len(variants) - len(refused)} ({share:.1%}) can be cut into {BLOCKS} blocks**; none was left out for its size.
  {"The others:" if refused else ""}{listed}
"""


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
