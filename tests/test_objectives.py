"""The losses against plain transcriptions of equations (5) and (9) to (12): values and gradients, in float64."""

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hierens import objectives
from hierens.objectives import TERMS, Objective, nested_predictions


@st.composite
def cases(draw):
    """Leaf logits (N, leaves, classes) that take gradients, and hard or soft targets."""
    n, leaves, classes = draw(st.integers(1, 4)), draw(st.integers(1, 17)), draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 2.0, 30.0]))
    logits = scale * torch.randn(n, leaves, classes, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        target = torch.randint(classes, (n,), generator=generator)
    else:
        target = torch.rand(n, classes, generator=generator, dtype=torch.float64).softmax(-1)
    return logits.requires_grad_(), target


def assert_same(actual, expected, logits):
    """Two scalars and their gradients with respect to the logits agree."""
    assert torch.allclose(actual, expected.to(actual), rtol=1e-9, atol=1e-12)
    zero = 0 * logits.sum()  # a term may be constant: eq. (12) of a single network has no summand
    gradients = [torch.autograd.grad(value + zero, logits, retain_graph=True)[0] for value in (actual, expected)]
    assert torch.allclose(*gradients, rtol=1e-8, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(cases(), st.floats(0.5, 8))
def test_terms_are_equations_9_to_12(case, temperature):
    logits, target = case
    for term in TERMS:
        function = getattr(objectives, term)
        argument = target if term in objectives.SUPERVISED else temperature
        expected = oracles.loss(term, logits, target, temperature)
        assert_same(function(logits, argument), torch.as_tensor(expected), logits)


@settings(max_examples=40, deadline=None)
@given(
    cases(),
    st.floats(0, 1),
    st.floats(0.5, 8),
    st.sampled_from(["independent", "hierarchical", "independent+hierarchical"]),
    st.sampled_from(
        ["", "+codistillation", "+hierarchical_codistillation", "+codistillation+hierarchical_codistillation"]
    ),
)
def test_mixtures_weigh_labels_and_teacher(case, alpha, temperature, supervised, distilled):
    logits, target = case
    objective = Objective(supervised + distilled, alpha, temperature)
    expected = sum(
        ((alpha if term in objectives.DISTILLED else 1 - alpha) if distilled else 1.0)
        * oracles.loss(term, logits, target, temperature)
        for term in objective.terms
    )
    assert_same(objective(logits, target), expected, logits)


@given(cases())
@settings(max_examples=30, deadline=None)
def test_nested_predictions_are_equation_5(case):
    logits, _ = case
    actual = nested_predictions(logits)
    for image in range(len(logits)):
        for depth, size in enumerate(oracles.sizes(logits.shape[1])):
            assert torch.allclose(actual[image, depth], oracles.nested(logits[image], size))


def test_the_teacher_gets_no_gradient():
    """With one term pulling the first leaf to the mean of both, the second leaf must stay where it is."""
    logits = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    objectives.hierarchical_codistillation(logits).backward()
    assert logits.grad[:, 0].abs().max() > 1e-3
    assert logits.grad[:, 1].abs().max() == 0


def test_only_the_nested_losses_depend_on_the_order_of_leaves():
    logits, target = torch.randn(6, 8, 5, dtype=torch.float64), torch.randint(5, (6,))
    mixed = logits[:, torch.tensor([5, 2, 7, 0, 1, 3, 6, 4])]
    for term in TERMS:
        objective = Objective(term if term == "independent" else f"independent+{term}")
        same = torch.allclose(objective(logits, target), objective(mixed, target))
        assert same == ("hierarchical" not in term), term


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_its_logits(dtype):
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 100.0, 1e4):
        rounded = (scale * torch.randn(8, 16, 100, generator=generator)).to(dtype)
        target = torch.randint(100, (8,), generator=generator)
        results = []
        for kind in (dtype, torch.float64):
            logits = rounded.detach().to(kind).requires_grad_()
            loss = Objective()(logits, target)
            loss.backward()
            results.append((loss, logits.grad))
        (half, half_grad), (double, double_grad) = results
        assert half.dtype == torch.float32 and half.isfinite() and half_grad.isfinite().all()
        assert torch.allclose(half.double(), double, rtol=1e-4)
        assert torch.allclose(half_grad.double(), double_grad, rtol=2e-2, atol=1e-3 * double_grad.abs().max())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Objective("indepedent"), "unknown objective 'indepedent'.*did you mean 'independent'"),
        (lambda: Objective("xyz"), "the terms are independent, hierarchical, codistillation"),
        (lambda: Objective(""), "unknown objective ''"),
        (lambda: Objective("codistillation"), "never sees a label"),
        (lambda: Objective("independent+independent"), "stands twice"),
        (lambda: Objective(alpha=1.5), "alpha must be from 0 to 1, got 1.5"),
        (lambda: Objective(temperature=0), "temperature must be positive, got 0"),
        (lambda: Objective()(torch.zeros(2, 10), torch.zeros(2).long()), "reduce=False"),
        (lambda: Objective()(torch.zeros(2, 4, 10), torch.zeros(3).long()), r"\(2,\) or \(2, 10\), got shape \(3,\)"),
        (lambda: Objective()(torch.zeros(2, 4, 10), torch.zeros(2, 9)), r"got shape \(2, 9\)"),
        (lambda: Objective()(torch.zeros(2, 4, 10), torch.zeros(2)), "class indices"),
        (lambda: Objective()(torch.zeros(2, 4, 10).long(), torch.zeros(2).long()), "floating-point"),
    ],
)
def test_bad_input_says_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
