"""The losses against plain transcriptions of equations (5), (9) to (12): values and gradients, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hierens import losses, objectives
from hierens.core.predictions import PredictionWeights
from hierens.losses import nested_predictions
from hierens.objectives import TERMS, Objective
from support import oracles


@st.composite
def cases(draw):
    """Leaf logits (N, leaves, classes) that take gradients, and hard or soft targets."""
    n, leaves, classes = draw(st.integers(1, 5)), draw(st.integers(1, 17)), draw(st.integers(2, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 2.0, 30.0]))
    logits = scale * torch.randn(n, leaves, classes, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        target = torch.randint(classes, (n,), generator=generator)
    else:
        target = torch.rand(n, classes, generator=generator, dtype=torch.float64).softmax(-1)
    return logits.requires_grad_(), target


def example(*shape, seed=0, dtype=torch.float64, scale=1.0):
    """Seeded logits of a shape (N, leaves, classes) that take gradients, and class indices."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).clamp(-6e4, 6e4)
    target = torch.randint(shape[-1], shape[:1], generator=generator)
    return logits.to(dtype).requires_grad_(), target


def close(actual, expected):
    """Equal to 1e-10 of the largest entry: a small sum of large parts is as exact as the parts."""
    return (actual - expected).abs().max() <= 1e-10 * expected.abs().max().clamp(min=1e-2)


def assert_same(actual, expected, logits):
    """Two scalars and their gradients with respect to the logits agree."""
    assert close(actual, expected), f"loss {actual.item()}, expected {expected.item()}"
    got, wanted = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (actual, expected))
    assert close(got, wanted), f"gradient off by {(got - wanted).abs().max()} of {wanted.abs().max()}"


@settings(max_examples=40, deadline=None)
@given(cases(), st.floats(0.5, 8))
def test_terms_are_equations_9_to_12(case, temperature):
    logits, target = case
    for term in TERMS:
        arguments = (target,) if term in objectives.SUPERVISED else (target, temperature)
        actual = getattr(losses, term)(logits, *arguments)
        assert_same(actual, oracles.loss(term, logits, target, temperature), logits)


@settings(max_examples=40, deadline=None)
@given(
    cases(),
    st.floats(0, 1),
    st.floats(0.5, 8),
    st.sampled_from(["independent", "hierarchical", "independent+hierarchical"]),
    st.sampled_from(
        [
            "",
            "+codistillation",
            "+hierarchical_codistillation",
            "+codistillation+hierarchical_codistillation",
            "+hierarchical_codistillation+stepwise_codistillation",
        ]
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
    actual, sizes = nested_predictions(logits), oracles.sizes(logits.shape[1])
    assert actual.shape == (len(logits), len(sizes), logits.shape[2])
    for image in range(len(logits)):
        for depth, size in enumerate(sizes):
            assert close(actual[image, depth], oracles.nested(logits[image], size))


def test_defaults_are_the_papers_alpha_and_temperature_with_hierarchical_labels():
    """Half and half, at temperature 2 (section 4.1)."""
    logits, target = example(3, 8, 5)
    loss_h, loss_hd = (oracles.loss(t, logits, target, 2.0) for t in Objective().terms)
    assert Objective().terms == ("hierarchical", "hierarchical_codistillation")
    assert_same(Objective()(logits, target), (loss_h + loss_hd) / 2, logits)
    for term in objectives.DISTILLED:
        assert_same(getattr(losses, term)(logits), oracles.loss(term, logits, target, 2.0), logits)


def test_the_teacher_gets_no_gradient():
    """With one term pulling the first leaf to the mean of both, the second leaf must stay where it is."""
    logits, _ = example(3, 2, 5)
    losses.hierarchical_codistillation(logits).backward()
    assert logits.grad[:, 0].abs().max() > 1e-3
    assert logits.grad[:, 1].abs().max() == 0


def test_one_network_has_nothing_to_distil_to_but_stays_differentiable():
    logits, target = example(3, 1, 5)
    loss = losses.hierarchical_codistillation(logits)
    loss.backward()
    assert loss == 0 and logits.grad.abs().max() == 0
    assert close(Objective(alpha=0.25)(logits, target), 0.75 * losses.independent(logits, target))


def test_only_the_nested_losses_depend_on_the_order_of_leaves():
    logits, target = example(6, 8, 5)
    mixed = logits[:, torch.tensor([5, 2, 7, 0, 1, 3, 6, 4])]
    nested = ("hierarchical", "hierarchical_codistillation", "stepwise_codistillation")
    for term in TERMS:
        objective = Objective(term if term == "independent" else f"independent+{term}")
        same = torch.allclose(objective(logits, target), objective(mixed, target))
        assert same == (term not in nested), term


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4, 6e4])
def test_half_precision_is_as_good_as_its_logits(dtype, autocast, scale):
    logits, target = example(8, 16, 100, dtype=dtype, scale=scale)
    exact = logits.detach().double().requires_grad_()
    objective = Objective("+".join(TERMS))
    expected = objective(exact, target)
    expected.backward()
    with torch.autocast("cpu", dtype, enabled=autocast):
        loss = objective(logits, target)
    loss.backward()
    assert loss.dtype == torch.float32 and nested_predictions(logits).dtype == torch.float32
    assert torch.allclose(loss.double(), expected, rtol=1e-5), f"{loss.item()}, expected {expected.item()}"
    largest = exact.grad.abs().max()
    assert torch.allclose(logits.grad.double(), exact.grad, rtol=1e-2, atol=float(1e-3 * largest))


def test_tempered_students_are_hintons():
    """T^2 times the cross-entropy between softened teacher and softened students (arXiv 1503.02531, section 2)."""
    logits, target = example(3, 4, 5)
    temperature = 3.0
    teacher = (logits.detach().mean(1) / temperature).softmax(-1)
    students = [logits[:, :size].mean(1) / temperature for size in (1, 2)]
    expected = sum(-(teacher * student.log_softmax(-1)).sum(-1).mean() for student in students) * temperature**2
    objective = Objective(alpha=1.0, temperature=temperature, temper_students=True)
    assert_same(objective(logits, target), expected, logits)


def test_standardised_logits_have_no_scale():
    """Teacher and students are brought to mean 0 and deviation 1 (arXiv 2403.01427), in both distilled terms."""
    logits, target = example(3, 4, 5)
    temperature = 2.0

    def standardised(y):
        return (y - y.mean(-1, keepdim=True)) / y.std(-1, keepdim=True, correction=0) / temperature

    nested = [standardised(logits[:, :size].mean(1)) for size in (1, 2, 4)]
    soft = [y.detach().softmax(-1) for y in nested]
    for term, teachers in (("hierarchical_codistillation", [soft[2]] * 2), ("stepwise_codistillation", soft[1:])):
        expected = sum(
            -(teacher * y.log_softmax(-1)).sum(-1).mean() for teacher, y in zip(teachers, nested, strict=False)
        )
        objective = Objective(f"independent+{term}", 1.0, temperature, True, standardize_logits=True)
        assert abs((objective(logits, target) - expected * temperature**2).item()) < 1e-4
    with pytest.raises(ValueError, match="temper_students"):
        Objective(standardize_logits=True)


def test_depths_weigh_what_they_are_told_to():
    logits, target = example(3, 4, 5)
    weights = (3.0, 0.5, 2.0)
    nested = [logits[:, :size].mean(1) for size in (1, 2, 4)]
    labels = sum(w * torch.nn.functional.cross_entropy(y, target) for w, y in zip(weights, nested, strict=True))
    assert_same(Objective("hierarchical", depth_weights=weights)(logits, target), labels, logits)
    teacher = (nested[-1].detach() / 2).softmax(-1)
    distilled = sum(
        -w * (teacher * y.log_softmax(-1)).sum(-1).mean() for w, y in zip(weights[:2], nested, strict=False)
    )
    assert_same(Objective(alpha=1.0, depth_weights=weights)(logits, target), distilled, logits)


def test_another_teacher_takes_the_ensembles_place():
    logits, target = example(3, 4, 5)
    teacher = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    soft = (teacher.detach() / 2).softmax(-1)
    expected = sum(-(soft * logits[:, :size].mean(1).log_softmax(-1)).sum(-1).mean() for size in (1, 2))
    loss = Objective(alpha=1.0)(logits, target, teacher)
    assert_same(loss, expected, logits)
    assert teacher.grad is None


def test_distillation_from_another_model_is_zero_where_all_agree():
    logits, _ = example(3, 1, 5)
    same = logits.detach()[:, 0]
    assert abs(losses.distillation(logits, same, 2.0).item()) < 1e-12
    assert losses.distillation(logits.detach().expand(3, 4, 5) + torch.arange(5.0), same, 2.0) > 0.1


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("name", [*objectives.SUPERVISED, *(f"independent+{term}" for term in objectives.DISTILLED)])
@pytest.mark.parametrize("leaves", [1, 4])
def test_every_pixel_of_dense_logits_counts_as_an_image(name, leaves, soft):
    """Of every term, with each option: the flat loss of logits rearranged to (N * H * W, leaves, classes)."""
    logits, _ = example(2, leaves, 5, 3, 4)
    flat = logits.movedim(2, -1).movedim(1, -2).flatten(0, 2)
    target = torch.rand(2, 5, 3, 4, dtype=torch.float64).softmax(1) if soft else torch.randint(5, (2, 3, 4))
    flat_target = target.movedim(1, -1).flatten(0, 2) if soft else target.flatten()
    teacher = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    flat_teacher = teacher.movedim(1, -1).flatten(0, 2)
    tempered = {"temper_students": True, "standardize_logits": True}
    for options in ({}, {"depth_weights": (3.0, 0.5, 2.0)}, tempered) if leaves == 4 else ({},):
        objective = Objective(name, 0.3, **options)
        assert_same(objective(logits, target), objective(flat, flat_target), logits)
        assert_same(objective(logits, target, teacher), objective(flat, flat_target, flat_teacher), logits)
    one_for_all = Objective("one_for_all", 0.9)
    assert_same(one_for_all(logits, target), one_for_all(flat, flat_target), logits)
    distilled = (losses.distillation(logits, teacher), losses.distillation(flat, flat_teacher))
    assert_same(*distilled, logits)
    nested = nested_predictions(logits).movedim(2, -1).movedim(1, -2).flatten(0, 2)
    assert close(nested, nested_predictions(flat))


LOGITS, LABELS = torch.zeros(2, 4, 10), torch.zeros(2).long()
DENSE = torch.zeros(2, 4, 10, 3, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Objective("indepedent"), "unknown objective 'indepedent'.*did you mean 'independent'"),
        (lambda: Objective("xyz"), "the terms are independent, hierarchical, ensemble, codistillation"),
        (lambda: Objective(""), "unknown objective ''"),
        (lambda: Objective("codistillation"), "does not use labels"),
        (lambda: Objective("hierarchical_codistillation+codistillation"), "does not use labels"),
        (lambda: Objective("independent+independent"), "repeats a term"),
        (lambda: Objective(alpha=1.5), "alpha must be from 0 to 1, got 1.5"),
        (lambda: Objective(alpha=-0.1), "alpha must be from 0 to 1, got -0.1"),
        (lambda: Objective(alpha=float("nan")), "alpha must be from 0 to 1, got nan"),
        (lambda: Objective(temperature=0), "temperature must be positive, got 0"),
        (lambda: Objective(temperature=-2.0), "temperature must be positive, got -2.0"),
        (lambda: losses.codistillation(LOGITS, LABELS, 0.0), "temperature must be positive, got 0.0"),
        (lambda: losses.codistillation(LOGITS, 3.0), "got 3.0: pass a temperature by name"),
        (lambda: Objective()(torch.zeros(2, 10), LABELS), "reduce=False"),
        (lambda: nested_predictions(torch.zeros(2, 10)), "reduce=False"),
        (lambda: Objective()(torch.zeros(2, 0, 10), LABELS), r"at least one leaf, got shape \(2, 0, 10\)"),
        (lambda: Objective()(LOGITS, LABELS.repeat(2)), r"\(2,\) or \(2, 10\), got shape \(4,\)"),
        (lambda: Objective()(LOGITS, torch.zeros(2, 9)), r"got shape \(2, 9\)"),
        (lambda: Objective()(LOGITS, torch.zeros(2)), "class indices"),
        (lambda: Objective()(LOGITS.long(), LABELS), "floating-point"),
        (lambda: Objective(depth_weights=(1.0, -1.0)), "depth_weights must not be negative"),
        (
            lambda: Objective(depth_weights=(1.0, 1.0))(LOGITS, LABELS),
            "depth_weights needs 3 values, one per depth of 4",
        ),
        (lambda: Objective(mean_over_classes=True), "mean_over_classes is for one_for_all"),
        (lambda: Objective()(LOGITS, LABELS, torch.zeros(2, 9)), r"teacher's logits must be \(2, 10\)"),
        (lambda: losses.distillation(LOGITS, torch.zeros(3, 10)), r"teacher's logits must be \(2, 10\)"),
        (lambda: Objective()(torch.zeros(2, 10, 3, 5), LABELS), r"\(N, leaves, classes, H, W\).*reduce=False"),
        (lambda: Objective()(DENSE, LABELS), r"\(2, 3, 5\) or \(2, 10, 3, 5\), got shape \(2,\)"),
        (lambda: Objective()(DENSE, torch.zeros(2, 3, 5)), r"targets \(N, H, W\) are class indices"),
        (lambda: losses.distillation(DENSE, torch.zeros(2, 10)), r"\(2, 10, 3, 5\) \(N, classes, H, W\), got"),
    ],
)
def test_bad_input_says_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- multi-exit networks ---


@settings(max_examples=30, deadline=None)
@given(cases(), st.floats(0, 1), st.floats(0.5, 8), st.booleans())
def test_one_for_all_is_the_papers_loss(case, gamma, temperature, mean_over_classes):
    """Or, with the mean over classes, its authors' code's."""
    logits, target = case
    expected = 0.0
    for image in range(len(logits)):
        given = target[image]
        labels = given.tolist() if target.ndim == 2 else oracles.one_hot(given, logits.shape[-1])
        soft = oracles.soft_labels(logits[image, -1:], temperature)
        entropy = -sum(p * math.log(p) for p in soft if p > 0)
        for student in logits[image, :-1]:
            divergence = oracles.cross_entropy(student / temperature, soft) - entropy
            if mean_over_classes:
                divergence = divergence / logits.shape[-1]
            expected = expected + (1 - gamma) * oracles.cross_entropy(student, labels)
            expected = expected + gamma * temperature**2 * divergence
        expected = expected + oracles.cross_entropy(logits[image, -1], labels)
    objective = Objective("one_for_all", gamma, temperature, mean_over_classes=mean_over_classes)
    assert_same(objective(logits, target), expected / len(logits), logits)


def test_the_last_exit_learns_from_labels_alone():
    logits, target = example(3, 4, 5)
    (gradient,) = torch.autograd.grad(losses.one_for_all(logits, target), logits)
    (labels,) = torch.autograd.grad(losses.independent(logits[:, -1:], target), logits)
    assert close(gradient[:, -1], labels[:, -1]) and gradient[:, :-1].abs().max() > 1e-3


def test_weights_of_exits_make_up_the_ensembles_and_get_gradients():
    logits, target = example(3, 4, 5)
    free = torch.tensor([0.1, -0.3, 0.5, 0.2], dtype=torch.float64, requires_grad=True)
    weights = free.softmax(0)
    nested = [(logits[:, : n + 1] * weights[: n + 1, None]).sum(1) / weights[: n + 1].sum() for n in range(4)]
    each = [torch.nn.functional.cross_entropy(y, target) for y in nested]
    exits = sum(torch.nn.functional.cross_entropy(y, target) for y in logits.unbind(1))
    for name, expected in (
        ("ensemble", each[-1]),
        ("hierarchical", sum(each)),
        ("independent+ensemble", exits + each[-1]),
        ("one_for_all+ensemble", losses.one_for_all(logits, target, 0.5, 2.0) + each[-1]),
    ):
        actual = Objective(name)(logits, target, prediction_weights=PredictionWeights((1, 2, 3, 4), weights))
        assert_same(actual, expected, logits)
        assert_same(actual, expected, free)


def test_exits_that_answer_alone_are_their_own_ensembles():
    logits, target = example(3, 3, 5)
    weights = PredictionWeights((1, 2, 3), num_exits=3)
    summed = Objective("hierarchical", depth_weights=(1.0, 2.0, 4.0))(logits, target, prediction_weights=weights)
    expected = sum(w * losses.independent(logits[:, i : i + 1], target) for i, w in enumerate((1.0, 2.0, 4.0)))
    assert_same(summed, expected, logits)


@pytest.mark.parametrize("name", ["one_for_all+independent", "one_for_all+codistillation"])
def test_one_for_all_is_joined_by_ensembles_only(name):
    with pytest.raises(ValueError, match="only be combined with hierarchical and ensemble"):
        Objective(name)
