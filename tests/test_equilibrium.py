"""Gradient equilibrium: every branch gets the mean, not the sum, of what the leaves below it send."""

import pytest
import timm
import torch

import hierens
from hierens.equilibrium import scale_gradient
from hierens.objectives import Objective


def gradients(model, images, labels, equilibrium):
    model.gradient_equilibrium = equilibrium
    model.zero_grad()
    Objective()(model(images, reduce=False), labels).backward()
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


def test_the_scaled_tensor_is_itself():
    x = torch.randn(3, 4, requires_grad=True)
    assert torch.equal(scale_gradient(x, 0.5), x)
    assert torch.autograd.gradcheck(
        lambda t: scale_gradient(t, 1.0), torch.randn(3, dtype=torch.float64, requires_grad=True)
    )
