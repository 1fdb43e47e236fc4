"""What finished runs gave, side by side: runs that differ in their seed alone are averaged.

The paper's figures 4, 5 and 6 show accuracy and diversity against cost, figure 9 accuracy against the number of
networks with each network's own as bars.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hierens.core.atomic_files import replacing
from hierens.core.json_files import read_json, short
from hierens.core.tree import nested_sizes
from hierens.evaluation.plotting import plot_comparison, plot_leaves
from hierens.evaluation.profiling import table

_PLACES = ("seed", "output_dir", "resume", "workers", "data_dir", "trackers", "cpu")  # not what a run is


@dataclass(frozen=True)
class Group:
    """Runs of one configuration on several seeds.

    Attributes:
        name: what sets it apart from the other groups.
        macs: of every depth.
        records: per seed, the last validation's record, as `hierens.evaluation.metrics.LeafEvaluation`.
    """

    name: str
    macs: list[float]
    records: list[dict[str, Any]]

    @property
    def leaves(self) -> list[int]:
        """Networks (or exits) of every depth."""
        record = self.records[0]
        return list(record.get("leaves") or nested_sizes(len(record["leaf_accuracy"])))  # older runs were trees

    def mean(self, field: str) -> list[float]:
        """Of a field, per depth (or leaf), over seeds."""
        return [statistics.mean(values) for values in zip(*(r[field] for r in self.records), strict=True)]

    def spread(self, field: str) -> list[float]:
        """The standard deviation over seeds, 0 for a single one."""
        columns = list(zip(*(r[field] for r in self.records), strict=True))
        return [statistics.stdev(values) if len(values) > 1 else 0.0 for values in columns]


def read_runs(directories: Sequence[str | Path], names: Sequence[str] = ()) -> list[Group]:
    """Group finished runs by their configuration.

    Args:
        directories: `output_dir` of each run.
        names: what each run is to be called, by default by the fields in which they differ; equal names are averaged.

    Raises:
        ValueError: a directory without results, or as many names as directories are not given.
    """
    if names and len(names) != len(directories):
        raise ValueError(f"{len(directories)} runs need as many names, got {len(names)}.")
    configs, results = [], []
    for directory in map(Path, directories):
        try:
            configs.append(_flat(read_json(directory / "run.json", "a run's configuration")))
            results.append(read_json(directory / "results.json", "a run's results", nan=True))
            if not isinstance(results[-1], dict) or not isinstance(results[-1].get("macs"), list):
                raise ValueError(f"its results.json holds {short(results[-1])}")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{directory} is no finished run: {' '.join(str(error).split())}.") from error
    names = list(names) or _told_apart(configs, [Path(directory).name for directory in directories])
    groups: dict[str, Group] = {}
    for name, result in zip(names, results, strict=True):
        group = groups.setdefault(name, Group(name, result["macs"], []))
        group.records.append(result)
    return list(groups.values())


def comparison(groups: Sequence[Group], field: str = "accuracy", digits: int = 2) -> str:
    """A table of a field: a row per group, mean ± standard deviation over seeds.

    Columns are numbers of networks, or depths where groups differ in these.
    """
    widest = max(groups, key=lambda group: len(group.macs))
    alike = all(group.leaves == widest.leaves[: len(group.macs)] for group in groups)
    columns = widest.leaves if alike else [f"depth {depth}" for depth in range(len(widest.macs))]
    rows = []
    for group in groups:
        cells = [
            f"{mean:.{digits}f} ± {spread:.{digits}f}" if len(group.records) > 1 else f"{mean:.{digits}f}"
            for mean, spread in zip(group.mean(field), group.spread(field), strict=True)
        ]
        rows.append((group.name, *cells, *[""] * (len(columns) - len(cells))))
    return table(("", *(f"{column}" for column in columns)), rows)


def write_report(groups: Sequence[Group], directory: str | Path) -> Path:
    """Write `report.md` with tables, `accuracy.png` (figures 4 to 6) and `leaves.png` (figure 9).

    Returns:
        The page's path.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    plot_comparison(groups, directory / "accuracy.png")
    plot_leaves(groups, directory / "leaves.png")
    shown = {
        "accuracy": "Accuracy (%)",
        "nll": "Negative log-likelihood (nats)",
        "ece": "Expected calibration error",
        "std": "Standard deviation of logits over networks",
        "agreement": "Share of images on which two networks agree",
    }
    parts = [
        f"## {title}\n\n{comparison(groups, field, 2 if field == 'accuracy' else 3)}" for field, title in shown.items()
    ]
    seeds = ", ".join(f"{group.name}: {len(group.records)}" for group in groups)
    page = directory / "report.md"
    text = (
        "# Report\n\nColumns: networks evaluated; mean and standard deviation over seeds.\n\n"
        + "\n\n".join(parts)
        + "\n\n![Accuracy and diversity against cost](accuracy.png)\n\n![Single networks](leaves.png)\n\n"
        + f"Runs: {seeds}.\n"
    )
    with replacing(page) as file:
        file.write_text(text)
    return page


def _told_apart(configs: Sequence[Mapping[str, str]], directories: Sequence[str]) -> list[str]:
    """Names made of the fields in which runs differ; a run that differs in nothing goes by its directory."""
    fields = dict.fromkeys(field for config in configs for field in config)
    differing = [f for f in fields if len({config.get(f) for config in configs}) > 1]
    if not differing:
        return [directories[0]] * len(configs) if len(configs) > 1 else list(directories)
    return [", ".join(f"{f.rpartition('.')[2]}={config.get(f, '-')}" for f in differing) for config in configs]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        elif name not in _PLACES:
            flat[prefix + name] = json.dumps(value).strip('"')
    return flat
