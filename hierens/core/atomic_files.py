"""Atomic saving of several files that belong together, such as a model with its card and its policy.

`saving` first writes them to a folder in `.cache/huggingface/hierens` of the target folder, which is never uploaded to
the Hub. They become valid when their folder is renamed to `saved`. From then on `find` returns them instead of the
files in the target folder, and they are moved there one by one. After a kill before the rename, all old files are
present. After a later kill, all new files are, and the next save completes the move. At the end all files have their
plain names.

Other programs know only the plain names. JSON files describe the others (`config.json`, `export.json`), so during the
move old JSON files are removed first and new ones added last. Such a program finds no model rather than a mixed one.

Writers to one folder wait for each other if the system can lock a folder. On Windows and some network file systems it
cannot, and there must be one writer at a time. Readers never wait: they check whether files were replaced while they
read them (`identities`), as `hierens.core.fetching.read_files` does.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_STAGE, _SAVED, _DONE = ".cache/huggingface/hierens", "saved", "done"
_GONE = ".gone"  # suffix of an empty file: the file of that name is removed


@contextlib.contextmanager
def saving(folder: str | Path, replaces: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary folder for files that are moved to `folder` at the end: all of them, or none.

    Args:
        folder: created if missing; its other files are kept.
        replaces: patterns of names (`depth_*.onnx`); old files with such names that are not written again are removed.

    Raises:
        OSError: writing failed. The folder is then unchanged, as after any error inside.
    """
    folder = Path(folder)
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        try:
            _finish(folder)
            partial = folder / _STAGE / f"partial-{uuid.uuid4().hex}"
            partial.mkdir(parents=True)
            yield partial
            for name in _obsolete(folder, partial, replaces):
                (partial / f"{name}{_GONE}").touch()
            for path in (*partial.rglob("*"), partial):
                sync(path)
            partial.rename(folder / _STAGE / _SAVED)
            sync(folder / _STAGE)
            _finish(folder)
        except BaseException:
            if not (folder / _STAGE / _SAVED).exists():
                _remove_temporary(folder)
            if created:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise


@contextlib.contextmanager
def replacing(file: str | Path) -> Iterator[Path]:
    """A temporary path for one file, which is moved to its place at the end: see `saving`."""
    with saving(Path(file).parent) as partial:
        yield partial / Path(file).name


def find(folder: Path, name: str) -> Path | None:
    """The current path of a file of a folder; None if it does not exist."""
    saved = folder / _STAGE / _SAVED
    if (saved / name).is_file():
        return saved / name
    if (saved / f"{name}{_GONE}").exists() or not (folder / name).is_file():
        return None
    return folder / name


def identities(folder: Path, names: Sequence[str]) -> list[object]:
    """Values that change when one of these files is replaced, but not when it is moved."""
    return [_identity(find(folder, name)) for name in names]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """An exclusive lock on a folder, if the system supports it; it ends with the process."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough if the process was forked meanwhile
        os.close(descriptor)


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk, if the system supports it."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _obsolete(folder: Path, partial: Path, patterns: Iterable[str]) -> list[str]:
    present = [path.name for path in folder.iterdir() if not path.is_dir()]
    old = {name for pattern in patterns for name in fnmatch.filter(present, pattern)}
    return sorted(name for name in old if not (partial / name).exists())


def _finish(folder: Path) -> None:
    """Move the files of a save that has become valid to their places, and remove temporary files."""
    saved = folder / _STAGE / _SAVED
    if saved.is_dir():
        files = [file for file in saved.iterdir() if file.suffix != _GONE]
        described = [file for file in files if file.suffix != ".json"]
        describing = [file for file in files if file.suffix == ".json"]
        if described:
            for file in describing:
                (folder / file.name).unlink(missing_ok=True)
        for file in (*described, *describing):
            file.replace(folder / file.name)
        for file in saved.glob(f"*{_GONE}"):
            (folder / file.name.removesuffix(_GONE)).unlink(missing_ok=True)
        sync(folder)
        saved.rename(saved.with_name(_DONE))  # atomic, unlike deletion
    _remove_temporary(folder)


def _remove_temporary(folder: Path) -> None:
    """Remove the temporary folders, and their parents if empty."""
    stage = folder / _STAGE
    shutil.rmtree(stage, ignore_errors=True)
    with contextlib.suppress(OSError):
        for outer in (stage.parent, stage.parent.parent):
            outer.rmdir()


def _identity(path: Path | None) -> object:
    if path is None:
        return None
    try:
        found = path.stat()
    except OSError:
        return object()  # it is being moved
    return found.st_ino, found.st_mtime_ns, found.st_size
