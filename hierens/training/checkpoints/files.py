"""Folders that exist completely or not at all: written under another name, sealed with a manifest, then renamed.

Every function that writes raises an OSError if writing fails, for example on a full disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from hierens.core.atomic_files import sync
from hierens.core.errors import first_line
from hierens.core.json_files import read_json, short

MANIFEST = "manifest.json"
PARTIAL, REPLACED = ".partial", ".replaced"
_TORCH_WRITERS = ("PytorchStreamWriter", "inline_container", "iostream error")  # in messages of RuntimeErrors


def seal(folder: Path) -> None:
    """Write the manifest: size and digest of every file in the folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sealed = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": _digest(file)} for file in files
    }
    (folder / MANIFEST).write_text(json.dumps({"files": sealed}, indent=1))


def publish(partial: Path, final: Path) -> None:
    """Flush everything in `partial` to the disk and give the folder its final name.

    At every moment, the previous folder of that name or the new one exists: see `recover`.
    """
    for path in (*partial.rglob("*"), partial):
        sync(path)
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    remove(replaced)


def damage(folder: Path) -> str | None:
    """The damage of a sealed folder, or None if every file matches the manifest."""
    try:
        if not (folder / MANIFEST).is_file():
            return f"it has no {MANIFEST}"
        sealed = read_json(folder / MANIFEST, "a manifest")["files"]
        for name, expected in sealed.items():
            file = folder / name
            if not file.is_file():
                return f"{short(name, plain=True)} is missing"
            if file.stat().st_size != expected["size"]:
                return f"{short(name, plain=True)} has {file.stat().st_size:,} bytes, not {expected['size']:,}"
            if _digest(file) != expected["sha256"]:
                return f"the contents of {name} have changed"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    except OSError as error:
        return f"it cannot be read ({error})"
    return None


def remove(folder: Path) -> None:
    """Delete a folder; if this is interrupted, what remains does not look like a complete folder."""
    if not folder.exists():
        return
    if folder.suffix != PARTIAL:
        partial = folder.with_name(folder.name + PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        folder = folder.rename(partial)
    shutil.rmtree(folder, ignore_errors=True)


def recover(parent: Path, pattern: str) -> None:
    """Clean up after a kill: delete incomplete folders, and restore one that was being replaced.

    Args:
        parent: the folder that contains them.
        pattern: of the folders' names.
    """
    for replaced in parent.glob(pattern + REPLACED):
        final = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if final.exists():
            remove(replaced)
        else:
            replaced.rename(final)
    for partial in (*parent.glob(pattern + PARTIAL), *parent.glob(pattern + REPLACED + PARTIAL)):
        remove(partial)


@contextlib.contextmanager
def collect_write_errors() -> Iterator[list[str]]:
    """Collect the errors of a full disk as text, so that the processes can agree on what to do."""
    problems: list[str] = []
    try:
        yield problems
    except Exception as error:
        # safetensors and torch wrap the system's error in their own
        if not isinstance(error, OSError | SafetensorError) and not any(name in str(error) for name in _TORCH_WRITERS):
            raise
        named = isinstance(error, OSError | SafetensorError)
        problems.append(first_line(error) if named else "not all bytes were written")


def free_space(path: Path) -> str:
    """The free space on the disk of a path, as text."""
    while not path.exists():
        path = path.parent
    return f"{shutil.disk_usage(path).free / 1e6:,.1f} MB free in {path}"


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
