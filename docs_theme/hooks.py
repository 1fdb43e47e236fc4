"""Additions of the site to MkDocs: formulas as MathML and Mermaid graphs as SVG, made when it is built.

Pages therefore load nothing from elsewhere. GitHub shows both in the same files by itself: `$...$`, and fences of
`math` and `mermaid`.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor

_DOLLARS = r"(?<![\\$\w])\$(?=\S)([^$`]+?)(?<=\S)\$(?![$\w])"
_HEIGHT, _ROW, _COLUMN = 30, 66, 132  # of a box; of a row and a column with the space between


class _InlineFormula(InlineProcessor):
    def handleMatch(self, match: re.Match[str], data: str) -> tuple[str, int, int]:  # noqa: N802
        formula = convert(" ".join(match[1].split()))
        return self.md.htmlStash.store(formula), match.start(0), match.end(0)


class _Formulas(Extension):
    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        # After code in backticks (190), before backslashes are read as escapes (180).
        md.inlinePatterns.register(_InlineFormula(_DOLLARS, md), "formula", 185)


def on_config(config: Any) -> Any:
    """Register the formulas and the graphs."""
    config.markdown_extensions.append(_Formulas())
    fences = {"math": _math, "mermaid": _graph}
    config.mdx_configs["pymdownx.superfences"] = {
        "custom_fences": [{"name": name, "class": name, "format": form} for name, form in fences.items()]
    }
    return config


def _math(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="formula">{convert(source.strip(), display="block")}</div>'


def _graph(source: str, *_: Any, **__: Any) -> str:
    """An SVG of a Mermaid graph that consists of lines `a --> b`: each node below all that lead to it.

    Raises:
        ValueError: a line is something else.
    """
    head, *lines = source.strip().splitlines()
    edges = [tuple(line.strip().split(" --> ")) for line in lines]
    if head != "graph TD" or any(len(edge) != 2 for edge in edges):
        raise ValueError(
            "graphs on pages consist of `graph TD` and lines `a --> b`: docs_theme/hooks.py draws no others."
        )
    into = {name: [a for a, b in edges if b == name] for name in dict.fromkeys(sum(edges, ()))}

    def row(name: str) -> int:
        return 1 + max(map(row, into[name]), default=-1)

    rows: dict[int, list[str]] = {}
    for name in list(into):
        rows.setdefault(row(name), []).append(name)
    routes = []
    for a, b in edges:  # a place in every row between, so that lines do not cross boxes
        between = [f"{a} {b} {depth}" for depth in range(row(a) + 1, row(b))]
        for name, before in zip(between, [a, *between], strict=False):
            rows[row(before) + 1].append(name)
            into[name] = [before]
        routes.append([a, *between, b])
    width = _COLUMN * max(map(len, rows.values()))
    at: dict[str, tuple[float, float]] = {}
    for depth in sorted(rows):  # each row in the order of what leads to it
        names = sorted(rows[depth], key=lambda name: sum(at[a][0] for a in into[name]) / max(len(into[name]), 1))
        for i, name in enumerate(names):
            at[name] = (width * (i + 0.5) / len(names), depth * _ROW + _HEIGHT / 2)
    drawn = [_line([at[name] for name in route]) for route in routes]
    for name in dict.fromkeys(sum(edges, ())):
        x, y = at[name]
        box = f'<rect x="{x - 50:.0f}" y="{y - _HEIGHT / 2:.0f}" width="100" height="{_HEIGHT}" rx="5"/>'
        drawn.append(f'{box}<text x="{x:.0f}" y="{y + 5:.0f}">{escape(name)}</text>')
    said = escape("; ".join(f"{a} to {b}" for a, b in edges))
    height = max(rows) * _ROW + _HEIGHT
    box = f'viewBox="-2 -2 {width + 4} {height + 4}" style="max-width: {width}px"'
    return f'<svg class="graph" role="img" aria-label="{said}" {box}>{"".join(drawn)}</svg>'


def _line(places: list[tuple[float, float]]) -> str:
    """A line from below the first place to above the last, with an arrowhead."""
    (x, y), half, bend = places[0], _HEIGHT / 2, 0.6 * (_ROW - _HEIGHT)
    path = f"M{x:.0f} {y + half:.0f}"
    for to_x, to_y in places[1:]:
        path += f"C{x:.0f} {y + half + bend:.0f} {to_x:.0f} {to_y - half - bend:.0f} {to_x:.0f} {to_y - half:.0f}"
        path += f"V{to_y + half:.0f}" if (to_x, to_y) != places[-1] else "l-4 -7m4 7l4 -7"
        x, y = to_x, to_y
    return f'<path d="{path}"/>'
