"""The preprocessing of a saved model's images, for use outside training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hierens.core.labels import label_names
from hierens.training.config import DataConfig

__all__ = ["PREPARED", "data_config", "label_names"]

PREPARED = ("input_size", "mean", "std", "augment", "pad", "crop_pct", "interpolation", "max_pixels")
"""the fields of `DataConfig` that describe the preprocessing"""


def data_config(model: Any, name: str | Path) -> DataConfig:
    """Data settings with the preprocessing that a saved model was trained with, and no data set.

    They are those of the run, if its `run.json` is beside the model's folder, because only they say whether images were
    padded. Otherwise they are timm's evaluation transform with the sizes and statistics in the model's config.

    Args:
        model: the result of `hierens.from_pretrained`.
        name: its argument.
    """
    cfg = model.pretrained_cfg
    size = tuple(cfg["input_size"])
    trained = Path(name).resolve().parent / "run.json"
    if Path(name).is_dir() and trained.is_file():
        from hierens.training.presets import load_run  # needs PyYAML

        run = load_run(trained)
        if run.data.input_size == size:  # otherwise run.json belongs to another model
            return DataConfig(**{field: getattr(run.data, field) for field in PREPARED})
    named = {field: cfg[field] for field in ("mean", "std", "crop_pct", "interpolation") if cfg.get(field) is not None}
    named.update({field: tuple(named[field]) for field in ("mean", "std") if field in named})
    return DataConfig(input_size=size, **named)
