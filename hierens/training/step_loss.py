"""The loss of a training step: the objective with its schedules, and distillation from other models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hierens.core.predictions import PredictionWeights
from hierens.losses import distillation
from hierens.objectives import ONE_FOR_ALL, Objective
from hierens.training.config import TeacherConfig, TrainConfig

Precision = Callable[[], AbstractContextManager[Any]]  # such as `accelerator.autocast`


class TrainingLoss:
    """The objective with its schedules and teachers.

    Args:
        config: objective, alpha, temperature and their schedules.
        total_steps: optimiser steps of the whole run.
        steps_per_epoch: of one epoch.
        average: the model with averaged weights, if it is the teacher of co-distillation.
        teacher: another model, with the same number of classes.
        teacher_config: its weight and temperature.

    Raises:
        ValueError: the teacher is to replace the last exit, and the objective has none.
    """

    def __init__(
        self,
        config: TrainConfig,
        total_steps: int,
        steps_per_epoch: int,
        average: nn.Module | None = None,
        teacher: nn.Module | None = None,
        teacher_config: TeacherConfig | None = None,
    ) -> None:
        self.config, self.average, self.teacher = config, average, teacher
        self.objective = Objective(
            config.objective,
            config.alpha,
            config.temperature,
            config.temper_students,
            config.depth_weights,
            config.standardize_logits,
            config.mean_over_classes,
        )
        self.total_steps, self.warmup = total_steps, config.alpha_warmup_epochs * steps_per_epoch
        self.teacher_config = teacher_config or TeacherConfig()
        if self.teacher_config.teacher_of_exits and (ONE_FOR_ALL not in self.objective.terms or average is not None):
            raise ValueError("teacher_of_exits needs the objective one_for_all, without ema_teacher.")

    def at(self, step: int) -> Objective:
        """The objective before optimiser step `step`, counted from 0."""
        config, objective = self.config, self.objective
        if step < self.warmup:
            objective = replace(objective, alpha=config.alpha * step / self.warmup)
        if config.final_temperature is not None:
            passed = step / max(self.total_steps - 1, 1)
            temperature = config.temperature + passed * (config.final_temperature - config.temperature)
            objective = replace(objective, temperature=temperature)
        return objective

    def __call__(
        self,
        leaf_logits: Tensor,
        images: Tensor,
        targets: Tensor,
        step: int,
        precision: Precision,
        prediction_weights: PredictionWeights | None = None,
    ) -> Tensor:
        """The loss, a mean over the batch.

        Args:
            leaf_logits: (N, leaves, classes).
            images: (N, C, H, W), mixed or not; teachers get the same images.
            targets: (N,) or (N, classes).
            step: optimiser steps done.
            precision: a context in which other models run, such as `accelerator.autocast`.
            prediction_weights: those of the model; by default a tree's.
        """
        logits = self._logits(self.teacher, images, precision)
        of_exits = self.teacher_config.teacher_of_exits
        own = logits if of_exits else self._logits(self.average, images, precision)
        loss = self.at(step)(leaf_logits, targets, own, prediction_weights)
        if logits is None or of_exits:
            return loss
        share = self.teacher_config.teacher_share
        return (1 - share) * loss + share * distillation(leaf_logits, logits, self.teacher_config.teacher_temperature)

    @staticmethod
    def _logits(model: nn.Module | None, images: Tensor, precision: Precision) -> Tensor | None:
        if model is None:
            return None
        with torch.no_grad(), precision():
            return model(images)
