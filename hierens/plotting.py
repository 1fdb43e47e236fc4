"""Pictures: accuracy against cost, as the paper's figures 4 to 6 show it. Needs matplotlib (`hierens[plot]`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_accuracy(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: str | Path, title: str = ""
) -> Path:
    """Draw accuracy against multiply-accumulates, a marker per depth.

    Args:
        curves: by name (MACs, accuracies in percent), a value per depth.
        path: the picture's file; its suffix sets the format.
        title: above the axes.

    Returns:
        The path.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install 'hierens[plot]'.") from error
    figure: Any = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for (name, (macs, accuracy)), marker in zip(curves.items(), "osD^vX" * len(curves), strict=False):
        axes.plot([m / 1e6 for m in macs], accuracy, marker=marker, label=name)
    longest = max(curves.values(), key=lambda curve: len(curve[0]))
    for depth, (cost, reached) in enumerate(zip(*longest, strict=True)):
        axes.annotate(str(depth), (cost / 1e6, reached), (0, -14), textcoords="offset points", ha="center", fontsize=8)
    axes.set(xlabel="million multiply-accumulates per image (numbers: depth)", ylabel="accuracy (%)", title=title)
    axes.margins(x=0.1, y=0.15)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)
    return Path(path)
