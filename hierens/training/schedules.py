"""Learning-rate schedules: timm's, and that of the paper's ImageNet run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from hierens.training.config import TrainConfig

TIMM_SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "plateau", "constant")
SCHEDULES = (*TIMM_SCHEDULES, "cyclic_step")


class CyclicStepScheduler(Scheduler):
    """ESPNetv2's cyclic schedule with warm restarts (Mehta et al., CVPR 2019, section 3.4), halved at milestones.

    Within a cycle of T epochs, the rate in epoch t is (1 - (t mod T) / T) times its maximum. The maximum is multiplied
    by `decay_rate` at every milestone. The HNE paper cites this schedule and gives the milestones 60 90 110 125 135 145
    of 150, the factor 2 and an initial rate of 0.1; T = 5 is ESPNetv2's.

    Args:
        optimizer: its groups' `lr` is the initial maximum.
        updates_per_epoch: optimiser steps per epoch.
        milestones: epochs.
        decay_rate: factor of the maximum at each milestone.
        cycle_epochs: T.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        updates_per_epoch: int,
        milestones: Sequence[int] = (),
        decay_rate: float = 0.5,
        cycle_epochs: int = 5,
    ) -> None:
        super().__init__(optimizer, param_group_field="lr", t_in_epochs=False)
        self.updates_per_epoch, self.milestones = updates_per_epoch, tuple(milestones)
        self.decay_rate, self.cycle_epochs = decay_rate, cycle_epochs

    def _get_lr(self, t: int) -> list[float]:
        epoch = t // self.updates_per_epoch
        factor = self.decay_rate ** sum(epoch >= milestone for milestone in self.milestones)
        factor *= 1 - (epoch % self.cycle_epochs) / self.cycle_epochs
        return [value * factor for value in self.base_values]


def create_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, updates_per_epoch: int) -> Scheduler:
    """The schedule of a config.

    Call `step_update(step)` after every optimiser step and `step(epochs, accuracy)` after every validation.

    Raises:
        ValueError: an unknown name, or an argument that timm does not accept.
    """
    if config.schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {config.schedule!r}: choose {', '.join(SCHEDULES)}.")
    if config.schedule == "cyclic_step":
        return CyclicStepScheduler(
            optimizer, updates_per_epoch, config.decay_epochs, config.decay_rate, config.cycle_epochs
        )
    decay: float | None = config.decay_epochs[0] if config.decay_epochs else None
    if decay is None and config.schedule not in ("wsd", "rsqrt"):  # their default is a fraction of the epochs
        decay = config.epochs / 3
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.schedule,
            num_epochs=config.epochs,
            decay_epochs=decay,
            decay_milestones=list(config.decay_epochs),
            decay_rate=config.decay_rate,
            min_lr=config.min_lr,
            warmup_epochs=config.warmup_epochs,
            step_on_epochs=config.schedule == "plateau",
            updates_per_epoch=updates_per_epoch,
            **config.schedule_args,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"timm cannot create the schedule {config.schedule!r}: {error}") from error
    return scheduler


def advance(schedule: Scheduler, step: int, accuracies: Sequence[tuple[int, float]]) -> None:
    """Advance a new schedule, and the rates it sets, to the state of a resumed run.

    Args:
        schedule: from `create_schedule`.
        step: optimiser steps done.
        accuracies: every validation so far: epochs done, and the accuracy that `plateau` uses.
    """
    schedule.update_groups(schedule.base_values)
    for epoch, accuracy in accuracies:
        schedule.step(epoch, accuracy)
    schedule.step_update(step)
