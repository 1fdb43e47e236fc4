"""Checks a saved model from an untrusted source before memory or time is spent on building it.

A config names a network and its arguments, so it is a short program. First its values are checked. Then the network is
built without memory, on torch's meta device, where operations, FLOPs and sizes of values are counted and limited. Its
parameters must be exactly those in the header of the weights. The memory of the real model is then proportional to the
size of the file of weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hierens.branches.legacy_layout import first_layout, in_first_layout
from hierens.core.adaptive_base import AdaptiveBase
from hierens.core.errors import first_line
from hierens.core.fetching import LoadError
from hierens.core.json_files import is_finite, is_whole, read_json, short
from hierens.core.members import member_kinds
from hierens.core.predictions import Average
from hierens.hub.validate_config import check_labels, description

_SHARED = {"backbone", "backbone_args", "at", "num_classes", "in_chans"}
_OF_TREES = {"branching", "leaves", "looped", "members", "rank"}
ARGUMENTS = {
    "hne": _SHARED | _OF_TREES,
    "hne_exits": _SHARED | _OF_TREES | {"head"},
    "multi_exit": _SHARED | {"head", "collaborate", "weights", "learn_weights", "average", "boosted", "kept"},
}
"""the arguments of each entry point that a saved config may contain"""
TREES = ("hne", "hne_exits")

# Arguments of timm's factory itself: other weights, local files, functions to call, models that return features.
_FACTORY_ONLY = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn"),
    *("pretrained_model_args", "checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit", "model_cfg"),
    *("features_only", "feature_cfg", "kwargs_filter", "device", "dtype"),
}
_MOST_LEAVES, _MOST_LEVELS, _MOST_EXITS = 4096, 64, 256
_MOST_VALUES, _LARGEST, _LARGEST_SUM = 4096, 2**16, 2**20  # in a backbone's arguments
_LARGEST_NAMED = {"window": 64, "size": 4096, "resolution": 4096}  # timm loops over all pairs of positions in a window
_MOST_ELEMENTS = 2**28  # of one activation for the example image: 1 GiB in float32
_CALLS = (20_000, 200)  # allowed calls of operations, and further ones per tensor in the file (7 to 11 are usual)
_FLOPS = (10**11, 2**16)  # allowed FLOPs for the example image, and further ones per weight in the file
_VALUES = (2**32, 2**9)  # allowed elements of all activations, likewise
_REAL = ("F32", "F16", "BF16", "F64")
# The stored types allowed for each type in the model. Others (float8, quantised) need scales.
_STORED_AS: dict[torch.dtype, tuple[str, ...]] = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32, torch.float64), _REAL),
    torch.int64: ("I64",),
    torch.int32: ("I32",),
    torch.uint8: ("U8",),
    torch.bool: ("BOOL",),
}


class Stored(NamedTuple):
    """The type, as safetensors names it, and the shape of a tensor in a file of weights."""

    dtype: str
    shape: tuple[int, ...]


def read_config(file: Path) -> dict[str, Any]:
    """A config, with the types and ranges of its values checked.

    Raises:
        LoadError: a value is missing, unknown or not allowed.
    """
    config = read_json(file, "the config of a hierens model")
    args = config.get("model_args") if isinstance(config, dict) else None
    if not isinstance(args, dict):
        raise LoadError(f"{file} has no model_args: it is not the config of a hierens model.")
    kind = config.get("architecture")
    if not isinstance(kind, str) or kind not in ARGUMENTS:
        raise LoadError(f"{file} names the architecture {short(kind)}; hierens loads {', '.join(ARGUMENTS)} only.")
    # timm writes the image size of a transformer here, as an argument of the backbone.
    if unknown := sorted(set(args) - {*ARGUMENTS[kind], "img_size"}):
        raise LoadError(f"{file} has model_args that hierens does not know: {short(', '.join(unknown), plain=True)}.")
    _check_backbone(args, file)
    args.setdefault("num_classes", config.get("num_classes"))  # where timm always writes it
    for key, least in (("num_classes", int(kind != "hne")), ("in_chans", 1)):  # a tree may give embeddings
        if not is_whole(args.get(key), least, 10_000_000):
            raise LoadError(f"{file} has no usable {key} (got {short(args.get(key))}).")
    at = args.get("at")
    if not isinstance(at, list) or len(at) >= _MOST_EXITS or not all(isinstance(name, str) for name in at):
        raise LoadError(f"{file} has no usable list of cuts, `at` (got {short(at)}).")
    _check_tree(args, file) if kind in TREES else _check_exits(args, file)
    config["pretrained_cfg"] = description(config.get("pretrained_cfg"), args["in_chans"], file)
    for key, kinds in (("label_names", (list, dict)), ("label_descriptions", (dict,))):
        if not isinstance(config.get(key, kinds[0]()), kinds):
            raise LoadError(f"{file} has no usable {key} (got {short(config[key])}).")
    check_labels(config, args["num_classes"], file)
    return config


def read_header(file: Path) -> dict[str, Stored]:
    """The contents of a file of weights, from its header, which safetensors checks against the file's size.

    Raises:
        LoadError: the file is damaged or no safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
            return {name: Stored(str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        reason = short(first_line(error), plain=True)
        raise LoadError(f"{file} is damaged or no safetensors file ({reason}): copy or download it again.") from error


def check_types(wanted: Mapping[str, Tensor], header: Mapping[str, Stored], file: Path) -> None:
    """Check that the stored types can be converted to the model's.

    Floating-point numbers may have another precision; integers must have the same type.

    Raises:
        LoadError: a tensor is stored in another type.
    """
    for name, tensor in wanted.items():
        allowed = _STORED_AS.get(tensor.dtype)
        if name in header and allowed and header[name].dtype not in allowed:
            raise LoadError(
                f"{file} stores {short(name, plain=True)} as {header[name].dtype}; a model of hierens has "
                f"{' or '.join(allowed)} there: save it in one of these."
            )


def check_fit(
    make: Callable[[], AdaptiveBase], header: Mapping[str, Stored], config_file: Path, weights_file: Path
) -> None:
    """Build a model without memory, within limits that depend on the weights, and compare its parameters to them.

    An image of the config's size is passed through it as well, since this is done later to determine its costs.

    Args:
        make: builds the model that the config describes.
        header: of the weights.
        config_file: for messages.
        weights_file: for messages.

    Raises:
        LoadError: the model cannot be built, exceeds a limit, or has parameters of other names, shapes or types.
    """
    shapes = {name: stored.shape for name, stored in header.items()}
    try:
        with torch.device("meta"), _Counter(shapes):
            model = make()
            _check_parameters(model, sum(map(math.prod, shapes.values())))
            model.macs()
    except Exception as error:
        raise unbuildable(config_file, error) from error
    state = first_layout(model) if in_first_layout(header) else model.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wrong := [name for name in (*wanted, *(shapes.keys() - wanted)) if wanted.get(name) != shapes.get(name)]:
        raise LoadError(
            f"the weights in {weights_file} do not fit the config: {short(wrong[0], plain=True)} is "
            f"{_shape(shapes, wrong[0])} in the file and {_shape(wanted, wrong[0])} by the config"
            + (f", and {len(wrong) - 1} more differ." if len(wrong) > 1 else ".")
        )
    check_types(state, header, weights_file)


def check_leaves(config: Mapping[str, Any], header: Mapping[str, Stored], file: Path) -> None:
    """Check that a tree has no more leaves than its weights have tensors, or packed tensors have rows.

    Raises:
        LoadError: it has more.
    """
    rows = (stored.shape[0] for stored in header.values() if stored.shape)
    most = max(rows, default=0) if in_first_layout(header) else len(header)
    if (leaves := config["model_args"].get("leaves", 1)) > most:
        raise LoadError(f"{file} describes {leaves} networks, and its weights can be those of {most} at most.")


def unbuildable(file: Path, error: BaseException) -> LoadError:
    """The error to raise when building failed."""
    return LoadError(f"{file} describes a model that cannot be built: {short(first_line(error), plain=True)}")


def check_arguments(args: Mapping[str, Any]) -> None:
    """Check that the arguments of a backbone are plain values, few, and not larger than networks need.

    Raises:
        ValueError: they are not.
    """
    if reserved := sorted(_FACTORY_ONLY & set(args)):
        raise ValueError(f"a config must not set {', '.join(reserved)}")
    total, values = 0, 0
    pending: list[tuple[str, Any]] = [(str(key), value) for key, value in args.items()]
    while pending:
        name, value = pending.pop()
        values += 1
        if isinstance(value, dict):
            pending += [(f"{name}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, (list, tuple)):
            pending += [(name, inner) for inner in value]
        elif isinstance(value, (int, float)):
            largest = min((cap for part, cap in _LARGEST_NAMED.items() if part in name), default=_LARGEST)
            if not abs(value) <= largest:
                raise ValueError(f"{short(name, plain=True)} is {short(value)}, and at most {largest} is allowed")
            total += int(abs(value))
        if values + len(pending) > _MOST_VALUES or total > _LARGEST_SUM:
            raise ValueError("there are more, or larger, values than a network needs")


def _check_backbone(args: dict[str, Any], file: Path) -> None:
    backbone = args.get("backbone")
    if not isinstance(backbone, str) or not timm.is_model(backbone):
        raise LoadError(
            f"{file} names the backbone {short(backbone)}, which this timm ({timm.__version__}) does not have."
        )
    if backbone.startswith(tuple(ARGUMENTS)):
        raise LoadError(f"{file} names the backbone {short(backbone)}, which is no backbone.")
    further = args.get("backbone_args") or {}
    if not isinstance(further, dict):
        raise LoadError(f"{file} has no usable backbone_args (got {short(further)}).")
    try:
        check_arguments({**further, "img_size": [args.get("img_size"), further.get("img_size")]})
    except ValueError as error:
        raise LoadError(f"{file} has no usable backbone_args: {error}.") from error


def _check_tree(args: dict[str, Any], file: Path) -> None:
    branching, leaves, looped = args.get("branching"), args.get("leaves"), args.get("looped") or {}
    whole = isinstance(branching, list) and all(is_whole(f, 1, _MOST_LEAVES) for f in branching)
    if not whole or not is_whole(leaves, 1, _MOST_LEAVES) or len(branching or []) > _MOST_LEVELS:
        raise LoadError(f"{file} has no usable branching and leaves (got {short(branching)} and {short(leaves)}).")
    if not isinstance(looped, dict) or not all(isinstance(reason, str) for reason in looped.values()):
        raise LoadError(f"{file} has no usable reasons to loop levels, `looped` (got {short(looped)}).")
    try:
        member_kinds(args.get("members", "full"), args.get("rank"), len(branching or []))
    except ValueError as error:
        raise LoadError(f"{file} has no usable members and rank: {first_line(error)}") from error


def _check_exits(args: dict[str, Any], file: Path) -> None:
    kept, exits = args.get("kept"), len(args["at"]) + 1
    whole = isinstance(kept, list) and kept and all(is_whole(exit, 0, exits - 1) for exit in kept)
    if not whole or sorted(set(kept or [])) != kept:
        raise LoadError(f"{file} has no usable list of exits, `kept` (got {short(kept)} of {exits}).")
    weights = args.get("weights")
    numbers = isinstance(weights, list) and all(map(is_finite, weights))
    if weights is not None and not isinstance(weights, str) and not (numbers and len(weights) == exits):
        raise LoadError(f"{file} has no usable weights of exits (got {short(weights)}).")
    if args.get("average", "logits") not in get_args(Average):
        raise LoadError(f"{file} has no usable average of exits (got {short(args['average'])}).")
    for key in ("collaborate", "learn_weights", "boosted"):
        if type(args.get(key, False)) is not bool:
            raise LoadError(f"{file} has no usable {key} (got {short(args[key])}).")


def _check_parameters(model: nn.Module, weights: int) -> None:
    """Raise a ValueError for a parameter without elements, or with more than all weights in the file.

    Only a bound, which names the parameter: exact names and shapes are compared afterwards.
    """
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            raise ValueError(f"its {name} has no elements")
        if parameter.numel() > weights:
            raise ValueError(f"its {name} has {parameter.numel()} elements, and all weights in the file only {weights}")


class _Counter(TorchDispatchMode):
    """Counts calls, FLOPs and elements of results in this thread, and limits them by the weights of the model."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        weights = sum(map(math.prod, shapes.values()))
        self.calls, self.most_calls = 0, _CALLS[0] + _CALLS[1] * len(shapes)
        self.flops, self.most_flops = 0, _FLOPS[0] + _FLOPS[1] * weights
        self.values, self.most_values = 0, _VALUES[0] + _VALUES[1] * weights

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls > self.most_calls:
            raise ValueError("it has far more layers than its weights suggest")
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        sizes = [value.numel() for value in tree_leaves(out) if isinstance(value, Tensor)]
        self.values += sum(sizes)
        if self.flops > self.most_flops or self.values > self.most_values or max(sizes, default=0) > _MOST_ELEMENTS:
            raise ValueError("it needs far more computation or memory than its weights suggest")
        return out


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return "x".join(map(str, shapes[name])) or "a number" if name in shapes else "missing"
