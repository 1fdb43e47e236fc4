"""Which checkpoint a run resumes from, and which checkpoints are kept.

A checkpoint is a folder `checkpoints/step-...`. The newest `keep_checkpoints` are kept, and the one with the best
validation, to which the link `checkpoints/best` points. Damaged checkpoints, and those newer than the one from which a
run resumes, are renamed (`.damaged`, `.superseded`) and then ignored; they may be deleted.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hierens.training.checkpoints.files import damage, recover, remove
from hierens.training.checkpoints.state import STATE, TrainState, read_state, score
from hierens.training.config import TrainConfig

_BEST = "best"


def checkpoint_folder(output_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of an optimiser step is written."""
    return Path(output_dir) / "checkpoints" / f"step-{step:09d}"


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint, not verified."""
    return next(reversed(_checkpoints(Path(output_dir) / "checkpoints")), None)


def choose_checkpoint(output_dir: str | Path, resume: str) -> Path | None:
    """The checkpoint that `resume` selects, verified.

    Args:
        output_dir: of the run.
        resume: `auto`, the newest undamaged one (damaged ones are renamed); `never`; or a checkpoint's folder.

    Raises:
        ValueError: the given folder is not a checkpoint, or is damaged.
    """
    folder = Path(output_dir) / "checkpoints"
    chosen = None
    if resume not in ("auto", "never"):
        chosen = Path(resume)
        if not (chosen / STATE).is_file():
            raise ValueError(
                f"{resume} is no checkpoint (it has no {STATE}): give a folder like checkpoints/step-000000500."
            )
        if wrong := defect(chosen):
            raise ValueError(
                f"the checkpoint {resume} is damaged: {wrong}. Give another one, or resume='auto' for the newest "
                "undamaged one."
            )
        chosen = chosen.resolve()  # the link `best` may change
    recover(folder, "step-*")
    if resume == "auto":
        for candidate in reversed(_checkpoints(folder)):
            wrong = defect(candidate)
            if wrong is None:
                chosen = candidate
                break
            print(f"the checkpoint {candidate} is damaged: {wrong}. {_set_aside(candidate, '.damaged')}")
    return chosen


def start_from(output_dir: str | Path, chosen: Path | None) -> None:
    """Rename checkpoints that are newer than the one from which a run resumes, since the run will replace them.

    Args:
        output_dir: of the run.
        chosen: the checkpoint, None for a new start.
    """
    folder = Path(output_dir) / "checkpoints"
    newer = [other for other in _checkpoints(folder) if chosen is None or other.name > chosen.name]
    for other in newer:
        print(f"the checkpoint {other} is newer than where this run starts. {_set_aside(other, '.superseded')}")
    if not (folder / _BEST).exists():
        (folder / _BEST).unlink(missing_ok=True)  # it pointed to a renamed one


def defect(folder: Path) -> str | None:
    """Why a run cannot resume from a checkpoint: damage, or weights or statistics that are not finite."""
    if wrong := damage(folder):
        return wrong
    for file in sorted(folder.glob("*.safetensors")):
        # A file that holds no weights is reported when it is loaded.
        with contextlib.suppress(SafetensorError), safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                values = tensors.get_tensor(name)
                if not bool((values if values.itemsize > 1 else values.double()).isfinite().all()):
                    return f"{name} in {file.name} is not finite"
    return None


def last_good_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint without a defect whose last validation gave finite numbers."""
    for folder in reversed(_checkpoints(Path(output_dir) / "checkpoints")):
        if defect(folder) is None:
            history = read_state(folder / STATE)[0].history
            if not history or score(history[-1]) > -math.inf:
                return folder
    return None


def apply_policy(config: TrainConfig, state: TrainState) -> None:
    """Delete the checkpoints that are not to be kept, and update the link to the best one."""
    folder = Path(config.output_dir) / "checkpoints"
    found = _checkpoints(folder)
    kept = set(found[-config.keep_checkpoints :])
    there = [record for record in state.history if checkpoint_folder(config.output_dir, record["step"]).is_dir()]
    validated = [record for record in there if score(record) > -math.inf]
    if config.keep_best and validated:
        best = checkpoint_folder(config.output_dir, max(validated, key=score)["step"])
        kept.add(best)
        with contextlib.suppress(OSError):  # not every file system has links
            link = folder / f"{_BEST}.new"
            link.unlink(missing_ok=True)
            link.symlink_to(best.name, target_is_directory=True)
            link.replace(folder / _BEST)
    for old in found:
        if old not in kept:
            remove(old)


def _set_aside(folder: Path, suffix: str) -> str:
    renamed = folder.with_suffix(suffix)
    remove(renamed)
    folder.rename(renamed)
    return f"It was renamed to {renamed.name}."


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and not path.suffix)
