"""Plots of accuracy and diversity over cost, as in the paper. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from hierens.core.atomic_files import replacing
from hierens.core.install import install_command

Cost = Literal["macs", "milliseconds"]
_COSTS: dict[Cost, tuple[str, float]] = {
    "macs": ("million multiply-accumulates per image", 1e6),
    "milliseconds": ("milliseconds per image", 1.0),
}
_MARKERS = "osD^vX*P"
_TOGETHER = 5  # curves that can be told apart in one panel


class Compared(Protocol):
    """Runs of one configuration, such as `hierens.evaluation.reporting.Group`."""

    @property
    def name(self) -> str:
        """Label in the legend."""

    @property
    def macs(self) -> Sequence[float]:
        """MACs of every depth."""

    @property
    def milliseconds(self) -> Sequence[float]:
        """Measured time of every depth; empty if it was not measured."""

    @property
    def leaves(self) -> Sequence[int]:
        """Networks (or exits) of every depth."""

    def mean(self, field: str) -> list[float]:
        """Mean of a field over seeds."""

    def spread(self, field: str) -> list[float]:
        """Standard deviation of a field over seeds."""


def plot_accuracy(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: str | Path, title: str = ""
) -> Path:
    """Plot accuracy over multiply-accumulates, with a marker per depth.

    Args:
        curves: (MACs, accuracies in percent) by name, with one value per depth.
        path: the file to write; its suffix sets the format.
        title: above the axes.

    Returns:
        The path.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = _figure(6.4, 4.0)
    axes = figure.add_subplot()
    for (name, (macs, accuracy)), marker in zip(curves.items(), _MARKERS * len(curves), strict=False):
        axes.plot([m / 1e6 for m in macs], accuracy, marker=marker, label=name)
    longest = max(curves.values(), key=lambda curve: len(curve[0]))
    for depth, (cost, value) in enumerate(zip(*longest, strict=True)):
        axes.annotate(str(depth), (cost / 1e6, value), (0, -14), textcoords="offset points", ha="center", fontsize=8)
    axes.set(xlabel="million multiply-accumulates per image (numbers: depth)", ylabel="accuracy (%)", title=title)
    axes.margins(x=0.1)
    reached = [value for _, accuracy in curves.values() for value in accuracy]
    pad = 0.15 * (max(reached) - min(reached)) or 0.5  # points, for curves that are level
    axes.set_ylim(min(reached) - pad, max(reached) + pad)
    _plain(axes)
    axes.legend(frameon=False, loc="lower right")
    return _saved(figure, path)


def plot_cost(
    groups: Sequence[Compared],
    path: str | Path,
    field: str = "accuracy",
    label: str = "accuracy (%)",
    cost: Cost = "macs",
) -> Path:
    """Plot a field over the cost of every depth, with error bars of one standard deviation over seeds.

    Args:
        groups: a curve each; of more than five, each has its own panel, in which the others are grey.
        path: the file to write.
        field: of `hierens.evaluation.metrics.LeafEvaluation`, with a value per depth.
        label: of the field.
        cost: on the x axis.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if len(groups) > _TOGETHER:
        figure, panels = _panels(len(groups))
        for axes, group in zip(panels, groups, strict=True):
            _curves(axes, [other for other in groups if other is not group], field, cost, color="0.85", marker="")
            _curves(axes, [group], field, cost, color="C0", zorder=3)
            axes.set_title(_wrapped(group.name, 40), fontsize=8)
        figure.supxlabel(_COSTS[cost][0], fontsize=9)
        figure.supylabel(label, fontsize=9)
    else:
        figure = _figure(6.4, 3.8 + 0.2 * len(groups))
        axes = figure.add_subplot()
        _curves(axes, groups, field, cost)
        axes.set(xlabel=_COSTS[cost][0], ylabel=label)
        figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside lower center", fontsize=8)
    return _saved(figure, path)


def plot_comparison(groups: Sequence[Compared], path: str | Path, title: str = "") -> Path:
    """Plot accuracy and standard deviation of logits over multiply-accumulates (figures 4, 5 and 6).

    Args:
        groups: a curve each, with error bars of one standard deviation over seeds.
        path: the file to write.
        title: above both panels.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = _figure(8.4, 3.9)
    panels = figure.subplots(1, 2)
    for axes, (field, label) in zip(
        panels, (("accuracy", "accuracy (%)"), ("std", "standard deviation of logits")), strict=True
    ):
        _curves(axes, groups, field, "macs")
        axes.set(xlabel=_COSTS["macs"][0], ylabel=label)
    figure.suptitle(title)
    figure.legend(
        *panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2, fontsize=8
    )
    return _saved(figure, path)


def plot_leaves(groups: Sequence[Compared], path: str | Path) -> Path:
    """Plot the accuracy of the nested ensembles as a line and of each network alone as bars (figure 9).

    Args:
        groups: a panel each.
        path: the file to write.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure, panels = _panels(len(groups))
    lowest = min(min(group.mean("leaf_accuracy") + group.mean("accuracy")) for group in groups)
    highest = max(max(group.mean("accuracy")) for group in groups)
    for axes, group in zip(panels, groups, strict=True):
        alone, ensemble = group.mean("leaf_accuracy"), group.mean("accuracy")
        axes.bar(range(1, len(alone) + 1), alone, color="0.8", label="each network alone")
        axes.plot(group.leaves, ensemble, "o-", ms=4, label="ensemble of the first networks")
        axes.set_title(_wrapped(group.name, 40), fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(lowest - 0.1 * (highest - lowest) - 0.1, highest + 0.1 * (highest - lowest) + 0.1)
        _plain(axes)
    figure.supxlabel("networks", fontsize=9)
    figure.supylabel("accuracy (%)", fontsize=9)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        frameon=False,
        loc="outside upper center",
        ncols=min(2, len(groups)),
        fontsize=8,
    )
    return _saved(figure, path)


def _curves(axes: Any, groups: Sequence[Compared], field: str, cost: Cost, **style: Any) -> None:
    scale = _COSTS[cost][1]
    for group, marker in zip(groups, _MARKERS * len(groups), strict=False):
        costs = [value / scale for value in getattr(group, cost)]
        look = {"marker": marker, "ms": 4, "capsize": 2, "lw": 1.2, "label": _wrapped(group.name, 90), **style}
        axes.errorbar(costs, group.mean(field), group.spread(field), **look)
    _plain(axes)


def _panels(count: int) -> tuple[Any, Sequence[Any]]:
    """A figure with at most three panels in a row, and the panels."""
    columns = min(3, count)
    rows = -(-count // columns)
    figure = _figure(2.7 * columns, 2.5 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _wrapped(name: str, width: int) -> str:
    return textwrap.fill(name.replace("+", " + "), width, break_on_hyphens=False)


def _saved(figure: Any, path: str | Path) -> Path:
    with replacing(path) as file:
        figure.savefig(file)
    return Path(path)


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"plots need matplotlib: {install_command('plot')}.") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")
