"""Distillation of embeddings against plain transcriptions of its sums, in float64."""

import pytest
import torch

from hierens.embedding_losses import cosine_distillation, mse_distillation
from support import oracles


def distances(student, teacher):
    """1 - cos and the mean squared error of two vectors, by their definitions."""
    dot, squares = sum(student * teacher), (sum(student**2), sum(teacher**2))
    return {
        cosine_distillation: 1 - dot / (squares[0] ** 0.5 * squares[1] ** 0.5),
        mse_distillation: sum((s - t) ** 2 for s, t in zip(student, teacher, strict=True)) / len(student),
    }


def plain(loss, embeddings, students):
    """The sum over students, averaged over images; the teacher is a constant."""
    images = []
    for of in embeddings:
        leaves = len(of)
        teacher = oracles.nested(of, leaves).detach()
        smaller = [oracles.nested(of, size) for size in oracles.sizes(leaves)[:-1]]
        drawn = smaller if students == "depths" else list(of)
        images.append(0 * of.sum() + sum(distances(student, teacher)[loss] for student in drawn))
    return sum(images) / len(images)


@pytest.mark.parametrize("loss", [cosine_distillation, mse_distillation])
@pytest.mark.parametrize("students", ["depths", "leaves"])
@pytest.mark.parametrize("leaves", [1, 2, 5, 8])
def test_losses_are_their_sums(loss, students, leaves):
    embeddings = torch.randn(3, leaves, 6, dtype=torch.float64, requires_grad=True)
    actual, expected = loss(embeddings, students), plain(loss, embeddings, students)
    assert torch.allclose(actual, expected, atol=1e-12)
    got, wanted = (torch.autograd.grad(value, embeddings, retain_graph=True)[0] for value in (actual, expected))
    assert torch.allclose(got, wanted, atol=1e-12)


def test_half_precision_is_summed_in_float32():
    embeddings = torch.randn(2, 4, 6).half()
    assert cosine_distillation(embeddings).dtype == mse_distillation(embeddings, "leaves").dtype == torch.float32


def test_mistakes_end_in_one_sentence():
    with pytest.raises(ValueError, match="students must be 'depths' or 'leaves', got 'all'"):
        mse_distillation(torch.zeros(1, 2, 3), "all")
    with pytest.raises(ValueError, match="no image in the batch"):
        cosine_distillation(torch.zeros(0, 2, 3))
    with pytest.raises(ValueError, match="reduce=False"):
        cosine_distillation(torch.zeros(2, 3))
