"""Saved configs with wrong values, drawn by a seeded generator."""

import copy
import json
from functools import cache

import timm

import hierens
from support.hostile_values import KEYS, nasty, places
from support.networks import tiny_backbone

_DESCRIBED = ["input_size", "test_input_size", "mean", "std", "crop_pct", "interpolation", "crop_mode", "pool_size"]
_DESCRIBED += ["fixed_input_size", "tags", "license", "label_names", "label_descriptions"]


@cache
def _models():
    small = tiny_backbone((4, 4, 8))
    return {
        "tree": hierens.hierensify(small, 3),
        "exits": hierens.multi_exit(small, 3, weights="linear_rising"),
        "tree with exits": hierens.tree_with_exits(small, 2),
        "light tree": hierens.hierensify(small, 3, members=("full", "rank1", "lora"), rank=1),
        "transformer": hierens.hierensify(timm.create_model("test_vit", num_classes=3), 2),
    }


def saved_models(folder):
    """Folders of saved models: a tree, a multi-exit network, a tree with exits, a light tree, a transformer."""
    for name, model in _models().items():
        model.save_pretrained(folder / name)
    return [folder / name for name in _models()]


def wrong_config(random, config, backbones):
    """A config as text with one to four wrong values."""
    config = copy.deepcopy(config)
    for _ in range(random.choice([1, 1, 1, 2, 3, 4])):
        args = config.get("model_args")
        trick = random.randrange(13)
        if trick < 4 and isinstance(args, dict):
            further = args.get("backbone_args")
            further = further if isinstance(further, dict) else args.setdefault("backbone_args", {})
            if isinstance(further, dict):
                further[random.choice(KEYS)] = nasty(random)
        elif trick == 4 and isinstance(args, dict):
            args["backbone"] = random.choice(backbones)
            if random.random() < 0.5:
                args["backbone_args"] = {}
        elif trick == 12 and isinstance(config.get("pretrained_cfg"), dict):
            name = random.choice(_DESCRIBED)
            size = [random.choice([1, 3, 32, 1024, 4096, 65_536]) for _ in range(3)]
            value = size if "size" in name and random.random() < 0.7 else nasty(random)
            (config if "label" in name else config["pretrained_cfg"])[name] = value
        else:
            *parents, last = random.choice(list(places(config))[1:] or [("model_args",)])
            target = config
            for key in parents:
                target = target[key]
            if trick < 7 and isinstance(target, dict):
                target.pop(last, None)
            elif trick == 7 and isinstance(target, dict):
                target[random.choice(KEYS)] = nasty(random)
            else:
                target[last] = nasty(random)
    text = json.dumps(config)
    return {
        0: lambda: text[: random.randrange(len(text))],
        1: lambda: text.replace("[", "[" * 100_000, 1),
        2: lambda: text.replace("{", '{"a":' * 100_000 + "1" + "}" * 100_000 + "{", 1),
        3: lambda: text.replace("10", "1" * random.choice([500, 5000]), 1),
    }.get(random.randrange(60), lambda: text)()
