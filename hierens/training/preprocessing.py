"""How a saved model wants its images, for whatever runs it outside training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hierens.core.labels import label_names
from hierens.training.config import DataConfig

__all__ = ["data_config", "label_names"]


def data_config(model: Any, name: str | Path) -> DataConfig:
    """Data settings with the preprocessing that a saved model was trained for; its data set is left open.

    Those of the run, if its `run.json` lies beside the model's folder, for they alone say whether images were padded;
    else timm's evaluation transform with the sizes and statistics that the model's config names.

    Args:
        model: what `hierens.from_pretrained` returned.
        name: what it was given.
    """
    cfg = model.pretrained_cfg
    size = tuple(cfg["input_size"])
    trained = Path(name).resolve().parent / "run.json"
    if Path(name).is_dir() and trained.is_file():
        from hierens.training.presets import load_run  # needs PyYAML

        run = load_run(trained)
        if run.data.input_size == size:  # else it belongs to another model
            fields = ("input_size", "mean", "std", "augment", "pad", "crop_pct", "interpolation", "max_pixels")
            return DataConfig(**{field: getattr(run.data, field) for field in fields})
    named = {field: cfg[field] for field in ("mean", "std", "crop_pct", "interpolation") if cfg.get(field) is not None}
    named.update({field: tuple(named[field]) for field in ("mean", "std") if field in named})
    return DataConfig(input_size=size, **named)
