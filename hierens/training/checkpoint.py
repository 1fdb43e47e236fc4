"""Checkpoints: complete or not there, the newest first, old ones removed.

`accelerator.save_state` writes into a folder with another name, which gets its own in one step once everything is in
it: a run killed while saving leaves the checkpoint before it. Weights are safetensors; the optimiser's state is torch's
own format, which Accelerate reads back with `weights_only`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

_STATE = "trainer.json"


@dataclass
class TrainState:
    """How far a run has come.

    Attributes:
        step: optimiser steps done.
        epoch: the epoch to go on with.
        batch: micro-batches of it that are done.
        history: a record per validated epoch.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def save_checkpoint(accelerator: Accelerator, output_dir: str | Path, state: TrainState, keep: int) -> Path:
    """Write a checkpoint and remove all but the newest `keep`. Every process must call it.

    Returns:
        The checkpoint's folder, `output_dir/checkpoints/step-...`.
    """
    final = Path(output_dir) / "checkpoints" / f"step-{state.step:09d}"
    partial = final.with_suffix(".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / _STATE).write_text(json.dumps(asdict(state)))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in _checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def find_checkpoint(output_dir: str | Path, resume: str) -> Path | None:
    """The checkpoint that `resume` means: the newest for `auto`, none for `never`, or the folder named.

    Raises:
        ValueError: the folder named is no checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return next(reversed(_checkpoints(output_dir)), None)
    if not (Path(resume) / _STATE).is_file():
        raise ValueError(
            f"{resume} is no checkpoint (it has no {_STATE}): give a folder like checkpoints/step-000000500."
        )
    return Path(resume)


def load_checkpoint(accelerator: Accelerator, folder: Path) -> TrainState:
    """Put weights, optimiser and averages back, and say how far the run had come."""
    accelerator.load_state(str(folder))
    return TrainState(**json.loads((folder / _STATE).read_text()))


def _checkpoints(output_dir: str | Path) -> list[Path]:
    found = Path(output_dir).glob(f"checkpoints/step-*/{_STATE}")
    return sorted(file.parent for file in found if file.parent.suffix != ".partial")
