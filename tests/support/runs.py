"""Training runs of seconds, in this process, and what a run leaves in its folder."""

import copy
import json
import time
from functools import cache
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import hierens
from hierens.training.config import TrainConfig
from hierens.training.trainer import Trainer
from support.networks import tiny_backbone

_TIMED = ("images_per_s", "data_wait")


def made_up_data(images=96, seed=0):
    """Two classes that differ in brightness, so that a few steps suffice."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(images) % 2
    return TensorDataset(torch.randn(images, 1, 16, 16, generator=generator) + targets[:, None, None, None], targets)


@cache
def _tree(blocks, init, **sharing):
    arguments = {"init": init, "seed": 0, "looped": {}, **sharing}
    return hierens.hierensify(tiny_backbone((8, 8, 8), num_classes=2), blocks, **arguments)


def trainer(
    directory, batch_size=32, data=None, init="reinit", blocks=3, teacher=None, teacher_config=None, **settings
):
    """A trainer of a tiny tree on made-up data."""
    sharing = {name: settings.pop(name) for name in ("members", "rank") if name in settings}
    model = copy.deepcopy(_tree(blocks, init, **sharing))
    torch.manual_seed(0)
    defaults = {"epochs": 2, "lr": 0.02, "cpu": True, "log_steps": 1, "checkpoint_steps": 100}
    config = TrainConfig(output_dir=str(directory), batch_size=batch_size, **defaults | settings)
    micro = batch_size // config.accumulation
    data = data or made_up_data()
    loaders = DataLoader(data, micro, shuffle=True, drop_last=True), DataLoader(made_up_data(40, 1), 32)
    return Trainer(model, config, *loaders, teacher, teacher_config)


def weights(directory):
    return (Path(directory) / "model" / "model.safetensors").read_bytes()


def log(directory):
    """The records of the log, without measured times."""
    records = [json.loads(line) for line in (Path(directory) / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in _TIMED} for record in records]


def wait_for_log(directory, lines, timeout=200):
    """Wait until the log has this number of lines."""
    file, deadline = Path(directory) / "log.jsonl", time.monotonic() + timeout
    while not file.exists() or file.read_text().count("\n") < lines:
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(0.002)
