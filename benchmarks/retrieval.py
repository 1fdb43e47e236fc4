"""Compares retrieval at every depth, with and without distillation of embeddings.

python benchmarks/retrieval.py --data-dir DIR     trains the rows without a record, writes docs/results/retrieval.md
python benchmarks/retrieval.py --no-train         writes the page from the records

The network, the data and the measures are those of examples/train_retrieval.py.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from comparison.differences import difference, over_last
from comparison.pages import machines, runs
from comparison.records import RECORDS, ROOT, machine, write_json

from hierens.evaluation.plotting import plot_cost
from hierens.evaluation.profiling import millions, table
from hierens.evaluation.reporting import Group

sys.path.insert(0, str(ROOT / "examples"))
import train_retrieval as example

RESULTS = ROOT / "docs" / "results"
SEEDS = (0, 1, 2)
PER_CLASS = 250  # training images of each class, half of them


@dataclass(frozen=True)
class Row:
    """What differs between the networks compared."""

    title: str
    blocks: int = 3
    distance: str = "none"
    weight: float = 4.0
    epochs: int = 1
    batch_size: int = 64


SINGLE, LABELS, DISTILLED = "single", "tree-labels", "tree-distilled"
ROWS = {
    SINGLE: Row("single network", blocks=1),
    LABELS: Row("tree, labels"),
    DISTILLED: Row("tree, labels and distillation", distance="cosine"),
}


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    data_dir: str = ""
    """folder with `train` and `test`, a folder per class in each"""
    threads: int = 1
    """CPU threads of training"""
    minutes: float = 1e9
    """begin no network that would end later than this"""
    train: bool = True
    """--no-train writes the page from the existing records"""


def main(settings: Settings) -> None:
    """Train the rows without a record, then write the page."""
    torch.set_num_threads(settings.threads)
    if settings.train:
        missing = [(row, seed) for seed in SEEDS for row in ROWS if not _file(row, seed).is_file()]
        begun, longest = time.monotonic(), 0.0
        data = example.read(settings.data_dir, PER_CLASS)
        for row, seed in missing:
            start = time.monotonic()
            if start - begun + longest > 60 * settings.minutes:
                break
            print(f"wrote {write_json(_file(row, seed), trained(data, ROWS[row], seed))}", flush=True)
            longest = max(longest, time.monotonic() - start)
    if len(groups := read_records()) == len(ROWS):
        (RESULTS / "retrieval.md").write_text(page(groups, RESULTS))


def _file(row: str, seed: int) -> Path:
    return RECORDS / "retrieval" / row / f"{seed}.json"


def trained(data: example.Data, row: Row, seed: int) -> dict[str, Any]:
    """The record of one network: recall per depth, costs, and what it depends on."""
    model = example.create(len(data.training.labels.unique()), row.blocks, seed)
    example.train(model, data.training, row.distance, row.weight, row.epochs, row.batch_size, seed)
    model.reset_classifier(0)
    return {
        "seed": seed,
        **example.recalls(model, data),
        "macs": list(model.macs()),
        "leaves": list(model.sizes),
        "parameters": list(model.parameter_counts()),
        "training_images": len(data.training.labels),
        "index_images": len(data.index.labels),
        "query_images": len(data.queries.labels),
        "machine": machine(),
        "config": asdict(row),
    }


def read_records() -> dict[str, Group]:
    """The records by row, sorted by seed."""
    groups = {}
    for row, about in ROWS.items():
        records = [json.loads(file.read_text()) for file in sorted((RECORDS / "retrieval" / row).glob("*.json"))]
        if records:
            groups[row] = Group(about.title, records[0]["macs"], records)
    return groups


def page(groups: Mapping[str, Group], directory: Path) -> str:
    """The results page of all rows; its picture is written to the directory."""
    record = groups[SINGLE].records[0]
    config, queries = record["config"], f"{record['query_images']:,}"
    plot_cost(_curves(groups), directory / "retrieval.png", "recall", "recall@1 (%)")
    return f"""# Retrieval at every depth

Every fifth class of CIFAR-100 is held out. A tree of four networks with three blocks (`resnet8_cifar`, stem of stride
2) learns the other 80 classes from {record["training_images"]:,} images in {config["epochs"]} pass (batches of
{config["batch_size"]}, AdamW, crops and flips, float32); then `reset_classifier(0)` leaves a tree of
[embeddings](../how-to/embeddings.md). The {record["index_images"]:,} training images of the 20 classes held out are the
index, their {queries} test images the queries. The embedding of a depth is the mean of its networks' embeddings, and
neighbours are those with the largest cosine. A query counts for recall@k if one of its k nearest neighbours is of its
class. This is a short training of a small network: compare the rows with each other, not with published figures.

All rows are trained with the labels: the sum of the networks' cross-entropies. One adds {config["weight"]:g} times
`cosine_distillation`, which draws the embeddings of the smaller depths to that of the full depth; this weight was set
beforehand and not tuned. Values are means over {len(groups[SINGLE].records)} seeds ± standard deviation; differences
are paired by seed, in points, ± their standard error, over {queries} queries per seed. A star marks those that exceed
twice their standard error.

{_first(groups)}

![Recall at 1 against multiply-accumulates of a query](retrieval.png)

{recall(groups)}

*Index at full depth*: queries of every depth are looked up in one index. *Index at the query's depth*: an index for
each depth, as a network of that size alone would have. *Concatenated*: as before, with the networks' embeddings
concatenated instead of averaged, which takes an index of up to four times the size.

## What distillation of embeddings changes

The tree with distillation minus the tree without:

{_differences({label: difference(groups[DISTILLED], groups[LABELS], field) for field, label in FIELDS.items()})}

## What one index for all depths costs

Recall in the index at full depth minus recall in the index at the query's depth:

{_differences({name: _of_one_index(groups[row], k) for row, k, name in _trees(groups)})}

## Compared with a single network

Each depth of a tree, with the index at full depth, minus the single network, whose cost is that of depth 0:

{_differences({name: over_last(groups[row], groups[SINGLE], f"full_{k}") for row, k, name in _trees(groups)})}

## How to repeat it

```bash
python benchmarks/retrieval.py --data-dir DIR     # the page from the records alone: --no-train
```

{runs(groups)} {machines(groups)}
"""


TREES = (LABELS, DISTILLED)
FIELDS = {
    f"{field}_{k}": f"{text}, recall@{k}"
    for field, text in (
        ("full", "index at full depth"),
        ("same", "index at the query's depth"),
        ("concat", "concatenated"),
    )
    for k in (1, 10)
}


def _first(groups: Mapping[str, Group]) -> str:
    """The main result in a sentence."""
    labels, distilled, single = (groups[row].mean("full_1") for row in (LABELS, DISTILLED, SINGLE))
    return f"""With one index at full depth, queries of depth 0 have a recall@1 of {labels[0]:.1f} % without
distillation of embeddings and of {distilled[0]:.1f} % with it. A single network of that cost, which needs an index of
its own, has {single[0]:.1f} %; at full depth the trees have {labels[-1]:.1f} % and {distilled[-1]:.1f} %."""


def recall(groups: Mapping[str, Group]) -> str:
    """A table of recall by row and depth."""
    rows = []
    for group in groups.values():
        columns = [zip(group.mean(field), group.spread(field), strict=True) for field in FIELDS]
        for depth, (macs, *cells) in enumerate(zip(group.macs, *columns, strict=True)):
            texts = (f"{mean:.1f} ± {spread:.1f}" for mean, spread in cells)
            rows.append((group.name, f"{depth}", millions(macs), *texts))
    return table(("network", "depth", "MACs of a query", *FIELDS.values()), rows)


def _curves(groups: Mapping[str, Group]) -> list[Group]:
    """Recall@1 of the single network, and of each tree with both kinds of index."""
    shown = [(groups[row], name, text) for row in TREES for name, text in (("full", "full"), ("same", "the query's"))]
    curves = [
        Group(f"{group.name}; index at {text} depth", group.macs, [{"recall": r[f"{name}_1"]} for r in group.records])
        for group, name, text in shown
    ]
    single = groups[SINGLE]
    return [*curves, Group(single.name, single.macs, [{"recall": r["full_1"]} for r in single.records])]


def _trees(groups: Mapping[str, Group]) -> list[tuple[str, int, str]]:
    """Both trees with both measures: row, k and title."""
    return [(row, k, f"{groups[row].name}, recall@{k}") for row in TREES for k in (1, 10)]


def _of_one_index(group: Group, k: int) -> list[Any]:
    """Per depth, recall in the index at full depth minus recall in the index of that depth."""
    full, same = (
        Group("", group.macs, [{"seed": r["seed"], "accuracy": r[f"{kind}_{k}"]} for r in group.records])
        for kind in ("full", "same")
    )
    return difference(full, same)


def _differences(found: Mapping[str, list[Any]]) -> str:
    depths = [f"depth {depth}" for depth in range(max(map(len, found.values())))]
    return table(("difference", *depths), [(name, *map(_two_digits, of)) for name, of in found.items()])


def _two_digits(found: Any) -> str:
    return f"{found.mean:+.2f} ± {found.error:.2f}{' *' if found.clear else ''}"


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
