"""The example's demo, shortened, as a process of its own that tests can kill or start twice: OUTPUT_DIR [JSON]."""

import dataclasses
import json
import sys

import torch

from hierens.training.presets import PRESETS
from hierens.training.run import Run, train


def main(output_dir, settings):
    torch.set_num_threads(1)
    data = {key: settings.pop(key) for key in ("augment", "workers") if key in settings}
    demo = PRESETS["demo"]
    blocks = settings.pop("blocks", demo.model.blocks)
    backbone_args = demo.model.backbone_args | settings.pop("backbone_args", {})
    short = {"epochs": 2, "batch_size": 32, "checkpoint_steps": 7, "log_steps": 1, "output_dir": output_dir}
    run = Run(
        dataclasses.replace(demo.data, **data),
        dataclasses.replace(demo.model, blocks=blocks, backbone_args=backbone_args),
        dataclasses.replace(demo.train, **short | settings),
    )
    train(run)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
