"""The example's demo, shortened, as a process of its own that tests can kill or start twice: OUTPUT_DIR [JSON]."""

import dataclasses
import json
import sys

import torch

from hierens.training.presets import PRESETS
from hierens.training.run import Run, train

if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    data = {key: settings.pop(key) for key in ("augment", "workers") if key in settings}
    demo = PRESETS["demo"]
    short = {"epochs": 2, "batch_size": 32, "checkpoint_steps": 7, "log_steps": 1, "output_dir": sys.argv[1]}
    run = Run(dataclasses.replace(demo.data, **data), demo.model, dataclasses.replace(demo.train, **short | settings))
    train(run)
