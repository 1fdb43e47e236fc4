"""Names of runs, made of the fields of their configurations that differ and have an effect."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_Flat = Mapping[str, str]

# Fields that do not distinguish runs.
_IGNORED = (
    *("seed", "output_dir", "resume", "workers", "data_dir", "trackers", "cpu", "val_batch_size", "val_epochs"),
    *("checkpoint_steps", "keep_checkpoints", "keep_best", "log_steps"),
)
_OFF = ("", "null", "false", "0", "0.0", "[]")


def distinct_names(configs: Sequence[Mapping[str, Any]], directories: Sequence[str]) -> list[str]:
    """Names made of the fields in which runs differ; if they differ in none, the name of a directory.

    A field without an effect in a run, such as `alpha` with the objective `independent`, is not in its name.

    Args:
        configs: the contents of `run.json` of each run.
        directories: the name of each run's directory.
    """
    flat = [_flat(config) for config in configs]
    fields = dict.fromkeys(field for config in flat for field in config)
    shown = [{f: config.get(f, "-") for f in fields if APPLIES.get(f, _always)(config)} for config in flat]
    differing = [f for f in fields if len({config[f] for config in shown if f in config}) > 1]
    if not differing:
        return [directories[0]] * len(configs) if len(configs) > 1 else list(directories)
    return [", ".join(f"{f.rpartition('.')[2]}={config[f]}" for f in differing if f in config) for config in shown]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        elif name not in _IGNORED:
            flat[prefix + name] = json.dumps(value).strip('"')
    return flat


def _always(config: _Flat) -> bool:
    return True


def _contains(field: str, *parts: str) -> Callable[[_Flat], bool]:
    """Whether the value of a field contains one of these; also if the field is missing, as in runs of old versions."""
    return lambda config: field not in config or any(part in config[field] for part in parts)


def _any_on(*fields: str) -> Callable[[_Flat], bool]:
    return lambda config: any(config.get(field, "") not in _OFF for field in fields)


_DISTILLED = _contains("train.objective", "codistillation", "one_for_all")
_CODISTILLED = _contains("train.objective", "codistillation")
_MIXED = _any_on("train.mixup", "train.cutmix")
_TREE, _EXITS = _contains("model.method", "hne"), _contains("model.method", "multi_exit")

APPLIES: dict[str, Callable[[_Flat], bool]] = {
    **dict.fromkeys(("train.alpha", "train.alpha_warmup_epochs"), _DISTILLED),
    **dict.fromkeys(("train.temperature", "train.final_temperature"), _DISTILLED),
    **dict.fromkeys(("train.temper_students", "train.standardize_logits", "train.ema_teacher"), _CODISTILLED),
    "train.mean_over_classes": _contains("train.objective", "one_for_all"),
    "train.depth_weights": _contains("train.objective", "hierarchical"),
    **dict.fromkeys(("train.mix_probability", "train.mix_mode", "train.mix_off_epoch"), _MIXED),
    "train.mix_switch_probability": _MIXED,
    "train.clip_mode": _any_on("train.clip_grad"),
    "train.unfreeze_epoch": _any_on("train.freeze_levels"),
    "train.decay_epochs": _contains("train.schedule", "multistep", "cyclic_step"),
    "train.cycle_epochs": _contains("train.schedule", "cyclic_step"),
    **dict.fromkeys(("train.symmetry_noise", "train.symmetry_signs"), _TREE),
    **dict.fromkeys(("model.blocks", "model.branching", "model.members", "model.rank", "model.init"), _TREE),
    **dict.fromkeys(
        ("model.exits", "model.exit_weights", "model.learn_weights", "model.collaborate", "model.boosted"), _EXITS
    ),
    "model.exit_average": _any_on("model.exit_weights", "model.learn_weights"),
    "model.head": _contains("model.method", "exit"),
    **dict.fromkeys(
        ("teacher.teacher_weights", "teacher.teacher_share", "teacher.teacher_temperature"), _any_on("teacher.teacher")
    ),
    "data.pad": _contains("data.augment", "crop_flip"),
    "data.hflip": _contains("data.augment", "crop_flip", "imagenet"),
    **dict.fromkeys(("data.color_jitter", "data.auto_augment", "data.crop_pct"), _contains("data.augment", "imagenet")),
}
"""by field: whether it has an effect in a run of this configuration; all other fields always have one"""
