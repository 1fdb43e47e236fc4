"""Labels that are no classes of the model: named before the step, with and without a look at every batch."""

import pytest
import torch
from torch.utils.data import TensorDataset

from hierens.evaluation.metrics import LeafMetrics
from hierens.training.targets import TargetCheck
from support.accelerator import reset_accelerator
from support.runs import made_up_data, trainer


def with_labels(change):
    images, targets = made_up_data().tensors
    return TensorDataset(images, change(targets))


def at(position, label):
    def change(targets):
        targets = targets.clone()
        targets[position] = label
        return targets

    return change


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1}, {"mixup": 0.5}])
@pytest.mark.parametrize("label", [2, -1, -100, 255])
def test_a_label_out_of_range_is_named_before_the_step(tmp_path, label, settings):
    run = trainer(tmp_path, data=with_labels(at(slice(None), label)), **settings)
    before = {name: tensor.clone() for name, tensor in run.ensemble.state_dict().items()}
    with pytest.raises(ValueError, match=rf"image 0 of micro-batch 0 \(from 0\) of epoch 1 has the label {label}, but"):
        run.fit()
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.ensemble.state_dict().items())


def test_the_position_is_that_in_the_batch():
    check = TargetCheck(10)
    assert check(torch.arange(10), "a").tolist() == list(range(10))
    with pytest.raises(ValueError, match=r"^image 3 of b has the label 12, but the model's classes are 0 to 9: "):
        check(torch.tensor([0, 1, 2, 12, 13]), "b")


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_other_whole_numbers_train_the_same(tmp_path, dtype):
    losses = []
    for name, change in (("a", lambda t: t), ("b", lambda t: t.to(dtype))):
        reset_accelerator()
        losses.append(trainer(tmp_path / name, data=with_labels(change), epochs=1).fit()[-1]["val_loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.float(), r"are float32 of shape \(32,\) \(image 0: [01]\.0\)"),
        (lambda t: t.bool(), r"are bool of shape \(32,\) \(image 0: (True|False)\)"),
        (lambda t: t[:, None], r"are int64 of shape \(32, 1\) \(image 0: [01]\)"),
    ],
)
def test_labels_of_another_type_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match="the labels of micro-batch 0 .*" + message):
        trainer(tmp_path, data=with_labels(change)).fit()


def test_probabilities_pass(tmp_path):
    data = with_labels(lambda t: torch.nn.functional.one_hot(t, 2).float())
    assert trainer(tmp_path, data=data, epochs=1).fit()


def test_with_deferred_checks_wrong_labels_are_clamped_and_reported_later(tmp_path):
    check = TargetCheck(10, at_once=False)
    assert check(torch.tensor([0, 9]), "a").tolist() == [0, 9]
    assert check(torch.tensor([4, 10, -7]), "b").tolist() == [4, 9, 0]
    with pytest.raises(ValueError, match="image 1 of b has the label 10, but the model's classes are 0 to 9"):
        check.look()
    check.look()  # it was said
    run = trainer(tmp_path, data=with_labels(at(slice(None), 5)), checkpoint_steps=1, log_steps=100)
    run.targets.at_once = False
    with pytest.raises(ValueError, match="has the label 5"):
        run.fit()
    assert not list((tmp_path / "checkpoints").glob("step-*")), "nothing that learned from it is kept"


def test_evaluation_names_them_too():
    metrics, logits = LeafMetrics(), torch.randn(4, 2, 3)
    metrics.update(logits, torch.tensor([0, -1, 2, 1], dtype=torch.int32))
    assert metrics.compute().count == 3
    for label in (3, -2):
        with pytest.raises(ValueError, match=f"image 2 of a batch has the label {label}"):
            metrics.update(logits, torch.tensor([0, 1, label, 9]))
