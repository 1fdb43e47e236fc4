"""Learning rates at hand-computed updates."""

import pytest
import torch

from hierens.training.config import TrainConfig
from hierens.training.schedules import SCHEDULES, create_schedule

UPDATES = 10  # per epoch


def rates(epochs=150, **settings):
    """The rate after every update, asked for out of order to show that it is a function of the step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = create_schedule(optimizer, TrainConfig(epochs=epochs, **settings), UPDATES)
    found = {}
    for step in reversed(range(epochs * UPDATES)):
        schedule.step_update(step)
        found[step] = optimizer.param_groups[0]["lr"]
    return found


def test_the_papers_imagenet_schedule():
    found = rates(schedule="cyclic_step", decay_epochs=(60, 90, 110, 125, 135, 145), decay_rate=0.5)
    for epoch, expected in {0: 0.1, 1: 0.08, 4: 0.02, 5: 0.1, 59: 0.02, 60: 0.05, 61: 0.04, 90: 0.025}.items():
        assert found[epoch * UPDATES] == pytest.approx(expected), epoch
        assert found[epoch * UPDATES + UPDATES - 1] == pytest.approx(expected), "steady within an epoch"
    assert found[145 * UPDATES] == pytest.approx(0.1 / 64)


def test_cosine_and_warm_up():
    found = rates(100, schedule="cosine", min_lr=0.01)
    assert found[0] == pytest.approx(0.1) and found[500] == pytest.approx(0.055) and found[999] < 0.0101
    warm = rates(100, schedule="cosine", warmup_epochs=2)
    assert warm[0] == pytest.approx(1e-5) and warm[10] == pytest.approx(0.05, rel=1e-2) and warm[20] > 0.099


def test_milestones_and_constancy():
    found = rates(30, schedule="multistep", decay_epochs=(10, 20), decay_rate=0.1)
    assert [round(found[e * UPDATES + 1], 6) for e in (0, 11, 21)] == [0.1, 0.01, 0.001]
    assert set(rates(30, schedule="constant").values()) == {0.1}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_name_makes_a_schedule(name):
    assert all(
        0 <= rate <= 0.1 + 1e-9 for rate in rates(10, schedule=name, decay_epochs=(5,), warmup_epochs=1).values()
    )


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown schedule 'cosin': choose cosine, tanh"):
        rates(schedule="cosin")
