"""HTML of a prediction and a drawing of the tree, for app.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from hierens.core.tree import Tree

_MOST_DRAWN = 256  # leaves
_ALL_BARS, _FEW_BARS = 12, 8  # up to 12 classes are shown in order; of more, the 8 most probable
_WIDTH, _ROW, _MARGIN = 560, 46, 14


@dataclass(frozen=True)
class Answer:
    """The prediction of the first networks for one image.

    Attributes:
        probabilities: probability of every class, from the ensemble of these networks.
        votes: the class predicted by each network.
        macs: multiply-accumulates used.
        full_macs: multiply-accumulates of the whole tree.
        milliseconds: computing time.
        walking: whether the networks are evaluated one by one.
    """

    probabilities: Sequence[float]
    votes: Sequence[int]
    macs: int
    full_macs: int
    milliseconds: float
    walking: bool = False

    @property
    def best(self) -> int:
        """The predicted class."""
        return max(range(len(self.probabilities)), key=self.probabilities.__getitem__)


def page(answer: Answer, tree: Tree, names: Sequence[str]) -> str:
    """The right-hand side of the page: prediction, cost, tree and probabilities."""
    networks, agreeing = len(answer.votes), sum(vote == answer.best for vote in answer.votes)
    share = answer.macs / answer.full_macs
    tiles = (
        ("Networks", f"{networks}", f"of {tree.leaves}", networks / tree.leaves),
        ("MACs", quantity(answer.macs), f"{100 * share:.0f} % of the tree", share),
        ("Time", f"{answer.milliseconds:.1f} ms", "to compute", None),
        ("Agreement", f"{agreeing} of {networks}", "predict this class", agreeing / networks),
    )
    facts = f'data-networks="{networks}" data-macs="{answer.macs}" data-answer="{escape(names[answer.best])}"'
    return f"""<div class="hne" id="answer" {facts} data-walking="{int(answer.walking)}">
<div class="hne-answer" aria-live="polite"><span>{escape(names[answer.best])}</span>
<small>{percent(answer.probabilities[answer.best])}</small></div>
<div class="hne-tiles">{"".join(_tile(*tile) for tile in tiles)}</div>
{drawing(tree, answer, names)}
<div class="hne-bars">{_bars(answer, names)}</div>
</div>"""


def placeholder(tree: Tree) -> str:
    """The right-hand side of the page before the first image."""
    return f"""<div class="hne" id="answer" data-networks="0">
<div class="hne-answer hne-quiet"><span>Drop an image</span></div>
<p class="hne-hint">{tree.leaves} networks share one tree. The first one predicts at a fraction of the cost; every
further one improves the prediction.</p>{drawing(tree)}</div>"""


def drawing(tree: Tree, answer: Answer | None = None, names: Sequence[str] = ()) -> str:
    """The tree as an inline SVG, with the image at its root and the evaluated branches highlighted."""
    if tree.leaves > _MOST_DRAWN:
        return ""
    networks = len(answer.votes) if answer else 0
    lit = tree.widths(networks) if networks else (0,) * tree.levels
    newest = networks - 1 if answer and answer.walking else -1
    radius = min(8.0, 0.3 * _WIDTH / tree.leaves)
    xs = [[_centre(tree, level, branch) for branch in range(tree.width(level))] for level in range(tree.levels)]
    top = _WIDTH / 2
    edges, nodes = [], [f'<rect class="on" x="{top - 7}" y="{_MARGIN - 7}" width="14" height="14" rx="3"/>']
    for level, row in enumerate(xs):
        y = _MARGIN + (level + 1) * _ROW
        for branch, x in enumerate(row):
            state = "on" if branch < lit[level] else "off"
            if newest >= 0 and newest // tree.span(level) == branch:
                state = "on new"
            start = xs[level - 1][tree.parent(level, branch)] if level else top
            middle = y - _ROW / 2
            curve = f"M{start:.1f} {y - _ROW} C{start:.1f} {middle} {x:.1f} {middle} {x:.1f} {y}"
            edges.append((state, f'<path class="{state}" d="{curve}"/>'))
            nodes.append(_node(x, y, radius, state, level == tree.levels - 1, branch, answer, names))
    height = 2 * _MARGIN + tree.levels * _ROW
    lines = "".join(path for _, path in sorted(edges, key=lambda edge: ("off", "on", "on new").index(edge[0])))
    label = f"a tree of {tree.leaves} networks, {networks} of them evaluated"
    key = f"<p class='hne-key'>{_key(answer, names)}</p>" if answer else ""
    return (
        f'<svg class="hne-tree" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">'
        f"{lines}{''.join(nodes)}</svg>{key}"
    )


def quantity(macs: int) -> str:
    """Multiply-accumulates with three digits and a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if macs >= size:
            return f"{macs / size:.3g} {unit}"
    return str(macs)


def percent(share: float) -> str:
    """A probability in percent."""
    return "&gt; 99.9 %" if share > 0.999 else f"{100 * share:.1f} %"


def _centre(tree: Tree, level: int, branch: int) -> float:
    """The horizontal position of a branch: the centre of its leaves."""
    span = tree.span(level)
    first, last = branch * span, min((branch + 1) * span, tree.leaves)
    return (first + last) / 2 * _WIDTH / tree.leaves


def _node(
    x: float, y: float, radius: float, state: str, leaf: bool, branch: int, answer: Answer | None, names: Sequence[str]
) -> str:
    if not leaf or answer is None or state == "off":
        return f'<circle class="{state}" cx="{x:.1f}" cy="{y}" r="{radius if leaf else 0.6 * radius:.1f}"/>'
    vote = answer.votes[branch]
    said = f"<title>network {branch + 1}: {escape(names[vote])}</title>"
    if vote == answer.best:
        return f'<circle class="{state}" cx="{x:.1f}" cy="{y}" r="{radius:.1f}">{said}</circle>'
    corners = f"M{x:.1f} {y - 1.2 * radius:.1f} l{1.2 * radius:.1f} {1.2 * radius:.1f} "
    corners += f"l{-1.2 * radius:.1f} {1.2 * radius:.1f} l{-1.2 * radius:.1f} {-1.2 * radius:.1f} z"
    return f'<path class="{state} other" d="{corners}">{said}</path>'


def _key(answer: Answer, names: Sequence[str]) -> str:
    others = sorted({vote for vote in answer.votes if vote != answer.best})
    said = ", ".join(escape(names[vote]) for vote in others[:3]) + (", ..." if len(others) > 3 else "")
    mine = f'<span><i class="dot"></i>{escape(names[answer.best])}</span>'
    return mine + (f'<span><i class="dot other"></i>{said}</span>' if others else "")


def _tile(title: str, value: str, note: str, share: float | None) -> str:
    meter = "" if share is None else f'<div class="hne-meter"><div style="width:{100 * share:.1f}%"></div></div>'
    return f"<div><h4>{title}</h4><b>{value}</b><small>{note}</small>{meter}</div>"


def _bars(answer: Answer, names: Sequence[str]) -> str:
    classes = list(range(len(names)))
    if len(classes) > _ALL_BARS:
        classes = sorted(classes, key=lambda c: -answer.probabilities[c])[:_FEW_BARS]
    return "".join(
        f'<div class="hne-bar{" best" if c == answer.best else ""}"><span title="{escape(names[c])}">'
        f"{escape(names[c])}</span>"
        f'<div><div style="width:{100 * answer.probabilities[c]:.2f}%"></div></div>'
        f"<em>{percent(answer.probabilities[c])}</em></div>"
        for c in classes
    )
