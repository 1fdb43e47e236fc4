"""Values, texts and bytes that untrusted files may hold, drawn by a seeded generator."""

import copy
import json

import torch
from safetensors.torch import load_file, save_file

_NUMBERS = [0, -1, 1, 2, 3, 7, 64, 255, 4097, 65_536, 65_537, 10**6, 10**9, 2**31, 2**63, 10**30, -(10**9), True, False]
_NUMBERS += [0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf")]
_STRINGS = ["", "\x00", "\ud800", "ﬀ\u202e𝔘", "x" * 100_000, "hf-hub:a/b", "local-dir:/tmp", "../../etc/passwd"]
_STRINGS += ["layer1", "conv1", "fc", "auto", "avg", "hne", "multi_exit", "resnet18", "vit_tiny_patch16_224"]
KEYS = ["channels", "layers", "depths", "dims", "embed_dim", "depth", "img_size", "window_size", "patch_size"]
KEYS += ["num_heads", "stem_stride", "stem_width", "output_stride", "cardinality", "base_width", "block", "act_layer"]
KEYS += ["norm_layer", "mlp_ratio", "drop_path_rate", "global_pool", "pretrained", "checkpoint_path", "block_args"]
KEYS += ["pretrained_cfg", "features_only", "kernel_size", "channel_multiplier", "depth_multiplier", "fix_stem"]
KEYS += ["a\nb", "\ud800", "\x1b[31m", "x" * 10_000]

_LONGEST = 64 * 2**20  # bytes of a value as text, so that writing it does not exhaust memory
_PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452")
_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
_FOREIGN = [b"", b"\x00" * 4096, b"null", b"[]", b"{}", b"<html>404</html>", _PNG, _POINTER, b"\xef\xbb\xbf{}"]
_FOREIGN += [b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"\xff" * 8 + b"{}", (2**20).to_bytes(8, "little") + b"{" * 64]
_TYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.int64, torch.float8_e4m3fn]


def places(value, path=()):
    """The path of every value in nested dictionaries and lists."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:50]) if isinstance(value, list) else ()
    for key, inner in items if len(path) < 12 else ():
        yield from places(inner, (*path, key))


def nasty(random, depth=0):
    """Any value that JSON can hold, often an extreme one."""
    kind = random.randrange(9 if depth < 3 else 5)
    if kind < 3:
        return random.choice(_NUMBERS)
    if kind == 3:
        return random.choice(_STRINGS)
    if kind == 4:
        return None
    if kind == 5:
        value, times = nasty(random, depth + 1), random.choice([0, 1, 2, 3, 4, 5, 300, 20_000 if depth == 0 else 7])
        return [value] * (times if len(repr(value)) * times <= _LONGEST else 7)
    if kind == 6:
        return [nasty(random, depth + 1) for _ in range(random.randrange(5))]
    if kind == 7:
        return {random.choice(KEYS): nasty(random, depth + 1) for _ in range(random.randrange(4))}
    nested = []
    for _ in range(random.choice([5, 50, 400])):
        nested = [nested]
    return nested


def damaged_bytes(random, data):
    """The bytes of a file truncated, with changed bytes, or replaced."""
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


def with_wrong_values(random, value):
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


def as_json(random, value):
    """JSON, in some cases damaged, deeply nested or very long."""
    text = json.dumps(value)
    trick = random.randrange(25)
    if trick == 0:
        return "[" * 100_000 + text
    if trick == 1:
        return text[: random.randrange(len(text) + 1)]
    if trick == 2:
        return text + " " * 40_000_000
    return text.replace("1", "1" * 5000, 1) if trick == 3 else text


def change_weights(random, file):
    """Change types, shapes, names or values of stored tensors."""
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
