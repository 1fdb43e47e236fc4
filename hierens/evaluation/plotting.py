"""Plots of accuracy and diversity over cost, as in the paper. Needs matplotlib (`hierens[plot]`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hierens.core.atomic_files import replacing

_MARKERS = "osD^vX*P"


class Compared(Protocol):
    """Runs of one configuration, such as `hierens.evaluation.reporting.Group`."""

    @property
    def name(self) -> str:
        """Label in the legend."""

    @property
    def macs(self) -> Sequence[float]:
        """MACs of every depth."""

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
    for depth, (cost, percent) in enumerate(zip(*longest, strict=True)):
        axes.annotate(str(depth), (cost / 1e6, percent), (0, -14), textcoords="offset points", ha="center", fontsize=8)
    axes.set(xlabel="million multiply-accumulates per image (numbers: depth)", ylabel="accuracy (%)", title=title)
    axes.margins(x=0.1)
    reached = [accuracy for _, accuracies in curves.values() for accuracy in accuracies]
    pad = 0.15 * (max(reached) - min(reached)) or 0.5  # points, for curves that are level
    axes.set_ylim(min(reached) - pad, max(reached) + pad)
    _plain(axes)
    axes.legend(frameon=False, loc="lower right")
    with replacing(path) as file:
        figure.savefig(file)
    return Path(path)


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
        for group, marker in zip(groups, _MARKERS * len(groups), strict=False):
            millions = [macs / 1e6 for macs in group.macs]
            axes.errorbar(
                millions,
                group.mean(field),
                group.spread(field),
                marker=marker,
                ms=4,
                capsize=2,
                lw=1.2,
                label=group.name,
            )
        axes.set(xlabel="million multiply-accumulates per image", ylabel=label)
        _plain(axes)
    figure.suptitle(title)
    figure.legend(
        *panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2, fontsize=8
    )
    with replacing(path) as file:
        figure.savefig(file)
    return Path(path)


def plot_leaves(groups: Sequence[Compared], path: str | Path) -> Path:
    """Plot the accuracy of the nested ensembles as a line and of each network alone as bars (figure 9).

    Args:
        groups: a panel each.
        path: the file to write.

    Raises:
        ValueError: matplotlib is not installed.
    """
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure = _figure(2.7 * columns, 2.5 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    lowest = min(min(group.mean("leaf_accuracy") + group.mean("accuracy")) for group in groups)
    highest = max(max(group.mean("accuracy")) for group in groups)
    for axes, group in zip(panels, groups, strict=False):
        alone, ensemble = group.mean("leaf_accuracy"), group.mean("accuracy")
        axes.bar(range(1, len(alone) + 1), alone, color="0.8", label="each network alone")
        axes.plot(group.leaves, ensemble, "o-", ms=4, label="ensemble of the first networks")
        axes.set_title(group.name, fontsize=9)
        axes.set_ylim(lowest - 0.1 * (highest - lowest) - 0.1, highest + 0.1 * (highest - lowest) + 0.1)
        _plain(axes)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    figure.supxlabel("networks", fontsize=9)
    figure.supylabel("accuracy (%)", fontsize=9)
    figure.legend(
        *panels[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=2, fontsize=8
    )
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
        raise ValueError("plots need matplotlib: pip install 'hierens[plot]'.") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")
