"""`Adaptive`: the base class with the methods that save, publish, export, profile and print a model."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from pathlib import Path
from typing import Any, NoReturn

from hierens.branches.executor import AnyLevel
from hierens.branches.level import Level
from hierens.evaluation.profiling import Profile, profile, summary
from hierens.export.export import export
from hierens.hub.saving import push_to_hub, save_pretrained
from hierens.models.feature_maps import FeatureMaps


def _sharing(level: AnyLevel) -> str:
    """What the branches of a light level share; empty for other levels."""
    if not isinstance(level, Level) or not level.light:
        return ""
    full = ", ".join([*level.full[:3], *(["..."] if level.full[3:] else [])])
    return f"shares the weights of {len(level.light)} layers; {len(level.full)} stayed full{full and f' ({full})'}"


class Adaptive(FeatureMaps):
    """A network whose depth is chosen when it is run: a tree, a multi-exit network, or a tree with exits."""

    @abstractmethod
    def at_depth(self, depth: int | None = None, *, leaves: int | None = None) -> Adaptive:
        """A new model with only the part that a depth (or the first `leaves`) needs."""

    def extra_repr(self) -> str:
        """The beginning of `print(model)`: the cost of every depth, and how levels are run. Never raises an error."""
        with contextlib.suppress(Exception):  # an incomplete model can be printed as well
            levels = [module for module in self.modules() if isinstance(module, AnyLevel)]
            executors = ", ".join(dict.fromkeys(level.executor for level in levels))
            run = [f"executor: {executors}"] if levels else []
            run += [
                f"level {i} is looped: {level.fallback_reason}" for i, level in enumerate(levels) if not level.grouped
            ]
            run += [f"level {i} {text}" for i, level in enumerate(levels) if (text := _sharing(level))]
            return "\n".join([summary(self), *run])
        return ""

    def set_input_size(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise a ValueError: the size that a block works with may be part of it."""
        raise ValueError(
            "set_input_size cannot change blocks that are cut already: create the backbone with img_size=..., or call "
            "its set_input_size, and convert it then (networks of convolutions take images of any size as they are)."
        )

    def profile(self, size: tuple[int, ...] | None = None, batch_size: int = 1) -> Profile:
        """Leaves, parameters, MACs and latency of every depth; prints as a table."""
        return profile(self, self.image_size(size), batch_size)

    def save_pretrained(self, directory: str | Path, **kwargs: Any) -> None:
        """Write `config.json`, `model.safetensors` and a model card: see `hierens.hub.saving.save_pretrained`."""
        save_pretrained(self, directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Publish on the Hugging Face Hub: see `hierens.hub.saving.push_to_hub`."""
        return push_to_hub(self, repo_id, **kwargs)

    def export(self, directory: str | Path, format: str = "onnx", **kwargs: Any) -> Path:
        """Write a graph per depth for ONNX, OpenVINO, ExecuTorch, torch.export: see `hierens.export.export.export`."""
        return export(self, directory, format, **kwargs)
