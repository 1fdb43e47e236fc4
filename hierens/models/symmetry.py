"""Finds branches that are copies of each other, and makes them differ.

Leaves with equal weights in all levels get the same gradients, so training would never make them differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hierens.branches.level import Level
from hierens.branches.light import SCALES, factor_names
from hierens.core.tree import Tree


@torch.no_grad()
def originals(level: Level) -> list[int]:
    """For each branch the index of the first branch of its level with equal parameters, which may be its own.

    Of light branches, vectors other than scales are not compared: different biases do not make networks differ.
    """
    if level.branches == 1:
        return [0]
    states = [dict(branch.named_parameters()) for branch in level]
    if level.light:
        names = factor_names(level[0], SCALES)
        states = [{n: p for n, p in state.items() if p.ndim > 1 or n in names} for state in states]
    first: list[int] = []
    for branch, state in enumerate(states):
        known = (k for k in range(branch) if first[k] == k)
        same = (k for k in known if all(torch.equal(states[k][name], value) for name, value in state.items()))
        first.append(next(same, branch))
    return first


def symmetric(tree: Tree, levels: Sequence[Level]) -> bool:
    """Whether any two leaves have equal parameters in all levels, or branches of a light level have equal factors.

    Args:
        tree: the arithmetic of the tree.
        levels: the levels of the tree, then those with a copy per leaf (head, classifier).
    """
    if any(level.light and len(set(originals(level))) < level.branches for level in levels):
        return True
    paths: list[tuple[int, ...]] = [()] * tree.leaves
    for index, level in reversed(list(enumerate(levels))):
        first, span = originals(level), tree.span(index) if index < tree.levels else 1
        paths = [(*path, first[leaf // span]) for leaf, path in enumerate(paths)]
        if len(set(paths)) == tree.leaves:
            return False
    return True


@torch.no_grad()
def break_symmetry(levels: Sequence[Level], noise: float, seed: int, signs: bool = False) -> None:
    """Add Gaussian noise to every branch that is a copy of an earlier branch of its level.

    Args:
        levels: all levels, including head and classifier.
        noise: in standard deviations of each weight over the branches of its level except the first; for the scales r
            and s of light layers, their standard deviation from 1.
        seed: for the noise.
        signs: give these scales random signs instead, as BatchEnsemble does.
    """
    generator = torch.Generator().manual_seed(seed)
    for level in levels:
        copied = torch.tensor([branch != first for branch, first in enumerate(originals(level))][1:])
        if level.branches == 1:
            continue
        scales = factor_names(level[0], SCALES)
        for named in zip(*(branch.named_parameters() for branch in level), strict=True):
            name, parameters = named[0][0], [parameter for _, parameter in named]
            if (parameters[0].ndim < 2 and name not in scales) or parameters[0] is parameters[1]:
                continue
            rest = torch.stack(parameters[1:])
            drawn = torch.randn(rest.shape, generator=generator).to(rest)
            chosen = copied.to(rest.device).view(-1, *(1,) * (rest.ndim - 1))
            if name not in scales:
                new = rest + drawn * chosen * noise * rest.std()
            elif signs:
                new = rest * torch.where(chosen, drawn.sign(), 1)
            else:
                new = rest * (1 + drawn * chosen * noise)
            for parameter, value in zip(parameters[1:], new, strict=True):
                parameter.copy_(value)
