"""The trainer: runs epochs over any loader and validates every depth.

The random numbers of a step (dropout, drop path) depend only on the seed, the step and the process, and those of a
sample's augmentation only on the seed, the epoch and the sample. A resumed run therefore equals an uninterrupted one
bit for bit, and no state of a random generator needs to be saved.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import skip_first_batches
from accelerate.utils import set_seed, tqdm
from timm.utils import ModelEmaV3, adaptive_clip_grad
from torch import Tensor, nn

from hierens.core.errors import first_line
from hierens.core.labels import check_classes
from hierens.models.adaptive import Adaptive
from hierens.training.accelerate_setup import check_objective, create_accelerator, prepare_model
from hierens.training.agreement import agreed, largest
from hierens.training.batchnorm import SyncedBatchNorm
from hierens.training.checkpoints.checkpoint import CheckpointWriteError, load_checkpoint, save_checkpoint
from hierens.training.checkpoints.saving import save_models
from hierens.training.checkpoints.selection import choose_checkpoint, newest_checkpoint, start_from
from hierens.training.checkpoints.state import TrainState, score
from hierens.training.config import TeacherConfig, TrainConfig, to_json
from hierens.training.data.loaders import check_division, data_signature
from hierens.training.data.unreadable import check_readable
from hierens.training.divergence import FinitenessCheck
from hierens.training.evaluation import evaluate
from hierens.training.lock import lock_folder
from hierens.training.log import RunLog
from hierens.training.mixup import Mixing
from hierens.training.onednn import subsampled_convolutions
from hierens.training.optimizers import create_optimizer
from hierens.training.randomness import seed_of
from hierens.training.schedules import advance, create_schedule
from hierens.training.signals import StopSignals, interruption
from hierens.training.step_loss import TrainingLoss
from hierens.training.targets import TargetCheck
from hierens.training.throughput import Throughput

_STEPS_BETWEEN_AGREEMENTS = 10  # on accelerators, where agreeing to stop waits for the device


class Trainer:
    """Trains a hierarchical ensemble or a multi-exit network with Accelerate.

    Args:
        model: the network; its own weights are trained.
        config: settings of the training.
        train_loader: yields (images (N, C, H, W), targets (N,)); its batch size is the micro-batch of all processes
            together, `config.batch_size / config.accumulation`.
        val_loader: the same for validation.
        teacher: another model to learn from, with the same number of classes.
        teacher_config: the teacher's weight and temperature.

    `fit` writes its results to `config.output_dir`: `log.jsonl`, `checkpoints/`, and `model/` in the Hub's layout
    (also `model_ema/` if weights are averaged).

    Raises:
        ValueError: an unknown objective, optimiser or schedule, or batches that do not divide over the processes.
    """

    def __init__(
        self,
        model: Adaptive,
        config: TrainConfig,
        train_loader: Any,
        val_loader: Any,
        teacher: nn.Module | None = None,
        teacher_config: TeacherConfig | None = None,
    ) -> None:
        check_classes(model, "training on labels")
        self.config = config
        self.accelerator, sharded = create_accelerator(config)
        micro_batch = config.batch_size // config.accumulation
        check_division(micro_batch, config.val_batch_size, self.accelerator.num_processes)
        set_seed(seed_of(config.seed) % 2**32)  # numpy accepts no negative seed
        self._frozen = prepare_model(model, config, sharded, self.accelerator.device)
        optimizer = create_optimizer(model, config)
        self.updates_per_epoch = math.ceil(len(train_loader) / config.accumulation)
        self.schedule = create_schedule(optimizer, config, self.updates_per_epoch)
        self.ema = None if config.ema_decay is None else ModelEmaV3(model, decay=config.ema_decay)
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
        self._average = None if self.ema is None else self.ema.module
        if teacher is not None:
            teacher.requires_grad_(False).eval().to(self.accelerator.device)
        self.targets, self.mixing = TargetCheck(model.num_classes), Mixing(config, model.num_classes)
        self.loss = TrainingLoss(
            config,
            config.epochs * self.updates_per_epoch,
            self.updates_per_epoch,
            self._average if config.ema_teacher else None,
            teacher,
            teacher_config,
        )
        check_objective(model, self.loss.objective, sharded)
        self.model = self.accelerator.prepare_model(model, evaluation_mode=sharded)  # otherwise it would be copied
        self.optimizer, self.train_loader, self.val_loader = self.accelerator.prepare(
            optimizer, train_loader, val_loader
        )
        self._forward = torch.compile(self.model) if config.compile else self.model
        if hasattr(self.val_loader.batch_sampler, "even_batches"):
            self.val_loader.batch_sampler.even_batches = False  # otherwise images are validated twice to fill a batch
        self._data = data_signature(self.train_loader)
        self.state = TrainState()
        self._finite = FinitenessCheck(self.accelerator, config.output_dir)
        self._log = RunLog(self.accelerator, config.output_dir)
        self._signals = StopSignals()
        self._stop_checks = 0

    @property
    def ensemble(self) -> Adaptive:
        """The model without Accelerate's wrappers."""
        return self.accelerator.unwrap_model(self.model)

    def fit(self, begun: Callable[[], object] | None = None) -> list[dict[str, Any]]:
        """Train to the last epoch, resuming as configured, and save the model.

        After SIGTERM or SIGINT (Ctrl-C) it finishes the current step, writes a checkpoint and stops.

        Args:
            begun: called by the main process before the first step, once the checkpoint to resume from was loaded.

        Returns:
            A record per validated epoch: epoch, step, val_loss and the accuracy (%) of every depth.

        Raises:
            TrainingDivergedError: loss or weights are no longer finite; the message names the step.
            TrainingInterrupted: a signal was received; it is a SystemExit with the code 128 + signal. (After Ctrl-C in
                a notebook, a KeyboardInterrupt, and `fit` can be called again.)
            ValueError: another run writes to the same folder, the checkpoint to resume from is damaged or of another
                model, or a model could not be written.
        """
        config = self.config
        with (
            self._signals,
            self._synced(),
            subsampled_convolutions(self.ensemble),
            contextlib.ExitStack() as held,
        ):
            agreed(self.accelerator, lambda: held.enter_context(lock_folder(config.output_dir)))
            self._resume()
            if begun is not None and self.accelerator.is_main_process:
                begun()
            self._log.start(to_json(config))
            try:
                for epoch in range(self.state.epoch, config.epochs):
                    if self.state.batch < len(self.train_loader):  # otherwise it was stopped during validation
                        self._train_epoch(epoch)
                    if (epoch + 1) % config.val_epochs == 0 or epoch + 1 == config.epochs:
                        self._validate(epoch)
                    self.state.epoch, self.state.batch = epoch + 1, 0
                    self._checkpoint()
            except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
                if self._signals.received:  # the signal also ended the loader's workers, and their sockets
                    self._stop(self._signals.received, f"within a step ({first_line(error)})")
                raise
            self._save_models()
            self._log.end()
        return self.state.history

    def _resume(self) -> None:
        output_dir, resume = self.config.output_dir, self.config.resume
        folder = agreed(self.accelerator, lambda: choose_checkpoint(output_dir, resume))
        if folder is not None:
            self.state = load_checkpoint(self.accelerator, folder, self.config, self._data, self._average)
            validated = [(record["epoch"], score(record)) for record in self.state.history]
            advance(self.schedule, self.state.step, validated)
            self.accelerator.print(f"resuming from {folder}: epoch {self.state.epoch}, step {self.state.step}")
        if self.accelerator.is_main_process:
            state = self.state
            start_from(output_dir, folder)
            self._log.file.restart(lambda r: r["epoch"] <= state.epoch if "val_loss" in r else r["step"] <= state.step)

    def _train_epoch(self, epoch: int) -> None:
        loader = self.train_loader
        loader.set_epoch(epoch)
        if hasattr(loader.dataset, "set_epoch"):
            loader.dataset.set_epoch(epoch)  # Accelerate sets it for the sampler, not always for the data
        batches, thawing = len(loader), self.config.unfreeze_epoch
        if self.state.batch:
            loader = skip_first_batches(loader, self.state.batch)
        done = self.state.batch // self.config.accumulation
        bar = tqdm(total=self.updates_per_epoch, initial=done, disable=not sys.stderr.isatty(), leave=False)
        bar.set_description(f"epoch {epoch + 1}/{self.config.epochs}")
        self.model.train()
        frozen = self._frozen if thawing is None or epoch < thawing else []
        for level in frozen:
            level.eval()  # freezes their statistics as well
        micro: list[Tensor] = []
        throughput = Throughput(self.accelerator)
        for images, targets in throughput.watch(loader):
            with self.accelerator.accumulate(self.model):
                micro.append(self._micro_step(images, targets, epoch, frozen))
            self.state.batch += 1
            if not self.accelerator.sync_gradients:
                continue
            self._finish_step(torch.stack(micro).mean())
            micro = []
            bar.update()
            if self.state.step % self.config.log_steps == 0:
                bar.set_postfix(self._log_step(epoch, *throughput.since_last()))
                check_readable(self.train_loader, "training")
            self._stop_on_signal()
            if self.state.step % self.config.checkpoint_steps == 0 and self.state.batch < batches:
                self._checkpoint()
        bar.close()
        self._log.report_unreadable(self.train_loader, "training", epoch + 1, self.state.step)

    def _micro_step(self, images: Tensor, targets: Tensor, epoch: int, frozen: Sequence[nn.Module]) -> Tensor:
        config, accelerator = self.config, self.accelerator
        seed = seed_of(config.seed, self.state.step, self.state.batch, accelerator.process_index)
        targets = self.targets(targets, f"micro-batch {self.state.batch} (from 0) of epoch {epoch + 1}")
        images, targets = self.mixing(images, targets, epoch, seed)
        torch.manual_seed(seed)
        if config.channels_last:
            images = images.to(memory_format=torch.channels_last)
        leaf_logits = self.leaf_logits(images)
        weights = self.ensemble.prediction_weights
        loss = self.loss(leaf_logits, images, targets, self.state.step, accelerator.autocast, weights)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            for level in frozen if config.unfreeze_epoch is not None else ():
                level.zero_grad()
            if config.clip_grad is not None:
                self._clip(config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def leaf_logits(self, images: Tensor) -> Tensor:
        """The leaf logits of a step, (N, leaves, classes); override it to run the model differently."""
        with self.accelerator.autocast():
            return self._forward(images, reduce=False)

    def _clip(self, limit: float) -> None:
        parameters = list(self.model.parameters())
        if self.config.clip_mode == "norm":
            self.accelerator.clip_grad_norm_(parameters, limit)
        elif self.config.clip_mode == "value":
            self.accelerator.clip_grad_value_(parameters, limit)
        else:
            self.accelerator.unscale_gradients(self.optimizer)
            adaptive_clip_grad([p for p in parameters if p.grad is not None], limit)

    def _finish_step(self, loss: Tensor) -> None:
        self.state.step += 1
        self._finite.add(self.state.step, loss)
        self.schedule.step_update(self.state.step)
        if self.ema is not None:
            self.ema.update(self.ensemble, step=self.state.step)
        if loss.device.type == "cpu":
            self._check_losses()  # there is no device to wait for

    def _check_losses(self) -> None:
        """Check labels and losses, and keep the losses for the log. It waits for the device."""
        self.targets.look()
        self.state.unlogged += self._finite.losses()

    def _checkpoint(self) -> None:
        self._check_losses()
        models = {"": self.ensemble} if self._average is None else {"": self.ensemble, "the average of ": self._average}
        self._finite.check_weights(models, self.state.step)
        self._log.sync()
        try:
            save_checkpoint(self.accelerator, self.config, self.state, self._data, self._average)
        except CheckpointWriteError as error:
            self.accelerator.print(f"{error} Training continues; {self._newest()}, the next is written as scheduled.")

    def _stop_on_signal(self) -> None:
        """Stop, after a checkpoint, if any process received a signal: all of them stop at the same step."""
        several, on_cpu = self.accelerator.num_processes > 1, self.accelerator.device.type == "cpu"
        self._stop_checks += 1
        if several and not on_cpu and self._stop_checks % _STEPS_BETWEEN_AGREEMENTS:
            return
        if number := largest(self.accelerator, self._signals.received):
            self._checkpoint()
            self._stop(number, f"after step {self.state.step}")

    def _stop(self, number: int, where: str) -> NoReturn:
        name = signal.Signals(number).name
        self.accelerator.print(
            f"{name}: stopped {where}; {self._newest()}. The same command with resume='auto' continues."
        )
        self._log.end()
        raise interruption(number)

    def _newest(self) -> str:
        newest = newest_checkpoint(self.config.output_dir)
        return f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"

    def _validate(self, epoch: int) -> None:
        self._check_losses()
        record: dict[str, Any] = {"epoch": epoch + 1, "step": self.state.step}
        record |= self._evaluate(self.model)
        self._log.report_unreadable(self.val_loader, "validation", epoch + 1, self.state.step)
        if self._average is not None:
            record |= {f"ema_{name}": value for name, value in self._evaluate(self._average).items()}
        self.state.history.append(record)
        self.schedule.step(epoch + 1, score(record))
        self._log.append(record)
        shown = " ".join(f"{value:.2f}" for value in record["accuracy"])
        self.accelerator.print(f"epoch {epoch + 1}: accuracy by depth {shown} %, loss {record['val_loss']:.4f}")

    def _evaluate(self, model: nn.Module) -> dict[str, Any]:
        # Here processes may have different numbers of batches, so several of them agree to stop only between steps.
        after_batch = self._stop_on_signal if self.accelerator.num_processes == 1 else None
        return evaluate(self.accelerator, model, self.val_loader, self.config.channels_last, after_batch)

    def _log_step(self, epoch: int, rate: float, data_wait: float) -> dict[str, str]:
        self._check_losses()
        loss = sum(self.state.unlogged) / max(len(self.state.unlogged), 1)
        lr = self.optimizer.param_groups[0]["lr"]
        speed = {"images_per_s": round(rate), "data_wait": round(data_wait, 3)}
        self._log.append({"epoch": epoch + 1, "step": self.state.step, "loss": loss, "lr": lr, **speed})
        self.state.unlogged = []
        shown = {"loss": f"{loss:.3f}", "img/s": f"{rate:.0f}", "data wait": f"{data_wait:.0%}"}
        if self.state.history:
            accuracy = self.state.history[-1]["accuracy"]
            shown |= {"acc@0": f"{accuracy[0]:.2f}", f"acc@{len(accuracy) - 1}": f"{accuracy[-1]:.2f}"}
        return shown

    def _save_models(self) -> None:
        models = {"": self.model} if self._average is None else {"": self.model, "ema_": self._average}
        save_models(self.accelerator, models, Path(self.config.output_dir), self.state.history[-1])

    def _synced(self) -> AbstractContextManager[Any]:
        several = self.accelerator.num_processes > 1
        return SyncedBatchNorm() if several and self.config.sync_batchnorm else contextlib.nullcontext()
