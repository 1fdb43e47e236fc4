"""Saves models over each other without end, and is killed: FOLDER SEED KILLS.

A parent that has imported everything forks the one that saves, kills it at a random moment or while its files are being
moved, and forks the next when somebody has loaded what that left: readers write a byte to stdin for every load. It
prints a line when the first model is there, and at last how often what was hit.
"""

import json
import os
import random
import select
import signal
import sys
import time
from itertools import cycle
from pathlib import Path

import timm
import torch

import hierens
from hierens.inference.policies import Confidence, FixedDepth

POLICIES = [Confidence((0.9,)), FixedDepth(1), None]
RESULTS = {"accuracy (%)": [90.0, 91.0, 92.0]}


def models():
    """Two that differ in weights only, and a smaller one."""
    torch.manual_seed(0)
    backbone = timm.create_model("resnet8_cifar", channels=(8, 8, 16), in_chans=1)
    whole = hierens.hierensify(backbone, 3, init="reinit", seed=0, looped={}).eval()
    other = hierens.hierensify(backbone, 3, init="reinit", seed=1, looped={}).eval()
    return [mark(model, number) for number, model in enumerate((whole, other, other.at_depth(1)))]


def mark(model, number):
    """Every weight of a model says which one it is."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(number + 1)
    return model


def marks(model):
    """Which models the weights are of."""
    return {int(value) - 1 for parameter in model.parameters() for value in parameter.unique().tolist()}


def save(made, number, folder):
    results = RESULTS if number < 2 else None
    made[number].save_pretrained(folder, results=results, policy=POLICIES[number], picture=number == 0)


def await_load():
    """Wait for a load that began after now: the second one to end from now on."""
    os.set_blocking(0, False)
    while os.read(0, 4096) if select.select([0], [], [], 0)[0] else b"":
        pass
    os.set_blocking(0, True)
    assert os.read(0, 1) and os.read(0, 1)


def main(folder, seed, kills):
    torch.set_num_threads(1)
    made, rng, hit = models(), random.Random(seed), {"before": 0, "while moving": 0, "other": 0}
    save(made, 0, folder)
    began = time.monotonic()
    save(made, 1, folder)
    seconds = time.monotonic() - began
    print("ready", flush=True)
    for _ in range(kills):
        order = cycle(rng.sample(range(3), 3))
        process = os.fork()
        if process == 0:
            for number in order:
                save(made, number, folder)
        time.sleep(rng.uniform(0, 3 * seconds))
        deadline = time.monotonic() + 5 * seconds
        aimed, saved = rng.random() < 0.5, Path(folder, ".cache/huggingface/hierens/saved")
        while aimed and not saved.exists() and time.monotonic() < deadline:
            pass
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        hit["while moving" if saved.exists() else "before" if saved.parent.exists() else "other"] += 1
        await_load()
    save(made, 2, folder)
    print(json.dumps(hit), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
