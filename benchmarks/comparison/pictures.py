"""Figures of the results pages that hierens itself does not draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from comparison.differences import Point

_MARKERS = "os^Dv*XPph<>"


def draw_costs(panels: Mapping[str, Mapping[str, Sequence[Point]]], path: Path) -> Path:
    """Plot accuracy against several costs, with a panel for each; the line of the first row is thicker.

    Args:
        panels: the points of every row, by the label of the cost axis.
        path: the file of the figure.
    """
    figure = Figure(figsize=(4.6 * len(panels), 4.6), dpi=130, layout="constrained")
    axes_of = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(points[0].row for rows in panels.values() for points in rows.values() if points))
    style = {name: (f"C{index % 10}", _MARKERS[index % len(_MARKERS)]) for index, name in enumerate(names)}
    for axes, (label, rows) in zip(axes_of, panels.items(), strict=True):
        for points in rows.values():
            if points:
                color, marker = style[points[0].row]
                axes.plot(
                    [p.cost for p in points],
                    [p.accuracy for p in points],
                    color=color,
                    marker=marker,
                    ms=5,
                    lw=2.2 if points[0].row == names[0] else 1.2,
                    label=points[0].row,
                )
        axes.set(xlabel=label, xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    axes_of[0].set_ylabel("accuracy (%)")
    handles = {text: handle for axes in axes_of for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), frameon=False, loc="outside lower center", ncols=1 + len(panels), fontsize=8
    )
    figure.savefig(path)
    return path
