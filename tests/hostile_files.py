"""Files that strangers might put beside a model or into a run: damaged, swapped, foreign, or with values that hurt.

Every kind of attack (`ATTACKS`) prepares good files once and then answers a seeded generator with something to try.
What comes of it is a model (a policy, a tuned model, a run that goes on) or one line, in little memory and time.
"""

import collections
import contextlib
import copy
import io
import json
import os
import pickle
import random
import re
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from hostile import bases, hostile, little_memory, nasty, places, starved
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset

import hierens
from hierens.inference.policies import Confidence, Deadline, FixedDepth, Load, load_policy
from hierens.models import tuning
from hierens.training.checkpoints.files import MANIFEST, seal
from hierens.training.config import TrainConfig
from hierens.training.trainer import Trainer

_PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452")
_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
_FOREIGN = [b"", b"\x00" * 4096, b"null", b"[]", b"{}", b"<html>404</html>", _PNG, _POINTER, b"\xef\xbb\xbf{}"]
_FOREIGN += [b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"\xff" * 8 + b"{}", (2**20).to_bytes(8, "little") + b"{" * 64]
_TYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.int64, torch.float8_e4m3fn]


@dataclass
class Outcome:
    """What became of one attempt."""

    said: str
    seconds: float
    """of CPU"""
    wall: float
    mib: float
    """by which the process grew meanwhile"""


@contextlib.contextmanager
def _memory():
    """A function that tells the MiB by which the process has grown since, at its largest."""

    def status(field):
        return int(re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the largest size so far is forgotten
    before = status("VmRSS")
    yield lambda: max(0.0, status("VmHWM") - before)


def attempt(call):
    """Run a call that may load something or raise a ValueError of one line; anything else is raised."""
    start, wall, printed = time.process_time(), time.perf_counter(), io.StringIO()
    with _memory() as grown, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            with little_memory(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                said = call() or "loaded"
        except ValueError as error:
            said = str(error)
            assert "\n" not in said and len(said) <= 1200 and said.encode(), f"not one line: {said[:2000]!r}"
            assert not starved(error), f"memory ran out: {said}"
        mib = grown()
    spam = [str(w.message) for w in warned] + printed.getvalue().splitlines()
    assert len(spam) <= 20 and all(len(line) <= 1200 for line in spam), f"too many words: {spam[:30]}"
    return Outcome(said, time.process_time() - start, time.perf_counter() - wall, mib)


def storm(name, count, folder, seed=0, log=None):
    """So many attacks of a kind: the outcomes, in order. What ended otherwise is raised at the end, all together."""
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


def summary(outcomes, folder):
    """How often each thing was said, without places and values."""
    plain = (outcome.said.replace(str(folder), "") for outcome in outcomes)
    return collections.Counter(re.sub(r"^[\w/.-]*/|'.*|\d+", "", text)[:50] for text in plain)


def _spoilt(random, data):
    """Bytes of a file, cut, flipped or of something else."""
    trick = random.randrange(4)
    if trick == 0:
        return data[: random.randrange(len(data) + 1)]
    if trick == 1:
        return random.choice(_FOREIGN)
    if trick == 2:
        return random.randbytes(random.choice([1, 100, 10_000]))
    spoilt = bytearray(data)
    for _ in range(random.choice([1, 10, 100])):
        place = random.choice([random.randrange(len(data)), random.randrange(min(200, len(data)))])
        spoilt[place] = random.randrange(256)
    return bytes(spoilt)


def _with_other_values(random, value):
    """Plain values with one to three of them replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(random.choice([1, 1, 2, 3])):
        *parents, last = random.choice(list(places(value))[1:] or [(None,)])
        target = value
        for key in parents:
            target = target[key]
        if not isinstance(target, (dict, list)) or last is None:
            return nasty(random)
        trick = random.randrange(6)
        if trick == 0 and isinstance(target, dict):
            target.pop(last)
        elif trick == 1 and isinstance(target, dict):
            target[random.choice(["depth", "step", "machine", "a\nb", "\ud800", "x" * 10_000])] = nasty(random)
        else:
            target[last] = nasty(random)
    return value if random.random() > 0.03 else nasty(random)


def _text(random, value):
    """As JSON, now and then of no such shape."""
    text = json.dumps(value)
    trick = random.randrange(25)
    if trick == 0:
        return "[" * 100_000 + text
    if trick == 1:
        return text[: random.randrange(len(text) + 1)]
    if trick == 2:
        return text + " " * 40_000_000
    return text.replace("1", "1" * 5000, 1) if trick == 3 else text


def _configs(folder):
    saved, backbones = bases(folder), timm.list_models()
    configs = {path: json.loads((path / "config.json").read_text()) for path in saved}

    def attack(random):
        path = random.choice(saved)
        (path / "config.json").write_text(hostile(random, configs[path], backbones), encoding="utf-8")

        def load():
            hierens.from_pretrained(path).macs()

        return load

    return attack


def _folders(folder):
    saved = bases(folder / "good")
    for path in saved:
        hierens.inference.policies.save_policy(Confidence((0.9,)), path)

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
            _change_weights(random, file)
    else:
        file.write_bytes(_spoilt(random, file.read_bytes()))


def _change_weights(random, file):
    weights = load_file(file)
    for name in random.sample(sorted(weights), random.choice([1, len(weights)])):
        trick = random.randrange(4)
        if trick == 0:
            weights[name] = weights[name].to(random.choice(_TYPES))
        elif trick == 1:
            weights[name] = weights[name].flatten()[:1].clone()
        elif trick == 2:
            weights[random.choice(["surprise", "a\nb", "x" * 10_000])] = weights.pop(name)
        else:
            weights[name] = torch.full_like(weights[name], float("nan") if weights[name].is_floating_point() else -1)
    save_file(weights, file)


def _tree():
    torch.manual_seed(0)
    return hierens.hierensify(timm.create_model("resnet8_cifar", channels=(4, 4, 8), in_chans=1), 3, looped={}).eval()


def _policies(folder):
    kinds = [FixedDepth(1), FixedDepth(leaves=2), Deadline(5.0), Load(2, target_ms=50.0), Confidence((0.9, 0.8))]
    model, images, file = _tree(), torch.randn(2, 1, 16, 16), folder / "policy.json"

    def attack(random):
        values = _with_other_values(random, random.choice(kinds).to_dict())
        if isinstance(values, dict) and random.random() < 0.3:
            values["policy"] = random.choice(kinds).kind
        file.write_text(_text(random, values))

        def load():
            policy = load_policy(file)
            assert len(policy(model, images).leaves) == 2
            if isinstance(policy, Load):
                assert 0 <= policy.observe(3, 10.0) <= policy.max_depth

        return load

    return attack


def _tunings(folder):
    model, images, file = _tree().fuse(), torch.randn(2, 1, 16, 16), folder / "tuning.json"
    tuning._SECONDS, tuning._REPEATS = 0.0, 1
    model.tune(images, file=file)
    records = json.loads(file.read_text())
    expected = model(images)

    def attack(random):
        values = _with_other_values(random, records)
        if random.random() < 0.5 and isinstance(values, list) and values and isinstance(values[0], dict):
            values[0] |= {key: records[0][key] for key in ("machine", "model", "size")}
        file.write_text(_text(random, values))

        def load():
            fresh = copy.deepcopy(model)
            fresh.tune(images, file=file)
            assert torch.allclose(fresh(images), expected, atol=1e-4)

        return load

    return attack


def _trainer(folder, **settings):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(64, 1, 16, 16, generator=generator), torch.arange(64) % 10)
    config = {"batch_size": 32, "lr": 1e-3, "cpu": True, "log_steps": 1, "optimizer": "adamw", "ema_decay": 0.9}
    loaders = DataLoader(data, 32, shuffle=True, drop_last=True), DataLoader(data, 32)
    return Trainer(_tree(), TrainConfig(output_dir=str(folder), **config | settings), *loaders)


class _Marks:
    """What writes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def _checkpoints(folder):
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
            file.write_text(_text(random, _with_other_values(random, json.loads(file.read_text()))))
    elif file.suffix == ".safetensors" and random.random() < 0.6:
        with contextlib.suppress(Exception):
            _change_weights(random, file)
    elif file.suffix in (".bin", ".pkl") and random.random() < 0.8:
        _change_states(random, file, mark)
    else:
        file.write_bytes(_spoilt(random, file.read_bytes()))


def _change_states(random, file, mark):
    trick = random.randrange(4)
    if trick == 0:
        torch.save(random.choice([_Marks(mark), {"state": _Marks(mark)}, nasty(random)]), file)
        return
    if trick == 1:
        file.write_bytes(pickle.dumps(_Marks(mark)))
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


ATTACKS = {
    "configs": _configs,
    "folders": _folders,
    "policies": _policies,
    "tuning files": _tunings,
    "checkpoints": _checkpoints,
}
