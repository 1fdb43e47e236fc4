"""Gradient equilibrium: every branch or block gets the mean, not the sum, of what leaves or exits send."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F

import hierens
from hierens.core.equilibrium import scale_gradient
from hierens.objectives import Objective


def gradients(model, images, labels, equilibrium):
    model.gradient_equilibrium = equilibrium
    model.zero_grad()
    Objective()(model(images, reduce=False), labels, prediction_weights=model.prediction_weights).backward()
    return [{name: p.grad.clone() for name, p in level.named_parameters()} for level in model.all_levels()]


@pytest.mark.parametrize("executor", ["looped", "grouped"])
@pytest.mark.parametrize("branching", [(1, 2, 2), (1, 4, 1), (2, 1, 3)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_levels_gradient_is_divided_by_the_leaves_below_a_branch(executor, branching, checkpointing):
    torch.manual_seed(0)
    backbone = timm.create_model("resnet8_cifar", channels=(4, 8, 8), in_chans=1)
    model = hierens.hierensify(backbone, branching=branching, init="reinit", looped={}).double().train()
    model.set_executor(executor)
    model.set_grad_checkpointing(checkpointing)
    images, labels = torch.randn(4, 1, 12, 12, dtype=torch.float64), torch.randint(10, (4,))
    plain, even = (gradients(model, images, labels, equilibrium) for equilibrium in (False, True))
    for index, (before, after) in enumerate(zip(plain, even, strict=True)):
        below = model.tree.span(index) if index < model.tree.levels else 1
        for name in before:
            assert torch.allclose(after[name] * below, before[name], rtol=1e-9, atol=1e-12), (index, name)


@pytest.mark.parametrize("executor", ["looped", "grouped"])
@pytest.mark.parametrize("branching", [(1, 2, 2), (1, 4, 1), (2, 1, 3)])
@pytest.mark.parametrize("leaves", [1, 2, 4, None])
@pytest.mark.parametrize("exits", [False, True], ids=["tree", "with exits"])
def test_every_branch_gets_the_mean_over_the_answers_behind_it(executor, branching, leaves, exits):
    """Those that are run, be they networks or exits; heads learn as without equilibrium."""
    torch.manual_seed(0)
    backbone = timm.create_model("resnet8_cifar", channels=(4, 8, 8), in_chans=1)
    make = hierens.tree_with_exits if exits else hierens.hierensify
    model = make(backbone, branching=branching, init="reinit", looped={}).double().train()
    networks = model.networks if exits else model
    networks.set_executor(executor)
    images, labels = torch.randn(4, 1, 12, 12, dtype=torch.float64), torch.randint(10, (4,))

    def gradients_of(which, equilibrium):
        model.gradient_equilibrium = equilibrium
        model.zero_grad()
        losses = [F.cross_entropy(y, labels) for y in model(images, leaves=leaves, reduce=False).unbind(1)]
        sum(losses[i] for i in which(len(losses))).backward()
        zeros = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
        }
        return len(losses), zeros

    count, even = gradients_of(range, True)
    each = [gradients_of(lambda n, i=i: [i], False)[1] for i in range(count)]
    for name in even:
        stacked = torch.stack([gradients[name] for gradients in each])  # (answers, branches * ..., ...)
        level = re.search(r"levels\.(\d+)\.", name)
        if not level:
            assert torch.allclose(even[name], stacked.sum(0), rtol=1e-9, atol=1e-12), name
            continue
        width = networks.tree.width(int(level[1]))
        for got, of in zip(even[name].chunk(width), stacked.chunk(width, 1), strict=True):
            behind = sum(bool(answer.abs().sum() > 0) for answer in of)
            assert torch.allclose(got * max(behind, 1), of.sum(0), rtol=1e-9, atol=1e-12), name


def test_the_scaled_tensor_is_itself():
    x = torch.randn(3, 4, requires_grad=True)
    assert torch.equal(scale_gradient(x, 0.5), x)
    assert torch.autograd.gradcheck(
        lambda t: scale_gradient(t, 1.0), torch.randn(3, dtype=torch.float64, requires_grad=True)
    )


# --- multi-exit networks ---


@pytest.fixture(scope="module")
def chain():
    """Four exits, in float64."""
    torch.manual_seed(0)
    backbone = timm.create_model("resnet14_cifar", channels=(4, 8, 8), in_chans=1)
    return hierens.multi_exit(backbone, 4).double().train()


def per_exit_losses(model, images, labels):
    return torch.stack([F.cross_entropy(y, labels) for y in model(images, reduce=False).unbind(1)])


def block_gradients(model, loss):
    """The gradient of each block's weights, as one vector; zero where none came."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return [
        torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in level.parameters()])
        for level in model.levels
    ]


def gradients_of_each_exit(model, images, labels):
    model.gradient_equilibrium = False
    return [block_gradients(model, per_exit_losses(model, images, labels)[exit]) for exit in range(4)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_exits_are_balanced_as_by_the_papers_formulas(chain, checkpointing):
    """Before exit i (1-based) the gradient is scaled by 1/(K-i+1); what flows on, by (K-i) more (section 3.1)."""
    images, labels = torch.randn(4, 1, 12, 12, dtype=torch.float64), torch.randint(10, (4,))
    chain.gradient_equilibrium, exits = True, 4
    chain.set_grad_checkpointing(checkpointing)
    actual = block_gradients(chain, per_exit_losses(chain, images, labels).sum())
    heads = [p.grad.clone() for p in chain.exits.parameters()]
    chain.set_grad_checkpointing(False)
    value, loss = images, 0.0
    for i in range(1, exits + 1):
        value = chain.levels[i - 1](value).clone()
        value.register_hook(lambda grad, i=i: grad / (exits - i + 1))  # all that comes back, from the exit and beyond
        loss = loss + F.cross_entropy(chain.exits[i - 1](value), labels)
        value = value.clone()
        if i < exits:
            value.register_hook(lambda grad, i=i: grad * (exits - i))
    expected = block_gradients(chain, loss)
    for block, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-12), block
    assert all(torch.allclose(a, p.grad) for a, p in zip(heads, chain.exits.parameters(), strict=True)), "as they were"


def test_a_blocks_gradient_is_the_mean_over_the_exits_behind_it(chain):
    images, labels = torch.randn(4, 1, 12, 12, dtype=torch.float64), torch.randint(10, (4,))
    alone = gradients_of_each_exit(chain, images, labels)
    chain.gradient_equilibrium = True
    even = block_gradients(chain, per_exit_losses(chain, images, labels).sum())
    for block in range(4):
        expected = sum(alone[exit][block] for exit in range(block, 4)) / (4 - block)
        assert torch.allclose(even[block], expected, rtol=1e-9, atol=1e-12), block
    first_two = sum(F.cross_entropy(y, labels) for y in chain(images, depth=1, reduce=False).unbind(1))
    expected = (alone[0][0] + alone[1][0]) / 2
    assert torch.allclose(block_gradients(chain, first_two)[0], expected, rtol=1e-9, atol=1e-12), "of those that run"


def test_the_variance_of_a_blocks_gradient_stays_within_that_of_the_exits(chain):
    """Section 3.1's argument, measured over batches: bounded with equilibrium, growing with the exits without."""
    generator = torch.Generator().manual_seed(0)
    collected = {"even": [], "summed": [], "alone": []}
    for _ in range(12):
        images = torch.randn(8, 1, 12, 12, generator=generator, dtype=torch.float64)
        labels = torch.randint(10, (8,), generator=generator)
        for name in ("even", "summed"):
            chain.gradient_equilibrium = name == "even"
            collected[name].append(block_gradients(chain, per_exit_losses(chain, images, labels).sum())[0])
        collected["alone"].append(torch.stack([g[0] for g in gradients_of_each_exit(chain, images, labels)]))
    variance = {name: torch.stack(values).var(0, correction=0).sum(-1) for name, values in collected.items()}
    assert variance["even"] <= variance["alone"].mean(), "of a mean: at most the mean of the variances"
    assert variance["summed"] > variance["alone"].max(), "of a sum: more than any exit's own"
    assert variance["summed"] / variance["even"] == pytest.approx(16), "and 4 squared times that of the mean"
