"""Configs that strangers might write: saved ones with values replaced by whatever hurts, by a seed."""

import copy
import json
import resource
from contextlib import contextmanager
from pathlib import Path

import timm
import torch

import hierens

ROOM = 2**30  # bytes that loading may take beyond what the process has
LONGEST = 64 * 2**20  # of a value as text: what writes these shall not run out of memory itself
_NUMBERS = [0, -1, 1, 2, 3, 7, 64, 255, 4097, 65_536, 65_537, 10**6, 10**9, 2**31, 2**63, 10**30, -(10**9), True, False]
_NUMBERS += [0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf")]
_STRINGS = ["", "\x00", "\ud800", "ﬀ\u202e𝔘", "x" * 100_000, "hf-hub:a/b", "local-dir:/tmp", "../../etc/passwd"]
_STRINGS += ["layer1", "conv1", "fc", "auto", "avg", "hne", "multi_exit", "resnet18", "vit_tiny_patch16_224"]
_OFTEN = ["channels", "layers", "depths", "dims", "embed_dim", "depth", "img_size", "window_size", "patch_size"]
_OFTEN += ["num_heads", "stem_stride", "stem_width", "output_stride", "cardinality", "base_width", "block", "act_layer"]
_OFTEN += ["norm_layer", "mlp_ratio", "drop_path_rate", "global_pool", "pretrained", "checkpoint_path", "block_args"]
_OFTEN += ["pretrained_cfg", "features_only", "kernel_size", "channel_multiplier", "depth_multiplier", "fix_stem"]
_OFTEN += ["a\nb", "\ud800", "\x1b[31m", "x" * 10_000]
_DESCRIBED = ["input_size", "test_input_size", "mean", "std", "crop_pct", "interpolation", "crop_mode", "pool_size"]
_DESCRIBED += ["fixed_input_size", "tags", "license", "label_names", "label_descriptions"]


def bases(folder):
    """Saved models to start from: a tree, with exits and without, a multi-exit network, a transformer."""
    torch.manual_seed(0)
    small = timm.create_model("resnet8_cifar", channels=(4, 4, 8), in_chans=1)
    transformer = timm.create_model("test_vit", num_classes=3)
    models = {
        "tree": hierens.hierensify(small, 3),
        "exits": hierens.multi_exit(small, 3, weights="linear_rising"),
        "tree with exits": hierens.tree_with_exits(small, 2),
        "transformer": hierens.hierensify(transformer, 2),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return [folder / name for name in models]


def places(value, path=()):
    """The path of every value of nested dictionaries and lists."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:50]) if isinstance(value, list) else ()
    for key, inner in items if len(path) < 12 else ():
        yield from places(inner, (*path, key))


def nasty(random, depth=0):
    """Any value that JSON can say."""
    kind = random.randrange(9 if depth < 3 else 5)
    if kind < 3:
        return random.choice(_NUMBERS)
    if kind == 3:
        return random.choice(_STRINGS)
    if kind == 4:
        return None
    if kind == 5:
        value, times = nasty(random, depth + 1), random.choice([0, 1, 2, 3, 4, 5, 300, 20_000 if depth == 0 else 7])
        return [value] * (times if len(repr(value)) * times <= LONGEST else 7)
    if kind == 6:
        return [nasty(random, depth + 1) for _ in range(random.randrange(5))]
    if kind == 7:
        return {random.choice(_OFTEN): nasty(random, depth + 1) for _ in range(random.randrange(4))}
    nested = []
    for _ in range(random.choice([5, 50, 400])):
        nested = [nested]
    return nested


def hostile(random, config, backbones):
    """A config as text, with one to four things wrong."""
    config = copy.deepcopy(config)
    for _ in range(random.choice([1, 1, 1, 2, 3, 4])):
        args = config.get("model_args")
        trick = random.randrange(13)
        if trick < 4 and isinstance(args, dict):
            further = args.get("backbone_args")
            further = further if isinstance(further, dict) else args.setdefault("backbone_args", {})
            if isinstance(further, dict):
                further[random.choice(_OFTEN)] = nasty(random)
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
                target[random.choice(_OFTEN)] = nasty(random)
            else:
                target[last] = nasty(random)
    text = json.dumps(config)
    return {
        0: lambda: text[: random.randrange(len(text))],
        1: lambda: text.replace("[", "[" * 100_000, 1),
        2: lambda: text.replace("{", '{"a":' * 100_000 + "1" + "}" * 100_000 + "{", 1),
        3: lambda: text.replace("10", "1" * random.choice([500, 5000]), 1),
    }.get(random.randrange(60), lambda: text)()


@contextmanager
def little_memory(room=ROOM):
    """So many bytes of address space more than there are now, and none after them."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def starved(error):
    """Whether memory ran out somewhere below an error."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
