"""Evaluation of records: differences paired by seed with standard errors, claims of papers, Pareto fronts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

from hierens.evaluation.profiling import table
from hierens.evaluation.reporting import Group


@dataclass(frozen=True)
class Difference:
    """A mean difference over the seeds that two rows have in common.

    Attributes:
        mean: in the field's unit.
        error: its standard error; 0 for a single seed, where it is unknown.
        seeds: number of seeds.
        digits: number of decimals in the text.
    """

    mean: float
    error: float
    seeds: int
    digits: int = 2

    @property
    def clear(self) -> bool:
        """Whether it exceeds twice its standard error, with at least two seeds."""
        return self.seeds > 1 and abs(self.mean) > 2 * self.error

    def __str__(self) -> str:
        """Such as `+0.42 ± 0.10`, or `+0.42` of one seed."""
        return f"{self.mean:+.{self.digits}f}" + (f" ± {self.error:.{self.digits}f}" if self.seeds > 1 else "")


def difference(more: Group, less: Group, field: str = "accuracy") -> list[Difference]:
    """Per depth, `more` minus `less`, paired by seed; empty if no seed is in both."""
    of_less = {record["seed"]: record[field] for record in less.records}
    pairs = [(record[field], of_less[record["seed"]]) for record in more.records if record["seed"] in of_less]
    columns = zip(*([a - b for a, b in zip(p, q, strict=False)] for p, q in pairs), strict=True)
    digits = 2 if field in ("accuracy", "miou") else 3
    return [
        Difference(mean(column), stdev(column) / len(column) ** 0.5 if len(column) > 1 else 0.0, len(column), digits)
        for column in columns
    ]


def over_last(more: Group, less: Group, field: str = "accuracy") -> list[Difference]:
    """Per depth of `more`, its difference from the last depth of `less`, paired by seed."""
    ends = [{**record, field: record[field][-1:] * len(more.macs)} for record in less.records]
    return difference(more, Group(less.name, less.macs, ends), field)


def over_one(more: Group, value: float, field: str = "accuracy") -> list[Difference]:
    """Per depth of `more`, its difference from a single value, which is treated as exact."""
    constant = [{"seed": record["seed"], field: [value] * len(more.macs)} for record in more.records]
    return difference(more, Group("", more.macs, constant), field)


@dataclass(frozen=True)
class Claim:
    """A claim of a paper about two rows.

    Attributes:
        text: the claim in words.
        more: the row that should have the larger value.
        less: the row that should have the smaller value.
        at: the depths of the claim: `first`, `last` or `every`.
        field: the compared field of the records.
    """

    text: str
    more: str
    less: str
    at: Literal["first", "last", "every"] = "last"
    field: str = "accuracy"


def verdict(found: Sequence[Difference]) -> str:
    """Whether a claimed ordering holds, or is within twice the standard error."""
    if not found:
        return "not run"
    if found[0].seeds == 1:
        return "one seed"
    if all(one.mean > 0 and one.clear for one in found):
        return "yes"
    if all(one.mean < 0 and one.clear for one in found):
        return "no, the reverse"
    return "not at every depth" if any(one.clear for one in found) else "within the noise"


def verdicts(groups: Mapping[str, Group], claims: Sequence[Claim]) -> str:
    """A table of claims: the difference at each of their depths, and whether they hold."""
    rows = []
    for claim in claims:
        found: list[Difference] = []
        if claim.more in groups and claim.less in groups:
            found = difference(groups[claim.more], groups[claim.less], claim.field)
            found = {"first": found[:1], "last": found[-1:], "every": found}[claim.at]
        rows.append((claim.text, claim.at, ", ".join(map(str, found)), verdict(found)))
    return table(("claim", "depths", "difference here", "holds"), rows)


def gains(groups: Mapping[str, Group], base: str, names: Sequence[str]) -> str:
    """A table of the gains of rows over a base at each depth, and whether they are better at every depth."""
    rows = []
    for name in names:
        if name in groups and base in groups and (found := difference(groups[name], groups[base])):
            ahead = verdict(found)
            rows.append((groups[name].name, *map(str, found), f"{found[0].seeds}", ahead))
    if not rows:
        return "Not run yet."
    depths = [f"depth {depth}" for depth in range(len(rows[0]) - 3)]
    return table((f"gain over {groups[base].name}", *depths, "seeds", "better at every depth"), rows)


@dataclass(frozen=True)
class Point:
    """A depth of a row, or its result with thresholds for a mean cost.

    Attributes:
        row: the row's title.
        depth: the depth in words.
        cost: in the unit of the figure.
        accuracy: in percent, mean over seeds.
    """

    row: str
    depth: str
    cost: float
    accuracy: float


def front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front in order of cost: points for which no cheaper one has at least the same accuracy."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy)):
        if not kept or point.accuracy > kept[-1].accuracy:
            kept.append(point)
    return kept


def front_table(points: Sequence[Point], unit: str) -> str:
    """A table of the Pareto front."""
    rows = [(f"{p.cost:.2f}", f"{p.accuracy:.2f}", p.row, p.depth) for p in front(points)]
    return table((unit, "accuracy (%)", "network", "depth"), rows)
