"""Saves models over each other until it is killed: python -m support.saver FOLDER SEED KILLS.

A parent that has imported everything forks a process that saves. It kills that process at a random moment or while
files are being moved, waits until a reader has loaded what is there, and forks the next. A reader writes a byte to
stdin after every load. The parent prints a line when the first model is saved, and at the end the places of its kills.
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

import torch

from hierens.inference.policies import Confidence, FixedDepth
from support.networks import tiny_tree

POLICIES = [Confidence((0.9,)), FixedDepth(1), None]
RESULTS = {"accuracy (%)": [90.0, 91.0, 92.0]}


def models():
    """Two that differ only in their weights, and a smaller one."""
    whole, other = tiny_tree(seed=0), tiny_tree(seed=1)
    return [mark(model, number) for number, model in enumerate((whole, other, other.at_depth(1)))]


def mark(model, number):
    """Fill all weights with the number of the model."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(number + 1)
    return model


def marks(model):
    """The numbers of the models whose weights these are."""
    return {int(value) - 1 for parameter in model.parameters() for value in parameter.unique().tolist()}


def save(made, number, folder):
    results = RESULTS if number < 2 else None
    made[number].save_pretrained(folder, results=results, policy=POLICIES[number], picture=number == 0)


def await_load():
    """Wait for a load that begins after this call: the second one that ends."""
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
