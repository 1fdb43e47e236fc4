"""The tree's arithmetic against brute force and the paper's closed forms."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hierens.core.tree import Tree, nested_sizes

branchings = st.lists(st.integers(1, 4), min_size=1, max_size=5).map(tuple)


@given(st.integers(1, 7), st.data())
def test_widths_follow_the_papers_formula(blocks, data):
    tree, last = Tree.binary(blocks), blocks - 1
    depth = data.draw(st.integers(0, last))
    expected = tuple(max(1, 2 ** (level - (last - depth))) for level in range(blocks))
    assert tree.widths(tree.leaves_at(depth)) == expected


@given(branchings, st.data())
def test_widths_are_the_branches_on_the_leaves_paths(branching, data):
    tree = Tree(branching)
    leaves = data.draw(st.integers(1, tree.leaves))
    for level in range(tree.levels):
        reached = set()
        for leaf in range(leaves):
            branch = leaf
            for below in range(tree.levels - 1, level, -1):
                branch = tree.parent(below, branch)
            reached.add(branch)
        assert reached == set(range(tree.width(level, leaves)))


@given(branchings)
def test_depth_first_walk_computes_each_branch_once(branching):
    tree = Tree(branching)
    computed = [0] * tree.levels
    for leaf in range(tree.leaves):
        for level in range(tree.first_new_level(leaf), tree.levels):
            assert leaf // tree.span(level) == computed[level]
            computed[level] += 1
    assert tuple(computed) == tree.widths()


@pytest.mark.parametrize("blocks", range(1, 8))
def test_costs_are_equations_6_to_8(blocks):
    tree, last, unit = Tree.binary(blocks), blocks - 1, 3.0
    hne, independent = tree.cost([unit] * blocks), tree.independent_cost([unit] * blocks)
    assert hne == (2 ** (last + 1) - 1) * unit
    assert independent == (last + 1) * 2**last * unit
    assert math.isclose(hne / independent, 2 / (last + 1) - 1 / ((last + 1) * 2**last))


@given(st.integers(1, 300))
def test_nested_sizes_double_up_to_all(leaves):
    sizes = nested_sizes(leaves)
    assert sizes[0] == 1 and sizes[-1] == leaves
    assert all(big == min(2 * small, leaves) and big > small for small, big in pairwise(sizes))


def test_prefix_keeps_widths():
    tree = Tree.binary(4)
    assert tree.prefix(5).widths() == tree.widths(5) == (1, 2, 3, 5)
    assert tree.prefix(5).depths == 4 and tree.prefix(5).leaves_at(3) == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Tree.binary(0), "blocks must be at least 1, got 0"),
        (lambda: Tree(()), "one per level"),
        (lambda: Tree((1, 0)), r"got \(1, 0\)"),
        (lambda: Tree((1, 2.0)), "integers"),
        (lambda: Tree((1, 2), 3), "from 1 to 2"),
        (lambda: Tree.binary(3).leaves_at(depth=3), "depth must be from 0 to 2 for 4 leaves, got 3"),
        (lambda: Tree.binary(3).leaves_at(depth=-1), "got -1"),
        (lambda: Tree.binary(3).leaves_at(leaves=5), "leaves must be from 1 to 4, got 5"),
        (lambda: Tree.binary(3).leaves_at(leaves=0), "got 0"),
        (lambda: Tree.binary(3).leaves_at(depth=1, leaves=2), "not both"),
    ],
)
def test_bad_requests_say_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
