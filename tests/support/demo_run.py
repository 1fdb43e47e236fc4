"""A short run of the preset `digits` as a process: python -m support.demo_run OUTPUT_DIR [SETTINGS AS JSON]."""

import dataclasses
import json
import os
import sys

import torch

import hierens.training.run
from hierens.training.presets import PRESETS
from hierens.training.run import Run, train


def main(output_dir, settings):
    torch.set_num_threads(1)
    if isinstance(settings, list):  # one run after the other in this process
        for number, own in enumerate(settings):
            main(f"{output_dir}/{number}", own)
        return
    if sharded := settings.pop("sharded", None):
        for number, value in enumerate(sharded):
            if value:
                os.environ["ACCELERATE_USE_FSDP"] = value
            main(f"{output_dir}/{number}", dict(settings))
        return
    data = {key: settings.pop(key) for key in ("augment", "workers") if key in settings}
    digits = PRESETS["digits"]
    model = {key: settings.pop(key) for key in ("blocks", "members") if key in settings}
    executor = settings.pop("executor", "auto")
    backbone_args = digits.model.backbone_args | settings.pop("backbone_args", {})
    short = {"epochs": 2, "batch_size": 32, "checkpoint_steps": 7, "log_steps": 1, "output_dir": output_dir}
    run = Run(
        dataclasses.replace(digits.data, **data),
        dataclasses.replace(digits.model, backbone_args=backbone_args, **model),
        dataclasses.replace(digits.train, **short | settings),
    )
    if executor != "auto":
        run_as(executor)
    train(run)


def run_as(executor):
    """Let every level of the trees that are made from now on run with this executor."""
    create = hierens.training.run.create_ensemble

    def created(*args):
        model = create(*args)
        for level in model.all_levels():
            level.executor = executor
        return model

    hierens.training.run.create_ensemble = created


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
