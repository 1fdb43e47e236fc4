"""What a training step minimises: schedules of alpha and temperature, and other models as teachers."""

import contextlib

import pytest
import torch
from torch import nn

from hierens.losses import distillation, one_for_all
from hierens.objectives import Objective
from hierens.training.config import TeacherConfig, TrainConfig
from hierens.training.step_loss import TrainingLoss


class Says(nn.Module):
    """A model that always answers the same."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        return self.logits


def example():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    answer = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return logits, torch.randn(6, 1, 2, 2), torch.tensor([0, 1, 2, 3, 4, 0]), answer


def test_alpha_rises_and_temperature_moves_linearly():
    loss = TrainingLoss(TrainConfig(alpha=0.6, alpha_warmup_epochs=2, temperature=4.0, final_temperature=1.0), 40, 10)
    assert [round(loss.at(step).alpha, 9) for step in (0, 5, 10, 20, 39)] == [0, 0.15, 0.3, 0.6, 0.6]
    assert [round(loss.at(step).temperature, 9) for step in (0, 13, 39)] == [4.0, 3.0, 1.0]
    assert TrainingLoss(TrainConfig(), 40, 10).at(7) == Objective()


def test_an_average_of_the_weights_teaches_in_place_of_the_ensemble():
    logits, images, labels, answer = example()
    average = Says(answer)
    loss = TrainingLoss(TrainConfig(alpha=0.3), 10, 10, average=average)(
        logits, images, labels, 0, contextlib.nullcontext
    )
    assert torch.equal(loss, Objective(alpha=0.3)(logits, labels, answer))
    assert not torch.allclose(loss, Objective(alpha=0.3)(logits, labels))
    loss.backward()
    assert average.logits.grad is None and average.seen == [images]


def test_an_external_teacher_takes_its_share():
    logits, images, labels, answer = example()
    config = TeacherConfig(teacher="x", teacher_share=0.25, teacher_temperature=3.0)
    loss = TrainingLoss(TrainConfig(), 10, 10, None, Says(answer), config)(
        logits, images, labels, 0, contextlib.nullcontext
    )
    expected = 0.75 * Objective()(logits, labels) + 0.25 * distillation(logits, answer, 3.0)
    assert torch.allclose(loss, expected)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match="teacher_share must be from 0 to 1"):
        TeacherConfig(teacher_share=share)


def test_an_external_teacher_may_take_the_place_of_the_last_exit():
    logits, images, labels, answer = example()
    config, teacher = TrainConfig(objective="one_for_all", alpha=0.3), TeacherConfig("any", teacher_of_exits=True)
    loss = TrainingLoss(config, 10, 10, None, Says(answer), teacher)
    found = loss(logits, images, labels, 0, contextlib.nullcontext)
    assert torch.equal(found, one_for_all(logits, labels, 0.3, 2.0, answer))
    with pytest.raises(ValueError, match="teacher_of_exits needs the objective one_for_all"):
        TrainingLoss(TrainConfig(), 10, 10, None, Says(answer), teacher)
    with pytest.raises(ValueError, match="teacher_of_exits needs a teacher"):
        TeacherConfig(teacher_of_exits=True)


def test_an_average_that_is_not_kept_cannot_teach():
    with pytest.raises(ValueError, match="give ema_decay"):
        TrainConfig(ema_teacher=True)
