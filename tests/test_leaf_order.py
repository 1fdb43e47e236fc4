"""Reordered siblings: the chosen order against brute force, whole sub-trees moved, the full ensemble as it was."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from hierens.core.modes import evaluating
from hierens.core.tree import nested_sizes
from support.networks import independent_tree

TREES = [(1, 2, 2), (1, 3, 2), (3, 2, 1), (1, 1, 5)]


@pytest.fixture
def loader():
    generator = torch.Generator().manual_seed(9)
    return [
        (torch.randn(n, 1, 32, 32, generator=generator), torch.randint(10, (n,), generator=generator))
        for n in (13, 13, 6)
    ]


def leaf_logits(model, loader):
    with torch.no_grad(), evaluating(model):
        return torch.cat([model(images, reduce=False) for images, _ in loader])


def cross_entropies(logits, loader):
    """By definition: of the mean of the first n leaves, for n = 1..N."""
    targets = torch.cat([target for _, target in loader])
    return [float(F.cross_entropy(logits[:, : n + 1].mean(1), targets)) for n in range(logits.shape[1])]


def below_full(entropies, leaves):
    return sum(entropies[n - 1] for n in nested_sizes(leaves)[:-1])


def legal_orders(tree):
    """Every order of the leaves that permuting whole sub-trees can reach."""

    def orders(level, branch):
        if level == tree.levels:
            return [[branch]]
        factor = tree.branching[level]
        return [
            [leaf for part in parts for leaf in part]
            for children in itertools.permutations(range(branch * factor, (branch + 1) * factor))
            for parts in itertools.product(*(orders(level + 1, child) for child in children))
        ]

    return orders(0, 0)


@pytest.mark.parametrize("branching", TREES)
def test_leaves_move_as_said_and_nothing_else_changes(small_backbone, loader, branching):
    model = independent_tree(small_backbone, branching=branching, looped={}).train()
    before = leaf_logits(model, loader)
    report = model.reorder(loader)
    after = leaf_logits(model, loader)
    leaves = model.tree.leaves
    assert model.training and sorted(report.order) == list(range(leaves))
    assert list(report.order) in legal_orders(model.tree)
    assert torch.allclose(after, before[:, list(report.order)], atol=1e-5)
    assert torch.allclose(after.mean(1), before.mean(1), atol=1e-5)
    for logits, claimed, accuracy in (
        (before, report.cross_entropy_before, report.accuracy_before),
        (after, report.cross_entropy_after, report.accuracy_after),
    ):
        entropies = cross_entropies(logits, loader)
        targets = torch.cat([target for _, target in loader])
        for depth, n in enumerate(nested_sizes(leaves)):
            assert claimed[depth] == pytest.approx(entropies[n - 1], abs=1e-5)
            right = (logits[:, :n].mean(1).argmax(-1) == targets).double().mean()
            assert accuracy[depth] == pytest.approx(100 * float(right))


@pytest.mark.parametrize(("branching", "seed"), [((1, 2, 2), 1), ((1, 2, 2), 2), ((2, 2, 2), 1)])
def test_in_binary_trees_no_order_has_better_depths(small_backbone, loader, branching, seed):
    model = independent_tree(small_backbone, seed=seed, branching=branching, looped={})
    before = leaf_logits(model, loader)
    report = model.reorder(loader)
    leaves = model.tree.leaves
    reached = cross_entropies(before[:, list(report.order)], loader)
    possible = [below_full(cross_entropies(before[:, order], loader), leaves) for order in legal_orders(model.tree)]
    assert below_full(reached, leaves) == pytest.approx(min(possible), abs=1e-6)
    assert max(possible) > min(possible) + 1e-4


def test_reordering_helps_and_a_second_time_changes_nothing(small_backbone, loader):
    gains = []
    for seed in range(3):
        model = independent_tree(small_backbone, seed=seed, blocks=3, looped={})
        first = model.reorder(loader)
        gains.append(sum(first.cross_entropy_before[:-1]) - sum(first.cross_entropy_after[:-1]))
        second = model.reorder(loader)
        assert second.cross_entropy_after == pytest.approx(first.cross_entropy_after, abs=1e-5)
    assert min(gains) >= 0 and max(gains) > 1e-3


def test_further_prefixes_are_greedy(small_backbone, loader):
    """In a tree of one level every order is legal, so that each next leaf must be the best of all that are left."""
    model = independent_tree(small_backbone, branching=(1, 1, 6), looped={})
    model.reorder(loader)
    logits, targets = leaf_logits(model, loader), torch.cat([target for _, target in loader])
    for n in range(1, 6):
        rest = [float(F.cross_entropy(logits[:, [*range(n), k]].mean(1), targets)) for k in range(n, 6)]
        assert rest[0] == pytest.approx(min(rest), abs=1e-6)


@pytest.mark.parametrize(("branching", "leaves"), [((1, 2, 2), 3), ((1, 2, 4), 7), ((3, 2, 2), 7), ((1, 1, 6), 5)])
def test_trimmed_trees_permute_what_is_whole(small_backbone, loader, branching, leaves):
    model = independent_tree(small_backbone, seed=1, branching=branching, leaves=leaves, looped={})
    before = leaf_logits(model, loader)
    report = model.reorder(loader)
    assert torch.allclose(leaf_logits(model, loader), before[:, list(report.order)], atol=1e-5)
    assert sorted(report.order) == list(range(leaves))
    span = math.prod(branching[2:])
    if whole := leaves // span * span:
        assert set(report.order[:whole]) == set(range(whole)), "the branch that lost leaves stays last"


def test_statistics_move_with_their_branches(small_backbone, loader):
    model = independent_tree(small_backbone, seed=4, blocks=3, looped={})
    before = torch.stack([branch.get_buffer("layer3.0.bn1.running_mean") for branch in model.levels[2]])
    report = model.reorder(loader)
    assert not torch.equal(before[0], before[1])
    after = torch.stack([branch.get_buffer("layer3.0.bn1.running_mean") for branch in model.levels[2]])
    assert torch.equal(after, before[list(report.order)])


def test_the_report_is_a_table(small_independent, loader):
    report = small_independent.reorder(loader)
    lines = str(report).splitlines()
    assert len(lines) == 2 + 3 and f"{report.cross_entropy_after[0]:.4f}" in lines[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batches: [], "the loader gave no images"),
        (
            lambda batches: [(x, F.one_hot(y, 10).float()) for x, y in batches],
            r"class indices \(13,\), got torch.float",
        ),
        (lambda batches: [(x, y + 5) for x, y in batches], "class indices from 0 to 9, got"),
        (lambda batches: [(x, y[:3]) for x, y in batches], r"class indices \(13,\), got torch.int64 of shape \(3,\)"),
        (lambda batches: [(x * float("nan"), y) for x, y in batches], "not finite"),
        (lambda batches: [(x[:, :0], y) for x, y in batches], "expected images"),
    ],
)
def test_bad_data_is_refused_and_the_model_left_alone(small_independent, loader, change, message):
    model = small_independent
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.reorder(change(loader))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_without_a_classifier_there_is_nothing_to_order(small_independent, loader):
    model = small_independent
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="reordering needs classes"):
        model.reorder(loader)
