"""The paper's comparisons on any data: Table 1's objectives, figure 4's distillations, figure 5's sharing schemes.

python benchmarks/paper.py --data-dir DIR                      Fashion-MNIST on a CPU: docs/results/paper.md
python benchmarks/paper.py --data-dir DIR --only table1 --seeds 0 1
python benchmarks/paper.py --config FILE --name cifar100       any run of hierens: its YAML is the recipe

Every run is one of `hierens.training.run`, kept under runs/paper; those that are finished are not repeated, so the
script can be stopped and started, and several processes can share the work (`--share 0/2`, `--share 1/2`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import timm
import torch
import tyro
from torch.utils.data import DataLoader, Subset

import hierens
from hierens.metrics import as_record, evaluate_model
from hierens.plotting import plot_comparison, plot_leaves
from hierens.profiling import millions, table
from hierens.reporting import Group, comparison, read_runs
from hierens.training.config import DataConfig, ModelConfig, TrainConfig
from hierens.training.data import create_datasets
from hierens.training.presets import dump_run, load_run
from hierens.training.run import Run, train
from hierens.tree import nested_sizes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"

# The paper's CIFAR recipe shortened to what two CPU cores can do: SGD with the sum of eight losses needs hundreds of
# epochs to get as far as AdamW does in six.
FASHION_MNIST = Run(
    DataConfig(
        dataset="fashion_mnist",
        input_size=(1, 28, 28),
        augment="crop_flip",
        pad=0,
        mean=(0.286,),
        std=(0.353,),
        crop_pct=1.0,
        workers=0,
    ),
    ModelConfig(backbone="resnet8_cifar", backbone_args={"channels": [24, 48, 96], "stem_stride": 2}, blocks=4),
    TrainConfig(
        epochs=6,
        optimizer="adamw",
        lr=4e-3,
        weight_decay=0.02,
        ema_decay=0.998,
        precision="bf16",
        val_batch_size=500,
        val_epochs=6,
        cpu=True,
    ),
)
LABELS, DISTILLED = "independent", "independent+hierarchical_codistillation"
ALL_THREE = "independent+hierarchical+hierarchical_codistillation"
WITH_EXITS = "trained with exits, run without"
SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4}
# By study and name: what is changed in the recipe.
STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "table1": {
        "L_I": {"objective": LABELS},
        "L_H": {"objective": "hierarchical"},
        "L_I + L_H": {"objective": "independent+hierarchical"},
        "L_I + L_HD": {"objective": DISTILLED},
    },
    "figure4": {
        "no distillation": {"objective": LABELS},
        "L_D, alpha 0.1": {"objective": "independent+codistillation", "alpha": 0.1},
        "L_D, alpha 0.5": {"objective": "independent+codistillation", "alpha": 0.5},
        "L_HD, alpha 0.5": {"objective": DISTILLED},
    },
    "figure5": {
        "tree": {"objective": DISTILLED},
        "multi-branch": {"objective": DISTILLED, "branching": (1, 1, 8, 1)},
        "independent": {"objective": DISTILLED, "branching": (8, 1, 1, 1)},
    },
    "better": {
        "the paper's L_I + L_HD": {"objective": DISTILLED},
        "L_I alone": {"objective": LABELS},
        "EMA teacher": {"objective": DISTILLED, "ema_teacher": True},
        "students tempered": {"objective": DISTILLED, "temper_students": True},
        "alpha from 0": {"objective": DISTILLED, "alpha_warmup_epochs": 3},
        "all three labelled": {"objective": ALL_THREE},
        "all three labelled, EMA teacher": {"objective": ALL_THREE, "ema_teacher": True},
        "temperature from 2 to 1": {"objective": DISTILLED, "final_temperature": 1.0},
        "all three labelled, temperature from 2 to 1": {"objective": ALL_THREE, "final_temperature": 1.0},
        "small depths weigh more": {"objective": DISTILLED, "depth_weights": (4.0, 2.0, 1.0, 0.5)},
        WITH_EXITS: {"method": "hne_exits", "head": "conv", "objective": DISTILLED},
        "SGD in place of AdamW": {"objective": DISTILLED, **SGD},
        "SGD with gradient equilibrium": {"objective": DISTILLED, **SGD, "gradient_equilibrium": True},
    },
}


@dataclass(frozen=True)
class Claim:
    """What the paper says of two rows of a study.

    Attributes:
        text: in words.
        study: a key of `STUDIES`.
        more: the row that should have more of the field.
        less: the row that should have less.
        at: where: `first` network, `full` ensemble, or at `every` number of networks.
        field: of the results.
    """

    text: str
    study: str
    more: str
    less: str
    at: str = "full"
    field: str = "accuracy"


CLAIMS = (
    Claim("labels for each network beat labels for nested ensembles", "table1", "L_I", "L_H", "every"),
    Claim("adding L_H to L_I costs the full ensemble", "table1", "L_I", "L_I + L_H"),
    Claim("L_I + L_HD beats L_I", "table1", "L_I + L_HD", "L_I", "every"),
    Claim("L_I + L_HD beats L_H", "table1", "L_I + L_HD", "L_H", "every"),
    Claim("L_I + L_HD beats L_I + L_H", "table1", "L_I + L_HD", "L_I + L_H", "every"),
    Claim("co-distillation helps one network", "figure4", "L_D, alpha 0.5", "no distillation", "first"),
    Claim("co-distillation costs the full ensemble", "figure4", "no distillation", "L_D, alpha 0.5"),
    Claim("a smaller alpha costs the full ensemble less", "figure4", "L_D, alpha 0.1", "L_D, alpha 0.5"),
    Claim("a smaller alpha helps one network less", "figure4", "L_D, alpha 0.5", "L_D, alpha 0.1", "first"),
    Claim("hierarchical helps one network", "figure4", "L_HD, alpha 0.5", "no distillation", "first"),
    Claim("hierarchical beats plain co-distillation, full", "figure4", "L_HD, alpha 0.5", "L_D, alpha 0.5"),
    Claim("co-distillation lowers diversity", "figure4", "no distillation", "L_D, alpha 0.5", "full", "std"),
    Claim("hierarchical keeps more of it", "figure4", "L_HD, alpha 0.5", "L_D, alpha 0.5", "full", "std"),
    Claim("the tree beats independent networks", "figure5", "tree", "independent", "every"),
    Claim("multi-branch is better for one network", "figure5", "multi-branch", "tree", "first"),
    Claim("the tree is better in full", "figure5", "tree", "multi-branch"),
    Claim("sharing one trunk lowers diversity", "figure5", "tree", "multi-branch", "full", "std"),
)


@dataclass(frozen=True)
class Settings:
    """What the benchmark takes."""

    data_dir: str = ""
    """where the data lies"""
    config: str = ""
    """a run's YAML or JSON as the recipe, in place of Fashion-MNIST's"""
    name: str = "fashion_mnist"
    """of the folder under runs/paper; the page is docs/results/paper.md for fashion_mnist, paper_NAME.md else"""
    only: tuple[str, ...] = tuple(STUDIES)
    """studies to run"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of the runs"""
    threads: int = 1
    """CPU threads"""
    share: str = "0/1"
    """i/n: train every n-th run only, beginning with the i-th, so that n processes share the work"""
    train: bool = True
    """--no-train writes the page from the runs that are there"""


def main(settings: Settings) -> None:
    """Train what is missing, then write the page."""
    torch.set_num_threads(settings.threads)
    if settings.train:
        train_missing(_runs(settings), settings.share)
    stem = "paper" if settings.name == "fashion_mnist" else f"paper_{settings.name}"
    file = RESULTS / f"{stem}.md"
    file.write_text(page(settings, stem))
    print(f"wrote {file}")


def train_missing(runs: Iterable[Run], share: str) -> None:
    """Train those of a share (`i/n`: every n-th, from the i-th on) that are not finished."""
    turn, of = map(int, share.split("/"))
    for run in list(runs)[turn::of]:
        if not (Path(run.train.output_dir) / "results.json").is_file():
            print(run.train.output_dir)
            train(run)


def recipe(settings: Settings) -> Run:
    """What all runs have in common."""
    run = load_run(settings.config) if settings.config else FASHION_MNIST
    if settings.data_dir:
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, data_dir=settings.data_dir))
    return run


def configured(settings: Settings, changes: dict[str, Any], seed: int) -> Run:
    """The recipe with a study's changes; its folder is named after them, so that studies share runs."""
    named = "-".join(f"{key}={value}" for key, value in sorted(changes.items())).replace(" ", "")
    folder = f"runs/paper/{settings.name}/{named}/{seed}"
    return changed(recipe(settings), changes, seed, folder)


def changed(run: Run, changes: dict[str, Any], seed: int, folder: str) -> Run:
    """A run with other values for fields of its model or of its training, and a folder of its own."""
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    of_model = {key: value for key, value in changes.items() if key in fields}
    of_training = {key: value for key, value in changes.items() if key not in fields}
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, **of_model),
        train=dataclasses.replace(run.train, **of_training, seed=seed, output_dir=folder),
    )


def _runs(settings: Settings) -> Iterator[Run]:
    """All runs, seed by seed, each once."""
    seen = set()
    for seed in settings.seeds:
        for study in settings.only:
            for changes in STUDIES[study].values():
                run = configured(settings, changes, seed)
                if run.train.output_dir not in seen:
                    seen.add(run.train.output_dir)
                    yield run


# --- what came of it ------------------------------------------------------------------------------------------------


def finished(settings: Settings, study: str) -> dict[str, Group]:
    """The rows of a study that have runs, with further ones for what can be had without training."""
    groups = trained(settings, study)
    if study == "better":
        if WITH_EXITS in groups:
            groups[WITH_EXITS] = without_exits(settings, groups[WITH_EXITS])
        for group in list(groups.values()):
            if group.name in ("the paper's L_I + L_HD", "L_I alone", "EMA teacher"):
                groups[f"{group.name}, averaged weights"] = averaged(group)
                groups[f"{group.name}, reordered"] = reordered(settings, group)
    return groups


def trained(settings: Settings, study: str) -> dict[str, Group]:
    """The rows of a study that have runs, as they are."""
    return read_finished(
        {name: [configured(settings, c, seed) for seed in settings.seeds] for name, c in STUDIES[study].items()}
    )


def read_finished(runs: dict[str, list[Run]]) -> dict[str, Group]:
    """Those of each name's runs that are finished, as a group; no group where none is."""
    groups: dict[str, Group] = {}
    for name, of_name in runs.items():
        folders = [Path(run.train.output_dir) for run in of_name]
        done = [folder for folder in folders if (folder / "results.json").is_file()]
        if done:
            groups[name] = read_runs(done, [name] * len(done))[0]
    return groups


def averaged(group: Group) -> Group:
    """The same runs, judged by the average of their weights."""
    records = [
        {key.removeprefix("ema_"): value for key, value in record.items() if key.startswith("ema_")}
        for record in group.records
    ]
    return Group(f"{group.name}, averaged weights", group.macs, records)


def reordered(settings: Settings, base: Group) -> Group:
    """The same runs with siblings permuted by one half of the test images, judged on the other, both ways."""

    def judged(model: Any, images: Any) -> dict[str, list[float]]:
        halves = [DataLoader(Subset(images, range(start, len(images), 2)), 500) for start in (0, 1)]
        metrics = []
        for chosen, others in (halves, halves[::-1]):
            model.reorder(chosen)
            metrics.append(as_record(evaluate_model(model, others)))
        return {key: [sum(two) / 2 for two in zip(*(m[key] for m in metrics), strict=True)] for key in metrics[0]}

    return Group(f"{base.name}, reordered", base.macs, judged_again(settings, base, "reordered", judged))


def without_exits(settings: Settings, base: Group) -> Group:
    """The same runs, judged by their networks alone: their exits have taught them, and are left away."""

    def judged(model: Any, images: Any) -> dict[str, list[float]]:
        networks = model.networks
        record = as_record(evaluate_model(networks, DataLoader(images, 500)))
        return {**record, "macs": list(networks.macs()), "leaves": list(networks.sizes)}

    records = judged_again(settings, base, "networks", judged)
    return Group(base.name, records[0]["macs"], records)


def judged_again(
    settings: Settings, base: Group, way: str, judged: Callable[[Any, Any], dict[str, list[float]]]
) -> list[dict[str, Any]]:
    """What another way to use the trained models gives on the test images, per seed; remembered beside the run."""
    _, images = create_datasets(recipe(settings).data)
    records = []
    for seed in settings.seeds[: len(base.records)]:
        folder = Path(configured(settings, STUDIES["better"][base.name], seed).train.output_dir)
        cache = folder / f"{way}.json"
        if not cache.is_file():
            cache.write_text(json.dumps(judged(hierens.from_pretrained(folder / "model"), images)))
        records.append(json.loads(cache.read_text()))
    return records


def difference(more: Group, less: Group, field: str) -> list[tuple[float, float, int]]:
    """Per number of networks: the mean difference over the seeds that both have, its spread, and how many they are."""
    pairs = list(zip(more.records, less.records, strict=False))
    columns = zip(*([a - b for a, b in zip(p[field], q[field], strict=True)] for p, q in pairs), strict=True)
    return [(mean(column), stdev(column) if len(column) > 1 else 0.0, len(column)) for column in columns]


def verdicts(studies: dict[str, dict[str, Group]], claims: Sequence[Claim] = CLAIMS) -> str:
    """Which of the paper's orderings hold here."""
    rows = []
    for claim in claims:
        groups = studies.get(claim.study, {})
        if claim.more not in groups or claim.less not in groups:
            rows.append((claim.text, claim.at, "not run", ""))
            continue
        found = difference(groups[claim.more], groups[claim.less], claim.field)
        found = {"first": found[:1], "full": found[-1:], "every": found}[claim.at]
        # An ordering counts as seen where the mean difference exceeds its standard error twice over.
        seen = [abs(gap) > 2 * spread / n**0.5 for gap, spread, n in found]
        if all(gap > 0 for gap, _, _ in found):
            holds = "yes" if all(seen) else "yes, within the noise"
        elif all(gap <= 0 for gap, _, _ in found):
            holds = "no, the reverse" if all(seen) else "no, within the noise"
        else:
            holds = "not throughout"
        if (seeds := found[0][2]) == 1:
            holds = f"{holds.partition(',')[0]} (one seed)"
        elif seeds < len(next(iter(groups.values())).records):
            holds += f" ({seeds} seeds)"
        digits = 2 if claim.field == "accuracy" else 3
        rows.append((claim.text, claim.at, ", ".join(f"{gap:+.{digits}f}" for gap, _, _ in found), holds))
    return table(("the paper", "at", "difference here", "holds"), rows)


def better(groups: dict[str, Group]) -> str:
    """What each candidate gains over the paper's objective, paired by seed, and which of them are ahead throughout."""
    names = list(groups)
    base, rows, ahead = groups[names[0]], [], []
    for name in names[1:]:
        found = difference(groups[name], base, "accuracy")
        seeds, verdict = found[0][2], ""
        if all(gap > 0 for gap, _, _ in found):
            clear = seeds > 1 and all(gap > 2 * spread / seeds**0.5 for gap, spread, _ in found)
            verdict = "clearly" if clear else "within the noise" if seeds > 1 else "one seed"
            ahead.append(f"*{name}* ({verdict})")
        rows.append((name, *(f"{gap:+.2f} ± {spread:.2f}" for gap, spread, _ in found), f"{seeds}", verdict))
    sizes = map(str, nested_sizes(len(base.records[0]["leaf_accuracy"])))
    said = f"Ahead at every depth in the mean: {', '.join(ahead)}." if ahead else "Nothing is ahead at every depth."
    return f"{said}\n\n{table(('gain over it (points)', *sizes, 'seeds', 'ahead at every depth'), rows)}"


def drawn(groups: list[Group]) -> list[Group]:
    """What a picture can show: of many rows, those trained for themselves on several seeds."""
    several = [
        group for group in groups if len(group.records) > 1 and not group.name.endswith(("weights", "reordered"))
    ]
    return several if len(groups) > 10 and several else groups


def page(settings: Settings, stem: str) -> str:
    """The results page with its pictures."""
    studies = {study: finished(settings, study) for study in STUDIES}
    for study, groups in studies.items():
        if groups:
            plot_comparison(drawn(list(groups.values())), RESULTS / f"{stem}_{study}.png")
    if studies["figure4"]:
        plot_leaves(list(studies["figure4"].values()), RESULTS / f"{stem}_leaves.png")
    run = recipe(settings)
    cost = [(name, *map(millions, group.macs)) for name, group in studies["figure5"].items()]
    shown = dump_run(dataclasses.replace(run, data=dataclasses.replace(run.data, data_dir="DIR")))
    return f"""# The paper's comparisons

Ruiz & Verbeek's Table 1 and figures 4, 5 and 9 on Fashion-MNIST instead of CIFAR: eight networks of `resnet8_cifar`
instead of sixteen ResNet-50, {run.train.epochs} epochs instead of 200, AdamW instead of SGD, bfloat16 on a CPU, up to
{len(settings.seeds)} seeds.
Columns are numbers of networks evaluated, cells mean ± standard deviation over seeds. Differences are paired by seed.

## Which of the paper's orderings hold

{verdicts(studies)}

*Holds* is said of the mean difference (points of accuracy, or of the logits' standard deviation); *within the noise* if
it is less than twice its standard error somewhere. With three seeds that is a rough measure.

## Table 1: objectives

![Accuracy and diversity by objective]({stem}_table1.png)

{comparison(list(studies["table1"].values()))}

Expected calibration error (15 bins). The paper's distillation asks small ensembles for the teacher's *softened* answer
without softening theirs, so they come out unsure of themselves; one temperature per depth puts that right.

{comparison(list(studies["table1"].values()), "ece", 3)}

## Figure 4: distillation

![Accuracy and diversity by distillation]({stem}_figure4.png)

{comparison(list(studies["figure4"].values()))}

Standard deviation of the logits over the networks evaluated, mean over classes and images:

{comparison(list(studies["figure4"].values()), "std", 3)}

As figure 9, each network alone (bars) and the first networks together:

![Accuracy of single networks and of ensembles]({stem}_leaves.png)

## Figure 5: sharing schemes

All three trained with L_I + L_HD.

![Accuracy and diversity by sharing scheme]({stem}_figure5.png)

{comparison(list(studies["figure5"].values()))}

Multiply-accumulates per image:

{table(("", *(f"{2**depth}" for depth in range(len(cost[0]) - 1))), cost) if cost else "not run."}

## What beats the paper's objective

Everything tried on the same budget of epochs, losers included; the paper's objective itself first.

{comparison(list(studies["better"].values()))}

{better(studies["better"]) if studies["better"] else ""}

![Accuracy and diversity of the candidates]({stem}_better.png)

The picture has those with several seeds.

*Trained with exits, run without*: a [tree with exits](../explanation/exits.md) on the way to its first network, trained
by L_I + L_HD over exits and networks; its networks alone are judged here, at the cost of the tree. A step of training
takes the exits' work on top. *Reordered*: the same runs, siblings permuted by one half of the test images and judged on
the other, and the other way round. *Averaged weights* are those of the same runs, too. With small depths weighing more,
depths 0 to 3 count 4, 2, 1 and a half.

## How to repeat it

```bash
python benchmarks/paper.py --data-dir DIR
```

hierens {hierens.__version__}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()},
{platform.machine()}, {os.cpu_count()} cores, one thread per run.

??? note "The recipe"

    ```yaml
    {shown.replace(chr(10), chr(10) + "    ").rstrip()}
    ```
"""


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
