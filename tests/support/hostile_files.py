"""Attacks by untrusted files: configs, folders, policies, tuning files and checkpoints.

Every kind of attack (`ATTACKS`) prepares valid files once. Then it takes a seeded generator, changes the files, and
returns a call that loads them. The call must return or raise a `ValueError` of one line, with little memory and time.
"""

import contextlib
import copy
import json
import os
import random
import shutil

import timm
import torch

import hierens
from hierens.inference.policies import Confidence, Deadline, FixedDepth, Load, load_policy, save_policy
from hierens.models import tuning
from support.attempts import attempt
from support.hostile_checkpoints import checkpoints
from support.hostile_configs import saved_models, wrong_config
from support.hostile_values import as_json, change_weights, damaged_bytes, with_wrong_values
from support.networks import tiny_tree

SAMPLE = {"configs": 100, "folders": 25, "policies": 60, "tuning files": 40, "checkpoints": 12}  # attacks in a test
FULL = {"configs": 10_000, "folders": 500, "policies": 100, "tuning files": 100, "checkpoints": 100}


def _configs(folder):
    saved, backbones = saved_models(folder), timm.list_models()
    configs = {path: json.loads((path / "config.json").read_text()) for path in saved}

    def attack(random):
        path = random.choice(saved)
        (path / "config.json").write_text(wrong_config(random, configs[path], backbones), encoding="utf-8")

        def load():
            hierens.from_pretrained(path).macs()

        return load

    return attack


def _folders(folder):
    saved = saved_models(folder / "good")
    for path in saved:
        save_policy(Confidence((0.9,)), path)

    def attack(random):
        path = folder / "bad"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(random.choice(saved), path)
        for _ in range(random.choice([1, 1, 2])):
            _damage(random, path, saved)

        def load():
            hierens.from_pretrained(path).macs()
            load_policy(path)

        return load

    return attack


def _damage(random, path, saved):
    file = path / random.choice(["config.json", "model.safetensors", "model.safetensors", "policy.json"])
    trick = random.randrange(7)
    if not file.is_file() or trick == 0:
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
    elif trick == 1:
        shutil.copy(random.choice(saved) / random.choice(["config.json", "model.safetensors", file.name]), file)
    elif trick == 2:
        file.unlink()
        [file.mkdir, lambda: file.symlink_to(file.name), lambda: file.symlink_to("/dev/zero"), lambda: os.mkfifo(file)][
            random.randrange(4)
        ]()
    elif trick == 3 and file.suffix == ".safetensors":
        with contextlib.suppress(Exception):  # what was spoilt before
            change_weights(random, file)
    else:
        file.write_bytes(damaged_bytes(random, file.read_bytes()))


def _policies(folder):
    kinds = [FixedDepth(1), FixedDepth(leaves=2), Deadline(5.0), Load(2, target_ms=50.0), Confidence((0.9, 0.8))]
    model, images, file = tiny_tree(channels=(4, 4, 8)), torch.randn(2, 1, 16, 16), folder / "policy.json"

    def attack(random):
        values = with_wrong_values(random, random.choice(kinds).to_dict())
        if isinstance(values, dict) and random.random() < 0.3:
            values["policy"] = random.choice(kinds).kind
        file.write_text(as_json(random, values))

        def load():
            policy = load_policy(file)
            assert len(policy(model, images).leaves) == 2
            if isinstance(policy, Load):
                assert 0 <= policy.observe(3, 10.0) <= policy.max_depth

        return load

    return attack


def _tunings(folder):
    model, images, file = tiny_tree(channels=(4, 4, 8)).fuse(), torch.randn(2, 1, 16, 16), folder / "tuning.json"
    tuning._SECONDS, tuning._REPEATS = 0.0, 1
    model.tune(images, file=file)
    records = json.loads(file.read_text())
    expected = model(images)

    def attack(random):
        values = with_wrong_values(random, records)
        if random.random() < 0.5 and isinstance(values, list) and values and isinstance(values[0], dict):
            values[0] |= {key: records[0][key] for key in ("machine", "model", "size")}
        file.write_text(as_json(random, values))

        def load():
            fresh = copy.deepcopy(model)
            fresh.tune(images, file=file)
            assert torch.allclose(fresh(images), expected, atol=1e-4)

        return load

    return attack


ATTACKS = {
    "configs": _configs,
    "folders": _folders,
    "policies": _policies,
    "tuning files": _tunings,
    "checkpoints": checkpoints,
}


def storm(name, count, folder, seed=0, log=None):
    """The outcomes of `count` attacks of one kind, in order. Other errors are raised at the end, all together."""
    attack, outcomes, failed = ATTACKS[name](folder), [], []
    for number in range(count):
        own = random.Random(f"{name}-{seed}-{number}")
        torch.manual_seed(number)
        try:
            outcomes.append(attempt(attack(own)))
        except Exception as error:
            error.add_note(f"{name}: number {number} of seed {seed}")
            failed.append(error)
            if log:
                log(f"{name}: number {number} of seed {seed}: {type(error).__name__}: {str(error)[:300]}")
        if log and outcomes and number % 100 == 99:
            log(name, number + 1, max(outcomes, key=lambda outcome: outcome.mib))
    if failed:
        raise ExceptionGroup(f"{len(failed)} of {count} ended otherwise", failed)
    return outcomes
