"""Metrics of dense predictions: those of rearranged pixels, and torchmetrics' intersection over union."""

import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from hierens.evaluation.dense import DenseMetrics
from hierens.evaluation.metrics import LeafMetrics

SIZES = (1, 2, 4)


@pytest.fixture
def batch():
    """Logits (N, leaves, classes, H, W), and labels with two pixels without a class; class 4 is labelled nowhere."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 4, 5, 6, 7, generator=generator)
    labels = torch.randint(4, (3, 6, 7), generator=generator)
    labels[1, 2, 3:5] = -1
    return logits, labels


def evaluated(logits, labels):
    first, second = DenseMetrics(), DenseMetrics()
    first.update(logits[:2], labels[:2])
    second.update(logits[2:], labels[2:])
    return DenseMetrics.merged([first, second]).compute()


def test_pixels_count_as_images(batch):
    logits, labels = batch
    flat = LeafMetrics()
    known = labels.flatten() >= 0
    flat.update(logits.movedim(2, -1).movedim(1, -2).flatten(0, 2)[known], labels.flatten()[known])
    found = evaluated(logits, labels)
    assert found.count == 3 * 6 * 7 - 2
    for name, value in vars(flat.compute()).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("absent", [False, True], ids=["every class", "a class that occurs nowhere"])
def test_intersection_over_union_is_torchmetrics(batch, absent):
    logits, labels = batch
    if absent:
        logits[:, :, 4] = -100.0
    found = evaluated(logits, labels)

    def jaccard(prediction):
        return 100 * MulticlassJaccardIndex(5, ignore_index=-1)(prediction, labels).item()

    assert found.miou == pytest.approx([jaccard(logits[:, :n].mean(1)) for n in SIZES], rel=1e-5)
    assert found.leaf_miou == pytest.approx([jaccard(logits[:, n]) for n in range(4)], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits, labels: (logits, labels.clamp_min(9)), "label 9, but the model's classes are 0 to 4"),
        (lambda logits, labels: (logits, labels[:, 1:]), r"targets \(N, H, W\), got .* and \(3, 5, 7\)"),
        (lambda logits, labels: (logits[..., 0, 0], labels), r"\(N, leaves, classes, H, W\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(batch, change, message):
    with pytest.raises(ValueError, match=message):
        DenseMetrics().update(*change(*batch))


def test_metrics_of_images_name_those_of_pixels(batch):
    with pytest.raises(ValueError, match="DenseMetrics for dense predictions"):
        LeafMetrics().update(*batch)
