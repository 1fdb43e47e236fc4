"""The trainer: one epoch after the other over whatever loader it is given, every depth validated.

What a step draws at random (dropout, drop-path) depends only on the seed, the step and the process, and what a sample's
augmentation draws only on the seed, the epoch and the sample: a resumed run repeats an undisturbed one bit for bit, and
no state of a random generator needs to be carried over.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import set_seed, tqdm
from timm.utils import ModelEmaV3, adaptive_clip_grad
from torch import Tensor, nn

from hierens.core.errors import first_line
from hierens.hub.cards import COLUMNS
from hierens.models.adaptive import Adaptive
from hierens.objectives import Objective
from hierens.training.batchnorm import SyncedBatchNorm
from hierens.training.checkpoints.checkpoint import (
    CheckpointWriteError,
    TrainState,
    agreed,
    first_problem,
    last_good_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    resolve_checkpoint,
    save_checkpoint,
    score,
    start_from,
)
from hierens.training.checkpoints.saving import save_model
from hierens.training.config import TeacherConfig, TrainConfig, to_json
from hierens.training.data.loaders import check_division, data_signature
from hierens.training.data.unreadable import check_readable, report_unreadable
from hierens.training.evaluation import evaluate
from hierens.training.lock import alone_in
from hierens.training.log import JsonLines
from hierens.training.loss import TrainingLoss
from hierens.training.mixup import Mixing
from hierens.training.onednn import subsampled_convolutions
from hierens.training.optimizers import create_optimizer, frozen_levels
from hierens.training.randomness import seed_of
from hierens.training.schedules import bring_up_to, create_schedule
from hierens.training.sharding import own_part, shard, taken_over
from hierens.training.signals import StopSignals, interruption
from hierens.training.targets import TargetCheck
from hierens.training.throughput import Throughput

_STEPS_BETWEEN_AGREEMENTS = 10  # on accelerators, where agreeing to stop would wait for the device at every step


class TrainingDivergedError(ValueError):
    """The loss, the weights or the running statistics are no longer finite. The checkpoints are from before that."""


class Trainer:
    """Trains a hierarchical ensemble or a multi-exit network with Accelerate.

    Args:
        model: the network; its own weights are trained.
        config: how.
        train_loader: yields (images (N, C, H, W), targets (N,)); its batch size is the micro-batch of all processes
            together, `config.batch_size / config.accumulation`.
        val_loader: the same for validation.
        teacher: another model to learn from, with as many classes.
        teacher_config: how much, and how softened.

    After `fit` the results stand in `config.output_dir`: `log.jsonl`, `checkpoints/`, and `model/` in the Hub's layout
    (`model_ema/` too if there is an average of the weights).

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
        self.config = config
        with taken_over(config) as sharded:
            self.accelerator = Accelerator(
                cpu=config.cpu,
                mixed_precision=config.precision,
                gradient_accumulation_steps=config.accumulation,
                log_with=list(config.trackers) or None,
                project_dir=config.output_dir,
                step_scheduler_with_optimizer=False,
                dataloader_config=DataLoaderConfiguration(
                    split_batches=True, use_seedable_sampler=True, data_seed=config.seed
                ),
            )
        micro_batch = config.batch_size // config.accumulation
        check_division(micro_batch, config.val_batch_size, self.accelerator.num_processes)
        set_seed(seed_of(config.seed) % 2**32)  # numpy's own takes no negative seed
        if config.symmetry_noise and model.symmetric:
            model.break_symmetry(config.symmetry_noise, config.seed)
        if config.channels_last and not sharded:  # a share of the weights must be contiguous
            model.to(memory_format=torch.channels_last)
        model.gradient_equilibrium = config.gradient_equilibrium
        model.set_grad_checkpointing(config.grad_checkpointing)
        self._frozen = frozen_levels(model, config)
        if sharded:
            shard(model, self.accelerator.device)
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
        _check_objective(model, self.loss.objective, sharded)
        self.model = self.accelerator.prepare_model(model, evaluation_mode=sharded)  # else it comes to be copied
        self.optimizer, self.train_loader, self.val_loader = self.accelerator.prepare(
            optimizer, train_loader, val_loader
        )
        self._forward = torch.compile(self.model) if config.compile else self.model
        if hasattr(self.val_loader.batch_sampler, "even_batches"):
            self.val_loader.batch_sampler.even_batches = False  # no image is validated twice to fill a batch
        self._data = data_signature(self.train_loader)
        self.state = TrainState()
        self._unchecked: list[tuple[int, Tensor]] = []  # (step, loss) whose finiteness was not yet looked at
        self._log_file = JsonLines(Path(config.output_dir) / "log.jsonl")
        self._signals = StopSignals()
        self._asked = 0  # how often the processes could have agreed to stop

    @property
    def ensemble(self) -> Adaptive:
        """The model itself, without Accelerate's wrapping."""
        return self.accelerator.unwrap_model(self.model)

    def fit(self, begun: Callable[[], object] | None = None) -> list[dict[str, Any]]:
        """Train to the last epoch, resuming as configured, and save the model.

        SIGTERM and SIGINT (Ctrl-C) end it after the step under way and a checkpoint.

        Args:
            begun: called by the main process before the first step, once the checkpoint to go on from was accepted.

        Returns:
            A record per validated epoch: epoch, step, val_loss and the accuracy (%) of every depth.

        Raises:
            TrainingDivergedError: loss or weights are no longer finite; says at which step.
            TrainingInterrupted: a signal came; it is a SystemExit with the code 128 + signal. (Ctrl-C in a notebook: a
                KeyboardInterrupt, and `fit` can be called again.)
            ValueError: another run writes to the same folder, the checkpoint to go on from is damaged or of another
                model, or no model could be written.
        """
        config = self.config
        with (
            self._signals,
            self._synced(),
            subsampled_convolutions(self.ensemble),
            contextlib.ExitStack() as held,
        ):
            agreed(self.accelerator, lambda: held.enter_context(alone_in(config.output_dir)))
            self._resume()
            if begun is not None and self.accelerator.is_main_process:
                begun()
            self.accelerator.init_trackers("hierens", config=_flat(to_json(config)))
            try:
                for epoch in range(self.state.epoch, config.epochs):
                    if self.state.batch < len(self.train_loader):  # else it was stopped while it validated
                        self._train_epoch(epoch)
                    if (epoch + 1) % config.val_epochs == 0 or epoch + 1 == config.epochs:
                        self._validate(epoch)
                    self.state.epoch, self.state.batch = epoch + 1, 0
                    self._checkpoint()
            except RuntimeError as error:
                if self._signals.received:  # it went to the loader's workers too, which died of it
                    self._stop(self._signals.received, f"in the midst of a step ({first_line(error)})")
                raise
            self._save_models()
            self._end_trackers()
        return self.state.history

    def _resume(self) -> None:
        folder = resolve_checkpoint(self.accelerator, self.config)
        if folder is not None:
            self.state = load_checkpoint(self.accelerator, folder, self.config, self._data, self._average)
            validated = [(record["epoch"], score(record)) for record in self.state.history]
            bring_up_to(self.schedule, self.state.step, validated)
            self.accelerator.print(f"resuming from {folder}: epoch {self.state.epoch}, step {self.state.step}")
        if self.accelerator.is_main_process:
            state = self.state
            start_from(self.config.output_dir, folder)
            self._log_file.restart(lambda r: r["epoch"] <= state.epoch if "val_loss" in r else r["step"] <= state.step)

    def _train_epoch(self, epoch: int) -> None:
        loader = self.train_loader
        loader.set_epoch(epoch)
        if hasattr(loader.dataset, "set_epoch"):
            loader.dataset.set_epoch(epoch)  # Accelerate passes it on to the sampler, not always to the data
        batches, thawing = len(loader), self.config.unfreeze_epoch
        if self.state.batch:
            loader = skip_first_batches(loader, self.state.batch)
        done = self.state.batch // self.config.accumulation
        bar = tqdm(total=self.updates_per_epoch, initial=done, disable=not sys.stderr.isatty(), leave=False)
        bar.set_description(f"epoch {epoch + 1}/{self.config.epochs}")
        self.model.train()
        frozen = self._frozen if thawing is None or epoch < thawing else []
        for level in frozen:
            level.eval()  # their statistics stay as well
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
            self._stop_if_asked()
            if self.state.step % self.config.checkpoint_steps == 0 and self.state.batch < batches:
                self._checkpoint()
        bar.close()
        self._report_unreadable(epoch, "training", self.train_loader)

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
            for level in frozen:
                level.zero_grad()
            if config.clip_grad is not None:
                self._clip(config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def leaf_logits(self, images: Tensor) -> Tensor:
        """What a step's loss is computed from, (N, leaves, classes): the place for another way through the model."""
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
        self._unchecked.append((self.state.step, loss))
        self.schedule.step_update(self.state.step)
        if self.ema is not None:
            self.ema.update(self.ensemble, step=self.state.step)
        if loss.device.type == "cpu":
            self._check_losses()  # costs nothing where there is no device to wait for

    def _check_losses(self) -> None:
        """See that all losses since the last look, averaged over processes, are finite, and keep them for the log.

        Looking waits for the device, hence not after every step.
        """
        self.targets.look()
        if not self._unchecked:
            return
        steps, losses = zip(*self._unchecked, strict=True)
        self._unchecked = []
        values = self.accelerator.reduce(torch.stack(losses), "mean").tolist()
        for step, value in zip(steps, values, strict=True):
            if not math.isfinite(value):
                self._diverged(f"the loss is {value} at step {step}")
        self.state.unlogged += values

    def _diverged(self, what: str) -> None:
        good = last_good_checkpoint(self.config.output_dir)
        kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint from before"
        raise TrainingDivergedError(f"{what}; {kept}. Try a lower learning rate, clip_grad, or bf16 in place of fp16.")

    def _checkpoint(self) -> None:
        self._check_losses()
        if name := first_problem(self._not_finite()):
            self._diverged(f"{name} is not finite after step {self.state.step}")
        if self.accelerator.is_main_process:
            self._log_file.sync()
        try:
            save_checkpoint(self.accelerator, self.config, self.state, self._data, self._average)
        except CheckpointWriteError as error:
            self.accelerator.print(f"{error} Training goes on; {self._newest()}, the next is due in time.")

    def _not_finite(self) -> list[str]:
        """The first of the weights and running statistics, or of their averages, that is not finite."""
        models = {"": self.ensemble} if self._average is None else {"": self.ensemble, "the average of ": self._average}
        for prefix, model in models.items():
            for name, tensor in model.state_dict().items():
                if not bool(own_part(tensor).isfinite().all()):
                    return [prefix + name]
        return []

    def _stop_if_asked(self) -> None:
        """Leave, after a checkpoint, if any process received a signal: all of them leave at the same step."""
        several, on_cpu = self.accelerator.num_processes > 1, self.accelerator.device.type == "cpu"
        self._asked += 1
        if several and not on_cpu and self._asked % _STEPS_BETWEEN_AGREEMENTS:
            return
        if number := self._largest(self._signals.received):
            self._checkpoint()
            self._stop(number, f"after step {self.state.step}")

    def _stop(self, number: int, where: str) -> NoReturn:
        name = signal.Signals(number).name
        self.accelerator.print(
            f"{name}: stopped {where}; {self._newest()}. The same command with resume='auto' goes on."
        )
        self._end_trackers()
        raise interruption(number)

    def _end_trackers(self) -> None:
        """Accelerate's `end_training` without leaving the process group: the processes may train again."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        atexit.unregister(_part)
        atexit.register(_part)

    def _newest(self) -> str:
        newest = newest_checkpoint(self.config.output_dir)
        return f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"

    def _largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.accelerator.num_processes == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    # --- what is shown and kept -------------------------------------------------------------------------------------

    def _validate(self, epoch: int) -> None:
        self._check_losses()
        record: dict[str, Any] = {"epoch": epoch + 1, "step": self.state.step}
        record |= self._evaluate(self.model)
        self._report_unreadable(epoch, "validation", self.val_loader)
        if self.ema is not None:
            average = self._evaluate(self.ema.module)
            record |= {f"ema_{name}": value for name, value in average.items()}
        self.state.history.append(record)
        self.schedule.step(epoch + 1, score(record))
        self._log(record)
        shown = " ".join(f"{value:.2f}" for value in record["accuracy"])
        self.accelerator.print(f"epoch {epoch + 1}: accuracy by depth {shown} %, loss {record['val_loss']:.4f}")

    def _report_unreadable(self, epoch: int, part: str, loader: Any) -> None:
        file = self._log_file.path.with_name("unreadable.txt")
        if counts := report_unreadable(self.accelerator, loader, part, epoch + 1, file):
            self._log({"epoch": epoch + 1, "step": self.state.step, **counts})

    def _evaluate(self, model: nn.Module) -> dict[str, Any]:
        # Several processes agree to stop between steps only: here they may have different numbers of batches.
        after_batch = self._stop_if_asked if self.accelerator.num_processes == 1 else None
        return evaluate(self.accelerator, model, self.val_loader, self.config.channels_last, after_batch)

    def _log_step(self, epoch: int, rate: float, data_wait: float) -> dict[str, str]:
        self._check_losses()
        loss = sum(self.state.unlogged) / max(len(self.state.unlogged), 1)
        lr = self.optimizer.param_groups[0]["lr"]
        speed = {"images_per_s": round(rate), "data_wait": round(data_wait, 3)}
        self._log({"epoch": epoch + 1, "step": self.state.step, "loss": loss, "lr": lr, **speed})
        self.state.unlogged = []
        shown = {"loss": f"{loss:.3f}", "img/s": f"{rate:.0f}", "data wait": f"{data_wait:.0%}"}
        if self.state.history:
            accuracy = self.state.history[-1]["accuracy"]
            shown |= {"acc@0": f"{accuracy[0]:.2f}", f"acc@{len(accuracy) - 1}": f"{accuracy[-1]:.2f}"}
        return shown

    def _log(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self._log_file.append(record)
        self.accelerator.log(_flat(record), step=self.state.step)

    def _save_models(self) -> None:
        record, directory = self.state.history[-1], Path(self.config.output_dir)
        models = {"model": (self.model, _shown(record, ""))}
        if self.ema is not None:
            models["model_ema"] = (self.ema.module, _shown(record, "ema_"))
        problems = []
        for name, (model, results) in models.items():
            try:
                save_model(self.accelerator, model, directory / name, results)
            except CheckpointWriteError as error:
                problems.append(str(error))
        if problems:
            newest = newest_checkpoint(directory)
            kept = f"all it needs is in {newest}: " if newest else ""
            raise ValueError(f"{' '.join(problems)} {kept}make room and start the same command again.")

    def _synced(self) -> AbstractContextManager[Any]:
        several = self.accelerator.num_processes > 1
        return SyncedBatchNorm() if several and self.config.sync_batchnorm else contextlib.nullcontext()


def _part() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check_objective(model: Adaptive, objective: Objective, sharded: bool) -> None:
    """Raise a ValueError if the objective does not fit how the leaves make up depths."""
    weights = model.prediction_weights
    learned = weights.leaf_weights is not None and weights.leaf_weights.requires_grad
    if learned and not objective.weighs_leaves:
        raise ValueError(
            f"no gradient reaches the exits' weights by {objective.name!r}: add 'ensemble' or 'hierarchical'."
        )
    if learned and sharded:
        raise ValueError("FSDP spreads weights that the loss needs as a whole: leave learn_weights out, or FSDP.")
    objective.check(weights)


def _shown(record: dict[str, Any], prefix: str) -> dict[str, list[float]]:
    """What a model card says of each depth."""
    return {title: record[prefix + name] for name, title in COLUMNS.items()}


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """Plain values only, which is what trackers take: a list or dictionary becomes an entry per item."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, list):
            flat |= {f"{name}/{position}": item for position, item in enumerate(value)}
        elif isinstance(value, dict):
            flat |= _flat({f"{name}/{key}": item for key, item in value.items()})
        else:
            flat[name] = value
    return flat
