"""The trainer: one epoch after the other over whatever loader it is given, every depth validated.

What a step draws at random (dropout, drop-path) depends only on the seed, the step and the process, and what a sample's
augmentation draws only on the seed, the epoch and the sample: a resumed run repeats an undisturbed one bit for bit, and
no state of a random generator needs to be carried over.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import DistributedType, parse_flag_from_env, set_seed, tqdm
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from hierens.ensemble import HierarchicalEnsemble
from hierens.errors import first_line
from hierens.modes import evaluating
from hierens.objectives import Objective, nested_predictions
from hierens.training.batchnorm import SyncedBatchNorm
from hierens.training.checkpoint import (
    CheckpointWriteError,
    TrainState,
    load_checkpoint,
    newest_checkpoint,
    resolve_checkpoint,
    save_checkpoint,
)
from hierens.training.config import TrainConfig, to_json
from hierens.training.data import data_signature
from hierens.training.log import JsonLines
from hierens.training.saving import save_model
from hierens.training.schedules import create_schedule
from hierens.training.signals import StopSignals, interruption

_STEPS_BETWEEN_AGREEMENTS = 10  # on accelerators, where agreeing to stop would wait for the device at every step


class TrainingDivergedError(ValueError):
    """The loss or the weights are no longer finite. The newest checkpoint is from before that."""


class Trainer:
    """Trains a hierarchical ensemble with Accelerate.

    Args:
        model: the ensemble; its own weights are trained.
        config: how.
        train_loader: yields (images (N, C, H, W), targets (N,)); its batch size is the micro-batch of all processes
            together, `config.batch_size / config.accumulation`.
        val_loader: the same for validation.

    After `fit` the results stand in `config.output_dir`: `log.jsonl`, `checkpoints/`, and `model/` in the Hub's layout
    (`model_ema/` too if there is an average of the weights).

    Raises:
        ValueError: an unknown objective, optimiser or schedule, or batches that do not divide over the processes.
    """

    def __init__(self, model: HierarchicalEnsemble, config: TrainConfig, train_loader: Any, val_loader: Any) -> None:
        self.config = config
        self.objective = Objective(config.objective, config.alpha, config.temperature)
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
        self._check_division()
        set_seed(config.seed)
        if config.symmetry_noise and model.symmetric:
            model.break_symmetry(config.symmetry_noise, config.seed)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        optimizer = _create_optimizer(model, config)
        self.updates_per_epoch = math.ceil(len(train_loader) / config.accumulation)
        self.schedule = create_schedule(optimizer, config, self.updates_per_epoch)
        self.ema = None if config.ema_decay is None else ModelEmaV3(model, decay=config.ema_decay)
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
            self.accelerator.register_for_checkpointing(self.ema)
        self.model, self.optimizer, self.train_loader, self.val_loader = self.accelerator.prepare(
            model, optimizer, train_loader, val_loader
        )
        self.state = TrainState()
        self._unchecked: list[tuple[int, Tensor]] = []  # (step, loss) whose finiteness was not yet looked at
        self._log_file = JsonLines(Path(config.output_dir) / "log.jsonl")
        self._signals = StopSignals()
        self._asked = 0  # how often the processes could have agreed to stop

    @property
    def ensemble(self) -> HierarchicalEnsemble:
        """The model itself, without Accelerate's wrapping."""
        return self.accelerator.unwrap_model(self.model)

    def fit(self) -> list[dict[str, Any]]:
        """Train to the last epoch, resuming as configured, and save the model.

        SIGTERM and SIGINT (Ctrl-C) end it after the step under way and a checkpoint.

        Returns:
            A record per validated epoch: epoch, step, val_loss and the accuracy (%) of every depth.

        Raises:
            TrainingDivergedError: loss or weights are no longer finite; says at which step.
            TrainingInterrupted: a signal came; it is a SystemExit with the code 128 + signal. (Ctrl-C in a notebook: a
                KeyboardInterrupt, and `fit` can be called again.)
            ValueError: the checkpoint to go on from is damaged or of another model, or no model could be written.
        """
        config = self.config
        with self._signals, self._synced():
            self._resume()
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
            self.accelerator.end_training()
        return self.state.history

    def _resume(self) -> None:
        folder = resolve_checkpoint(self.accelerator, self.config)
        if folder is not None:
            self.state = load_checkpoint(self.accelerator, folder, self.config, data_signature(self.train_loader))
            self.schedule.step_update(self.state.step)
            self.accelerator.print(f"resuming from {folder}: epoch {self.state.epoch}, step {self.state.step}")
        if self.accelerator.is_main_process:
            state = self.state
            self._log_file.restart(lambda r: r["epoch"] <= state.epoch if "val_loss" in r else r["step"] <= state.step)

    def _train_epoch(self, epoch: int) -> None:
        loader = self.train_loader
        loader.set_epoch(epoch)
        if hasattr(loader.dataset, "set_epoch"):
            loader.dataset.set_epoch(epoch)  # Accelerate passes it on to the sampler, not always to the data
        batches = len(loader)
        if self.state.batch:
            loader = skip_first_batches(loader, self.state.batch)
        done = self.state.batch // self.config.accumulation
        bar = tqdm(total=self.updates_per_epoch, initial=done, disable=not sys.stderr.isatty(), leave=False)
        bar.set_description(f"epoch {epoch + 1}/{self.config.epochs}")
        self.model.train()
        micro: list[Tensor] = []
        start, images_seen = time.perf_counter(), 0
        for images, targets in loader:
            with self.accelerator.accumulate(self.model):
                micro.append(self._micro_step(images, targets))
            self.state.batch += 1
            images_seen += len(images) * self.accelerator.num_processes
            if not self.accelerator.sync_gradients:
                continue
            self._finish_step(torch.stack(micro).mean())
            micro = []
            bar.update()
            if self.state.step % self.config.log_steps == 0:
                rate = images_seen / (time.perf_counter() - start)
                bar.set_postfix(self._log_step(epoch, rate))
            self._stop_if_asked()
            if self.state.step % self.config.checkpoint_steps == 0 and self.state.batch < batches:
                self._checkpoint()
        bar.close()

    def _micro_step(self, images: Tensor, targets: Tensor) -> Tensor:
        config = self.config
        torch.manual_seed(_mixed(config.seed, self.state.step, self.state.batch, self.accelerator.process_index))
        if config.channels_last:
            images = images.to(memory_format=torch.channels_last)
        with self.accelerator.autocast():
            leaf_logits = self.model(images, reduce=False)  # (N, leaves, classes)
        loss = self.objective(leaf_logits, targets)
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients and config.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

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
        newest = newest_checkpoint(self.config.output_dir)
        kept = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint from before"
        raise TrainingDivergedError(f"{what}; {kept}. Try a lower learning rate, clip_grad, or bf16 in place of fp16.")

    def _checkpoint(self) -> None:
        self._check_losses()
        if self._any(not all(bool(p.isfinite().all()) for p in self.ensemble.parameters())):
            self._diverged(f"weights are not finite after step {self.state.step}")
        if self.accelerator.is_main_process:
            self._log_file.sync()
        try:
            save_checkpoint(self.accelerator, self.config, self.state, data_signature(self.train_loader))
        except CheckpointWriteError as error:
            newest = newest_checkpoint(self.config.output_dir)
            kept = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"
            self.accelerator.print(f"{error} Training goes on; {kept}, the next is due in time.")

    def _stop_if_asked(self) -> None:
        """Leave, after a checkpoint, if any process received a signal: all of them leave at the same step."""
        several, device = self.accelerator.num_processes > 1, self.accelerator.device
        self._asked += 1
        if several and device.type != "cpu" and self._asked % _STEPS_BETWEEN_AGREEMENTS:
            return
        number = self._signals.received
        if several:
            number = int(self.accelerator.gather(torch.tensor([number], device=device)).max())
        if number:
            self._checkpoint()
            self._stop(number, f"after step {self.state.step}")

    def _stop(self, number: int, where: str) -> NoReturn:
        newest = newest_checkpoint(self.config.output_dir)
        kept = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"
        self.accelerator.print(
            f"{signal.Signals(number).name}: stopped {where}; {kept}. The same command with resume='auto' goes on."
        )
        self.accelerator.end_training()
        raise interruption(number)

    def _any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.gather(torch.tensor([int(flag)], device=self.accelerator.device)).max())

    # --- what is shown and kept -------------------------------------------------------------------------------------

    def _validate(self, epoch: int) -> None:
        self._check_losses()
        record: dict[str, Any] = {"epoch": epoch + 1, "step": self.state.step}
        record |= self._evaluate(self.model)
        if self.ema is not None:
            average = self._evaluate(self.ema.module)
            record |= {f"ema_{name}": value for name, value in average.items()}
        self.state.history.append(record)
        self._log(record)
        shown = " ".join(f"{value:.2f}" for value in record["accuracy"])
        self.accelerator.print(f"epoch {epoch + 1}: accuracy by depth {shown} %, loss {record['val_loss']:.4f}")

    def _evaluate(self, model: nn.Module) -> dict[str, Any]:
        return evaluate(self.accelerator, model, self.val_loader, self.config.channels_last, self._stop_if_asked)

    def _log_step(self, epoch: int, rate: float) -> dict[str, str]:
        self._check_losses()
        loss = sum(self.state.unlogged) / max(len(self.state.unlogged), 1)
        lr = self.optimizer.param_groups[0]["lr"]
        self._log({"epoch": epoch + 1, "step": self.state.step, "loss": loss, "lr": lr, "images_per_s": round(rate)})
        self.state.unlogged = []
        shown = {"loss": f"{loss:.3f}", "img/s": f"{rate:.0f}"}
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
        models = {"model": (self.model, record["accuracy"])}
        if self.ema is not None:
            models["model_ema"] = (self.ema.module, record["ema_accuracy"])
        problems = []
        for name, (model, accuracy) in models.items():
            try:
                save_model(self.accelerator, model, directory / name, accuracy)
            except CheckpointWriteError as error:
                problems.append(str(error))
        if problems:
            newest = newest_checkpoint(directory)
            kept = f"all it needs is in {newest}: " if newest else ""
            raise ValueError(f"{' '.join(problems)} {kept}make room and start the same command again.")

    def _check_division(self) -> None:
        if parse_flag_from_env("ACCELERATE_USE_FSDP") or self.accelerator.distributed_type == DistributedType.FSDP:
            # Accelerate 1.15 ignores it on CPUs without a word; sharded level by level, views of packed weights outlive
            # their storage in the backward pass; and no GPU was to hand to test what remains.
            raise ValueError("FSDP is not supported: choose plain data parallelism in `accelerate config`.")
        config, processes = self.config, self.accelerator.num_processes
        for name, size in (
            ("batch_size", config.batch_size // config.accumulation),
            ("val_batch_size", config.val_batch_size),
        ):
            if size % processes:
                raise ValueError(f"{name}: {size} images per micro-batch do not divide over {processes} processes.")

    def _synced(self) -> AbstractContextManager[Any]:
        several = self.accelerator.num_processes > 1
        return SyncedBatchNorm() if several and self.config.sync_batchnorm else contextlib.nullcontext()


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    channels_last: bool = False,
    after_batch: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Loss and accuracy of every depth, from one pass over all leaves.

    Args:
        accelerator: gathers over processes.
        model: the ensemble, wrapped or not.
        loader: prepared by the accelerator.
        channels_last: memory format of the images.
        after_batch: called after every batch.

    Returns:
        `accuracy`: percent per depth; `val_loss`: mean cross-entropy of the full ensemble.
    """
    correct, loss, count = torch.zeros(()), 0.0, 0
    with evaluating(model):
        for images, targets in loader:
            if channels_last:
                images = images.to(memory_format=torch.channels_last)
            with accelerator.autocast():
                leaf_logits = model(images, reduce=False)
            nested = nested_predictions(leaf_logits)  # (N, depths, classes)
            nested, targets = accelerator.gather_for_metrics((nested, targets))
            correct = correct + (nested.argmax(-1) == targets[:, None]).sum(0).cpu()
            loss += float(nn.functional.cross_entropy(nested[:, -1], targets, reduction="sum"))
            count += len(targets)
            if after_batch is not None:
                after_batch()
    return {"accuracy": (100 * correct / count).tolist(), "val_loss": loss / count}


def _create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    try:
        return create_optimizer_v2(
            model, opt=config.optimizer, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum
        )
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"timm cannot make the optimiser {config.optimizer!r}: {error}") from error


def _mixed(*numbers: int) -> int:
    """One seed out of several numbers, different wherever any of them is."""
    return hash(numbers) % 2**63


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """Plain values only, which is what trackers take: a list becomes an entry per position."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, list):
            flat |= {f"{name}/{position}": item for position, item in enumerate(value)}
        else:
            flat[name] = value
    return flat
