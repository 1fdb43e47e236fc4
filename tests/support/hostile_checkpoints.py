"""Attacks by checkpoints with damaged, swapped or forged files."""

import contextlib
import io
import json
import pickle
import shutil
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from hierens.training.checkpoints.files import MANIFEST, seal
from hierens.training.config import TrainConfig
from hierens.training.trainer import Trainer
from support.hostile_values import as_json, change_weights, damaged_bytes, nasty, with_wrong_values
from support.networks import tiny_tree


def _trainer(folder, **settings):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(64, 1, 16, 16, generator=generator), torch.arange(64) % 10)
    config = {"batch_size": 32, "lr": 1e-3, "cpu": True, "log_steps": 1, "optimizer": "adamw", "ema_decay": 0.9}
    loaders = DataLoader(data, 32, shuffle=True, drop_last=True), DataLoader(data, 32)
    return Trainer(tiny_tree(channels=(4, 4, 8)), TrainConfig(output_dir=str(folder), **config | settings), *loaders)


class Marker:
    """Writes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def checkpoints(folder):
    """Damages the checkpoint of a run of one epoch; the call resumes the run."""
    with contextlib.redirect_stdout(io.StringIO()):
        _trainer(folder / "good", epochs=1).fit()
    mark = folder / "unpickled"

    def attack(random):
        run = folder / "bad"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(folder / "good", run, symlinks=True)
        checkpoint = next((run / "checkpoints").glob("step-*"))
        for _ in range(random.choice([1, 1, 2])):
            _damage_checkpoint(random, checkpoint, mark)
        if random.random() < 0.85 and (checkpoint / MANIFEST).exists():
            (checkpoint / MANIFEST).unlink()
            seal(checkpoint)

        def load():
            _trainer(run, epochs=2).fit()
            assert not mark.exists(), "something was unpickled"

        return load

    return attack


def _damage_checkpoint(random, checkpoint, mark):
    names = ["trainer.json"] * 4 + ["optimizer.bin"] * 4 + ["random_states_0.pkl"] * 2
    file = checkpoint / random.choice([*names, "model.safetensors", "model_ema.safetensors", MANIFEST, "log.jsonl"])
    if file.name == "log.jsonl":
        lines = random.choices(
            ["{}", "[" * 100_000, "null", '{"step": "x"}', '{"val_loss": 1, "step": 1}', "\x00"], k=3
        )
        with (checkpoint.parents[1] / file.name).open("a") as log:
            log.writelines(f"{line}\n" for line in lines)
    elif not file.exists() or random.randrange(8) == 0:
        file.unlink(missing_ok=True)
    elif file.suffix == ".json" and random.random() < 0.8:
        with contextlib.suppress(ValueError):  # what was spoilt before
            file.write_text(as_json(random, with_wrong_values(random, json.loads(file.read_text()))))
    elif file.suffix == ".safetensors" and random.random() < 0.6:
        with contextlib.suppress(Exception):
            change_weights(random, file)
    elif file.suffix in (".bin", ".pkl") and random.random() < 0.8:
        _change_states(random, file, mark)
    else:
        file.write_bytes(damaged_bytes(random, file.read_bytes()))


def _change_states(random, file, mark):
    trick = random.randrange(4)
    if trick == 0:
        torch.save(random.choice([Marker(mark), {"state": Marker(mark)}, nasty(random)]), file)
        return
    if trick == 1:
        file.write_bytes(pickle.dumps(Marker(mark)))
        return
    with contextlib.suppress(Exception):  # what was spoilt before
        state = torch.load(file, weights_only=False)
        if file.suffix == ".pkl" or trick == 2:
            target = random.choice([state, *state.get("param_groups", [])])
        else:
            target = random.choice(list(state["state"].values()))
        name = random.choice(list(target))
        target[name] = random.choice([nasty(random), torch.zeros(3, 5, 7), torch.zeros(1).expand(10**12)])
        torch.save(state, file)
