"""Metrics of leaves and nested ensembles, against plain loops and torchmetrics."""

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from hierens.evaluation.metrics import LeafMetrics, PairedDifference, correct_predictions, evaluate_model, ood_auroc
from hierens.evaluation.uncertainty import mutual_information


def data(images=60, leaves=4, classes=5):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(images, leaves, classes, generator=generator)
    return logits, torch.randint(classes, (images,), generator=generator)


def evaluation(logits, labels, sizes=(25, 20, 15)):
    metrics = LeafMetrics()
    for some, those in zip(logits.split(list(sizes)), labels.split(list(sizes)), strict=True):
        metrics.update(some, those)
    return metrics.compute()


def assert_equal(found, expected):
    for name, value in vars(expected).items():
        assert getattr(found, name) == pytest.approx(value), name


def test_every_field_is_what_it_says():
    logits, labels = data()
    found = evaluation(logits, labels)
    assert found.count == 60
    for depth, size in enumerate((1, 2, 4)):
        mean = logits[:, :size].mean(1)
        assert found.accuracy[depth] == pytest.approx(100 * (mean.argmax(1) == labels).float().mean().item())
        assert found.nll[depth] == pytest.approx(F.cross_entropy(mean, labels).item(), rel=1e-5)
        ece = multiclass_calibration_error(mean.softmax(1), labels, num_classes=5, n_bins=15, norm="l1")
        assert found.ece[depth] == pytest.approx(ece.item(), rel=1e-4)
        spread = [logits[i, :size, c].std(correction=0).item() for i in range(60) for c in range(5)]
        assert found.std[depth] == pytest.approx(sum(spread) / len(spread), rel=1e-5, abs=1e-9)
        p = mean.softmax(1)
        truth = F.one_hot(labels, 5)
        assert found.brier[depth] == pytest.approx((p - truth).square().sum(1).mean().item(), rel=1e-5)
        of_each = logits[:, :size].softmax(2)
        assert found.variance[depth] == pytest.approx(of_each.var(1, correction=0).mean().item(), rel=1e-4, abs=1e-9)
        assert found.mutual_information[depth] == pytest.approx(mutual_information(logits[:, :size]).mean().item())
        wrong = (mean.argmax(1) != labels)[p.amax(1).argsort(descending=True)].double()
        risks = wrong.cumsum(0) / torch.arange(1, 61)
        assert found.aurc[depth] == pytest.approx(risks.mean().item())
        votes = logits[:, :size].argmax(2)
        pairs = [(a, b) for a in range(size) for b in range(a)]
        same = [(votes[:, a] == votes[:, b]).float().mean().item() for a, b in pairs] or [1.0]
        assert found.agreement[depth] == pytest.approx(sum(same) / len(same), rel=1e-5)
    alone = [100 * (logits[:, n].argmax(1) == labels).float().mean().item() for n in range(4)]
    assert found.leaf_accuracy == pytest.approx(alone)


def test_images_without_a_label_are_passed_over():
    logits, labels = data()
    labels[::3] = -1
    known = labels >= 0
    assert_equal(evaluation(logits, labels), evaluation(logits[known], labels[known], (15, 15, 10)))


def test_half_precision_is_summed_in_full():
    logits, labels = data()
    half = evaluation(logits.bfloat16(), labels)
    assert half.nll == pytest.approx(evaluation(logits.bfloat16().float(), labels).nll, rel=1e-6)


def test_metrics_without_labelled_images_raise_an_error():
    with pytest.raises(ValueError, match="no image has a label"):
        LeafMetrics().compute()


def test_a_model_is_evaluated_as_it_answers_and_left_in_its_mode():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images, reduce):
            assert not self.training and not reduce and not torch.is_grad_enabled()
            return images

    logits, labels = data()
    model = Model().train()
    found = evaluate_model(model, zip(logits.split(20), labels.split(20), strict=True))
    assert_equal(found, evaluation(logits, labels))
    assert model.training


def test_two_answers_are_compared_image_by_image():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(500, generator=generator) < share for share in (0.7, 0.6))
    found = PairedDifference.of(first, second)
    each = first.double() - second.double()
    assert found.images == each.sum() and found.count == 500
    assert found.percent == pytest.approx(100 * each.mean().item())
    assert found.error == pytest.approx(100 * each.std().item() / 500**0.5)
    same = PairedDifference.of(first, first)
    assert (same.images, same.error) == (0, 0.0)
    assert PairedDifference.of(first[:1], second[:1]).error == 0, "one image tells nothing"


def test_correct_predictions_are_those_that_accuracy_counts():
    logits, targets = torch.randn(40, 4, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    targets[7] = -1  # of no class

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, images, reduce):
            return logits[images.long()]

    batches = [(part, targets[part]) for part in torch.arange(40).split(16)]
    correct = correct_predictions(Model(), batches)
    assert correct.shape == (39, 3) and correct.dtype == torch.bool
    assert (100 * correct.double().mean(0)).tolist() == pytest.approx(evaluate_model(Model(), batches).accuracy)


def test_ood_auroc_depends_on_ranks_alone():
    known, strangers = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([2.0, 50.0, 9.0])
    pairs = [(s > k) + 0.5 * (s == k) for s in strangers.tolist() for k in known.tolist()]
    assert ood_auroc(known, strangers) == pytest.approx(sum(pairs) / len(pairs))
    assert ood_auroc(known, known) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="both kinds"):
        ood_auroc(known, strangers[:0])


def test_agreement_stays_on_the_device_of_its_predictions():
    """On a GPU, validation of a tree raised: the sums of one and of several networks lay on different devices."""
    from hierens.evaluation.metrics import _agreement

    for networks in (1, 2):
        assert _agreement(torch.zeros(3, networks, dtype=torch.long, device="meta"), 5).device.type == "meta"
