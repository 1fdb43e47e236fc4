"""The preset `digits`, shortened, as a process of its own that tests can kill or start twice: OUTPUT_DIR [JSON]."""

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
    if sharded := settings.pop("sharded", None):
        for number, value in enumerate(sharded):  # one run after the other in this process
            if value:
                os.environ["ACCELERATE_USE_FSDP"] = value
            main(f"{output_dir}/{number}", dict(settings))
        return
    data = {key: settings.pop(key) for key in ("augment", "workers") if key in settings}
    digits = PRESETS["digits"]
    blocks = settings.pop("blocks", digits.model.blocks)
    executor = settings.pop("executor", "auto")
    backbone_args = digits.model.backbone_args | settings.pop("backbone_args", {})
    short = {"epochs": 2, "batch_size": 32, "checkpoint_steps": 7, "log_steps": 1, "output_dir": output_dir}
    run = Run(
        dataclasses.replace(digits.data, **data),
        dataclasses.replace(digits.model, blocks=blocks, backbone_args=backbone_args),
        dataclasses.replace(digits.train, **short | settings),
    )
    if executor != "auto":
        run_as(executor)
    train(run)


def run_as(executor):
    """Every level of the trees made from now on runs this way."""
    create = hierens.training.run.create_ensemble

    def created(*args):
        model = create(*args)
        for level in model.all_levels():
            level.executor = executor
        return model

    hierens.training.run.create_ensemble = created


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
