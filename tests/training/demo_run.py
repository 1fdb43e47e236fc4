"""The example's demo, shortened, as a process of its own that tests can kill or start twice: OUTPUT_DIR [JSON]."""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import torch
import train_imagenet


def main(output_dir, settings):
    torch.set_num_threads(1)
    data = {key: settings.pop(key) for key in ("augment", "workers") if key in settings}
    demo = train_imagenet.DEMO
    blocks = settings.pop("blocks", demo.model.blocks)
    backbone_args = demo.model.backbone_args | settings.pop("backbone_args", {})
    short = {"epochs": 2, "batch_size": 32, "checkpoint_steps": 7, "log_steps": 1, "output_dir": output_dir}
    run = train_imagenet.Run(
        dataclasses.replace(demo.data, **data),
        dataclasses.replace(demo.model, blocks=blocks, backbone_args=backbone_args),
        dataclasses.replace(demo.train, **short | settings),
    )
    train_imagenet.train(run)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
