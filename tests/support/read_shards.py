"""What one process of a distributed run reads: python -m support.read_shards SETTINGS AS JSON, DIRECTORY."""

import json
import sys
from pathlib import Path

from accelerate import Accelerator

from hierens.training.config import DataConfig
from hierens.training.data.loaders import create_loaders, data_signature
from hierens.training.data.unreadable import check_readable


def main(settings, directory):
    """Write two epochs of training and one of validation as JSON."""
    settings |= {key: tuple(settings[key]) for key in ("input_size", "mean", "std")}
    for workers in (0, 2):
        data = DataConfig(**settings | {"augment": "none", "workers": workers})
        train, val = create_loaders(data, 8, 4, cpu=True)
        accelerator = Accelerator(cpu=True)
        train, val = accelerator.prepare(train, val)
        found = []
        for epoch in (0, 1):
            train.set_epoch(epoch)
            found.append([images.flatten(1)[:, ::50].tolist() for images, _ in train])
        targets = [target for _, batch in val for target in batch.tolist()]
        record = {"train": found, "val": targets, "signature": data_signature(train)}
        record["reported"] = check_readable(val, "validation", over=True)[:2]
        (Path(directory) / f"{accelerator.process_index}-{workers}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
