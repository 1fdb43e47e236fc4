"""Stops a run whose loss, weights or running statistics are no longer finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hierens.training.agreement import first_problem
from hierens.training.checkpoints.selection import last_good_checkpoint
from hierens.training.sharding import local_shard


class TrainingDivergedError(ValueError):
    """The loss, the weights or the running statistics are no longer finite. Earlier checkpoints are intact."""


class FinitenessCheck:
    """Checks losses and weights. Reading a loss waits for the device, so losses are collected and read together.

    Args:
        accelerator: averages losses over processes.
        output_dir: of the run, for the error message.
    """

    def __init__(self, accelerator: Accelerator, output_dir: str | Path) -> None:
        self.accelerator, self.output_dir = accelerator, output_dir
        self._unread: list[tuple[int, Tensor]] = []  # (step, loss)

    def add(self, step: int, loss: Tensor) -> None:
        """Collect the loss of a step."""
        self._unread.append((step, loss))

    def losses(self) -> list[float]:
        """The losses collected since the last call, averaged over processes. Every process must call it.

        Raises:
            TrainingDivergedError: one of them is not finite.
        """
        if not self._unread:
            return []
        steps, losses = zip(*self._unread, strict=True)
        self._unread = []
        values: list[float] = self.accelerator.reduce(torch.stack(losses), "mean").tolist()
        for step, value in zip(steps, values, strict=True):
            if not math.isfinite(value):
                self._stop(f"the loss is {value} at step {step}")
        return values

    def check_weights(self, models: Mapping[str, nn.Module], step: int) -> None:
        """Check weights and running statistics. Every process must call it.

        Args:
            models: by the prefix of their tensors' names in the message.
            step: optimiser steps done.

        Raises:
            TrainingDivergedError: a value is not finite.
        """
        states = ((prefix, *item) for prefix, model in models.items() for item in model.state_dict().items())
        wrong = (prefix + name for prefix, name, tensor in states if not bool(local_shard(tensor).isfinite().all()))
        if name := first_problem([next(wrong, "")]):
            self._stop(f"{name} is not finite after step {step}")

    def _stop(self, what: str) -> NoReturn:
        good = last_good_checkpoint(self.output_dir)
        kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint from before"
        raise TrainingDivergedError(f"{what}; {kept}. Try a lower learning rate, clip_grad, or bf16 in place of fp16.")
