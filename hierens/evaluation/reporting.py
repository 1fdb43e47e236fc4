"""Compares the results of finished runs. Runs that differ only in their seed are averaged.

The plots follow the paper, one for each question: accuracy over cost, diversity over cost (figures 4, 5 and 6), and
accuracy over the number of networks, with that of each network as bars (figure 9).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hierens.core.atomic_files import replacing
from hierens.core.json_files import read_json, short
from hierens.core.tree import nested_sizes
from hierens.evaluation.plotting import Cost, plot_cost, plot_leaves
from hierens.evaluation.profiling import table
from hierens.evaluation.run_names import distinct_names


@dataclass(frozen=True)
class Group:
    """Runs of one configuration with several seeds.

    Attributes:
        name: in tables and plots.
        macs: of every depth.
        records: per seed, the record of the last validation, with the fields of
            `hierens.evaluation.metrics.LeafEvaluation`.
        directory: of the first run.
        milliseconds: measured time of every depth; empty if it was not measured.
    """

    name: str
    macs: list[float]
    records: list[dict[str, Any]]
    directory: str | Path = ""
    milliseconds: Sequence[float] = ()

    @property
    def leaves(self) -> list[int]:
        """Number of networks (or exits) of every depth."""
        record = self.records[0]
        # Records of older runs, all of trees, have no "leaves".
        return list(record.get("leaves") or nested_sizes(len(record["leaf_accuracy"])))

    def mean(self, field: str) -> list[float]:
        """Mean of a field over seeds, per depth (or leaf)."""
        return [statistics.mean(values) for values in zip(*(r[field] for r in self.records), strict=True)]

    def spread(self, field: str) -> list[float]:
        """Standard deviation of a field over seeds, per depth (or leaf); 0 for a single seed."""
        columns = list(zip(*(r[field] for r in self.records), strict=True))
        return [statistics.stdev(values) if len(values) > 1 else 0.0 for values in columns]


def read_runs(directories: Sequence[str | Path], names: Sequence[str] = ()) -> list[Group]:
    """Group finished runs by their configuration.

    Args:
        directories: `output_dir` of each run.
        names: one for each run, by default made of the fields in which the runs differ (see
            `hierens.evaluation.run_names`); runs with equal names are averaged.

    Raises:
        ValueError: a directory without results, or a wrong number of names.
    """
    if names and len(names) != len(directories):
        raise ValueError(f"{len(directories)} runs need as many names, got {len(names)}.")
    configs, results = [], []
    for directory in map(Path, directories):
        try:
            configs.append(dict(read_json(directory / "run.json", "a run's configuration")))
            results.append(read_json(directory / "results.json", "a run's results", nan=True))
            if not isinstance(results[-1], dict) or not isinstance(results[-1].get("macs"), list):
                raise ValueError(f"its results.json holds {short(results[-1])}")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{directory} is not a finished run: {' '.join(str(error).split())}.") from error
    names = list(names) or distinct_names(configs, [Path(directory).name for directory in directories])
    groups: dict[str, Group] = {}
    for name, result, place in zip(names, results, directories, strict=True):
        group = groups.setdefault(name, Group(name, result["macs"], [], place))
        group.records.append(result)
    return list(groups.values())


def comparison(groups: Sequence[Group], field: str = "accuracy", digits: int = 2) -> str:
    """A table of a field with a row per group: mean ± standard deviation over seeds.

    Columns are numbers of networks, or depths if the groups have different numbers of networks.
    """
    widest = max(groups, key=lambda group: len(group.macs))
    same_leaves = all(group.leaves == widest.leaves[: len(group.macs)] for group in groups)
    columns = widest.leaves if same_leaves else [f"depth {depth}" for depth in range(len(widest.macs))]
    rows = []
    for group in groups:
        cells = [
            f"{mean:.{digits}f} ± {spread:.{digits}f}" if len(group.records) > 1 else f"{mean:.{digits}f}"
            for mean, spread in zip(group.mean(field), group.spread(field), strict=True)
        ]
        rows.append((group.name, *cells, *[""] * (len(columns) - len(cells))))
    return table(("", *(f"{column}" for column in columns)), rows)


def write_report(groups: Sequence[Group], directory: str | Path, cost: Cost = "macs") -> list[Path]:
    """Write a page of tables, and a picture of accuracy, of diversity, and of accuracy network by network.

    Args:
        groups: the runs.
        directory: created if missing.
        cost: on the x axis of the first two pictures; milliseconds must have been measured for all groups.

    Returns:
        The paths of `report.md`, `accuracy.png`, `diversity.png` and `leaves.png`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shown = {
        "accuracy": "Accuracy (%)",
        "nll": "Negative log-likelihood (nats)",
        "ece": "Expected calibration error",
        "std": "Standard deviation of logits over networks",
        "agreement": "Share of images for which two networks agree",
    }
    pictures = {
        "Accuracy over cost": plot_cost(groups, directory / "accuracy.png", cost=cost),
        "Diversity over cost": plot_cost(
            groups, directory / "diversity.png", "std", "standard deviation of logits over networks", cost
        ),
        "Accuracy network by network": plot_leaves(groups, directory / "leaves.png"),
    }
    parts = [
        f"## {title}\n\n{comparison(groups, field, 2 if field == 'accuracy' else 3)}" for field, title in shown.items()
    ]
    parts += [f"## {title}\n\n![{title}]({picture.name})" for title, picture in pictures.items()]
    seeds = ", ".join(f"{group.name}: {len(group.records)}" for group in groups)
    page = directory / "report.md"
    text = (
        "# Report\n\nColumns: networks evaluated; mean and standard deviation over seeds.\n\n"
        + "\n\n".join(parts)
        + f"\n\nNumber of runs: {seeds}.\n"
    )
    with replacing(page) as file:
        file.write_text(text)
    return [page, *pictures.values()]
