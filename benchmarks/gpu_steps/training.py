"""The steps `plan` and `train-NAME-1`, `train-NAME-2`, ...: training of the papers' CIFAR networks.

Training uses hierens' presets, trainer and checkpoints, with two differences: the images are read from the device's
memory (`gpu_steps.batches`), and the number of epochs is chosen to fit into the time. It is fixed before the first
update, and is the same for all trainings with one plan, so that the learning rate schedule covers the whole training.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import signal
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpu_steps.batches import DeviceImages, loader
from gpu_steps.packing import Split
from gpu_steps.records import Context, Record, read, write_whole
from hierens.core.errors import first_line
from hierens.training.checkpoints.selection import newest_checkpoint
from hierens.training.config import ModelConfig, Run, to_json
from hierens.training.presets import preset
from hierens.training.run import create_ensemble
from hierens.training.signals import TrainingInterrupted
from hierens.training.trainer import Trainer

PLAN = "plan"
_START, _STOP = 45.0, 25.0  # seconds that a step needs before its first and after its last update
_TRIAL = 40  # updates
_TINY: dict[str, Any] = {"backbone": "resnet8_cifar", "backbone_args": {"channels": [4, 4, 8]}}


@dataclasses.dataclass(frozen=True)
class Training:
    """A preset with some changes.

    Attributes:
        preset: name of the preset.
        model: fields of the model's configuration that differ from the preset.
        train: fields of the training configuration that differ from the preset.
        tiny: model of the tiny settings.
        plan: name of the plan; trainings with the same plan have equally many epochs.
    """

    preset: str
    model: dict[str, Any]
    train: dict[str, Any]
    tiny: ModelConfig
    plan: str = PLAN

    @property
    def of_exits(self) -> bool:
        """Whether the network is a multi-exit network, which has no executors."""
        return preset(self.preset).model.method == "multi_exit"


def _of_the_paper(objective: str) -> Training:
    tiny = ModelConfig(**_TINY, blocks=3)
    # Updates with batches of 128 and of 256 take nearly the same time: larger batches allow more epochs.
    train = {"objective": objective, "batch_size": 256, "lr": 0.2, "warmup_epochs": 1}
    return Training("paper-cifar", {"backbone": "hne_resnet50_cifar_small"}, train, tiny)


TRAININGS = {
    "distilled": _of_the_paper("independent+hierarchical_codistillation"),
    "labels": _of_the_paper("independent"),
    # With the authors' batches of 64, an epoch would have 780 updates, whose time does not depend on the batch size.
    "msdnet": Training(
        "imta-stage1",
        {},
        {"batch_size": 256, "lr": 0.2},
        ModelConfig(**_TINY, method="multi_exit", exits=3),
        f"{PLAN}-msdnet",
    ),
}
"""trainings by name"""


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a training is divided into steps.

    Attributes:
        steps: number of steps per objective.
        epochs: number of epochs; by default as many as fit into the time.
        precision: mixed precision, as in Accelerate.
        updates: stop a step after this number of updates instead of its time.
    """

    steps: int
    epochs: int | None = None
    precision: str = "bf16"
    updates: int | None = None


class Stopper:
    """Stops training with a checkpoint when the time is up, by raising SIGTERM; called before every batch."""

    def __init__(self, context: Context, updates: int | None = None) -> None:
        self.context, self.reserve = context, 0.0 if context.tiny else _STOP
        self.updates, self.batches, self.stopped = updates, 0, False

    def training(self) -> None:
        """Call before a training batch."""
        self.batches += 1
        self._look(self.updates is not None and self.batches > self.updates)

    def validation(self) -> None:
        """Call before a validation batch."""
        self._look(False)

    def _look(self, enough: bool) -> None:
        if not self.stopped and (enough or self.context.deadline.left() < self.reserve):
            self.stopped = True  # a second signal would end the process at once
            signal.raise_signal(signal.SIGTERM)


def recipe(context: Context, plan: dict[str, Any], name: str, folder: Path) -> Run:
    """The recipe of a training with the epochs and the settings of a plan."""
    training = TRAININGS[name]
    base = preset(training.preset)
    epochs = int(plan["epochs"])
    train = dataclasses.replace(base.train, **training.train)
    return dataclasses.replace(
        base,
        model=training.tiny if context.tiny else dataclasses.replace(base.model, **training.model),
        train=dataclasses.replace(
            train,
            output_dir=str(folder),
            epochs=epochs,
            decay_epochs=tuple(round(epoch * epochs / train.epochs) for epoch in train.decay_epochs),
            batch_size=16 if context.tiny else train.batch_size,
            val_batch_size=500,
            val_epochs=max(1, epochs // 20),
            precision=plan["precision"],
            channels_last=bool(plan["channels_last"]),
            checkpoint_steps=10**9,  # one is written after every epoch
            keep_checkpoints=1,
            keep_best=False,
            log_steps=1 if context.tiny else 50,
        ),
    )


def make_plan(context: Context, data: dict[str, Split], shape: Shape, name: str = "distilled") -> dict[str, Any]:
    """Measure the ways to run a training step; choose the fastest and the number of epochs; write the plan.

    Raises:
        ValueError: all ways fail.
    """
    torch.backends.cudnn.benchmark = True
    training = TRAININGS[name]
    record = Record(context, training.plan)
    executors = ("",) if training.of_exits else ("grouped", "looped")
    ways = [{"executor": e, "channels_last": last} for e in executors for last in (True, False)]
    base = {"epochs": 1, "precision": shape.precision}
    model = create_ensemble(recipe(context, {**base, **ways[0]}, name, Path()), len(data["train"].classes))
    rates: list[float] = []
    for way in ways:
        with tempfile.TemporaryDirectory() as folder:
            run = recipe(context, {**base, **way}, name, Path(folder))
            try:
                rates.append(_trial(context, run, copy.deepcopy(model), way["executor"], data["train"]))
                way["images_per_s"] = rates[-1]
            except RuntimeError as error:
                way["failed"] = first_line(error)
        record.write(ways=ways)
        print(f"{context.deadline.passed():5.0f} s  {way}", flush=True)
    if not rates:
        raise ValueError(f"no way to run a training step works: {ways[0]['failed']}")
    best = next(way for way in ways if way.get("images_per_s") == max(rates))
    seconds = 1 + len(data["train"].labels) / max(rates)  # one second for a checkpoint
    budget = 0.9 * shape.steps * max(context.deadline.seconds - _START - _STOP, 1.0)  # the rest is for validation
    fitting = max(1, min(preset(training.preset).train.epochs, math.floor(budget / seconds)))
    plan = {
        "epochs": shape.epochs or fitting,
        "steps": shape.steps,
        "minutes_per_step": context.deadline.seconds / 60,
        "epoch_s": seconds,
        "precision": shape.precision,
        **{key: best[key] for key in ("executor", "channels_last")},
    }
    record.write(plan=plan)
    return plan


def _trial(context: Context, run: Run, model: Any, executor: str, images: Split) -> float:
    """Images per second of some training steps, from the trainer's log."""
    if executor:
        model.set_executor(executor)
    updates, size = 2 if context.tiny else _TRIAL, run.train.batch_size
    some = Split(images.images[: updates * size], images.labels[: updates * size], images.classes)
    train = DeviceImages(some, run.data, context.device, training=True)
    few = DeviceImages(Split(some.images[:size], some.labels[:size], some.classes), run.data, context.device)
    config = dataclasses.replace(run.train, log_steps=updates // 2)
    Trainer(model, config, loader(train, size, True), loader(few, size, False)).fit()
    return _rates(Path(config.output_dir))[-1]


def train(context: Context, training: str, number: int, read_data: Callable[[], dict[str, Split]], shape: Shape) -> str:
    """Run one step of a training: resume from the previous step until training is finished or the time is up.

    Args:
        context: folders and time limit.
        training: a name in `TRAININGS`.
        number: number of the step, from 1.
        read_data: returns the images.
        shape: how the training is divided into steps.

    Returns:
        A description of the remaining work; empty if there is none.

    Raises:
        ValueError: a later step has no checkpoint to resume from.
    """
    torch.backends.cudnn.benchmark = True
    folder, name = context.runs / training, f"train-{training}-{number}"
    started = newest_checkpoint(folder)
    if number > 1 and started is None:
        raise ValueError(
            f"{name} resumes from a checkpoint, but there is none in {folder}: copy that folder from the machine of "
            f"the previous step, or start with train-{training}-1."
        )
    data = read_data()
    plan = _settled(context, training, started, data, shape)
    run = recipe(context, plan, training, folder)
    record = Record(context, name)
    record.content |= {"objective": run.train.objective, "plan": plan, "config": _shared(run)}
    stopper = Stopper(context, shape.updates)
    trainer = _trainer(context, run, data, plan, stopper, lambda epoch: record.write(**_progress(run)))
    model = trainer.ensemble
    costs = {"macs": list(model.macs()), "parameters": list(model.parameter_counts()), "leaves": list(model.sizes)}
    final: dict[str, Any] = {}
    try:
        final = {"final": trainer.fit()[-1]}
    except TrainingInterrupted:
        if not stopper.stopped:  # a signal from outside
            raise
    finally:
        record.note_clocks()
        record.write(**_progress(run), **costs, **final)
    return "" if final else _left(record.content, training, number)


def _trainer(
    context: Context,
    run: Run,
    data: dict[str, Split],
    plan: dict[str, Any],
    stopper: Stopper,
    before_epoch: Callable[[int], Any],
) -> Trainer:
    """hierens' trainer, with the images on the device."""
    config, device = run.train, context.device
    train_images = DeviceImages(
        data["train"], run.data, device, config.seed, True, stopper.training, before_epoch=before_epoch
    )
    test_images = DeviceImages(data["test"], run.data, device, before_batch=stopper.validation)
    model: Any = create_ensemble(run, len(data["train"].classes))
    if plan["executor"]:
        model.set_executor(plan["executor"])
    model.pretrained_cfg["label_names"] = list(data["train"].classes)
    loaders = loader(train_images, config.batch_size, True), loader(test_images, config.val_batch_size, False)
    return Trainer(model, config, *loaders)


def _settled(
    context: Context, training: str, started: Path | None, data: dict[str, Split], shape: Shape
) -> dict[str, Any]:
    """The plan of a training: its own if it has started, else the common one if it exists, else a new one."""
    folder = context.runs / training
    own = folder / f"{PLAN}.json"
    if started is not None:
        if not own.is_file():
            raise ValueError(f"{folder} has checkpoints but no {own.name}: copy the whole folder.")
        return dict(json.loads(own.read_text()))
    there = read(context.results, TRAININGS[training].plan)
    plan = there["plan"] if there and "plan" in there else make_plan(context, data, shape, training)
    write_whole(own, json.dumps(plan, indent=1) + "\n")
    return dict(plan)


def _lines(folder: Path) -> list[dict[str, Any]]:
    file = folder / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _rates(folder: Path) -> list[float]:
    return [line["images_per_s"] for line in _lines(folder) if "images_per_s" in line]


def _progress(run: Run) -> dict[str, Any]:
    """Progress of a run, from its log and its newest checkpoint."""
    folder = Path(run.train.output_dir)
    lines, newest = _lines(folder), newest_checkpoint(folder)
    state = json.loads((newest / "trainer.json").read_text())["state"] if newest else {"epoch": 0, "step": 0}
    validated = [{key: line[key] for key in ("epoch", "accuracy")} for line in lines if "val_loss" in line]
    steps = [line for line in lines if "images_per_s" in line]
    middle = {name: statistics.median(line[name] for line in steps) for name in ("images_per_s", "data_wait") if steps}
    return {
        "epochs": run.train.epochs,
        "done": state["epoch"],
        "updates": state["step"],
        "history": validated,
        **middle,
    }


def _left(content: dict[str, Any], training: str, number: int) -> str:
    epochs = content["epochs"] - content["done"]
    minutes = epochs * content["plan"]["epoch_s"] / 60
    return f"{epochs} of {content['epochs']} epochs, about {minutes:.0f} minutes: train-{training}-{number + 1}"


def _shared(run: Run) -> dict[str, Any]:
    """The configuration without paths."""
    config = to_json(run)
    config["train"]["output_dir"] = "DIR"
    return config
