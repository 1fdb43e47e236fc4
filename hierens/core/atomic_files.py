"""Files that are whole or not there, also where several belong together: a model with its card and its policy.

`saving` writes them aside first, in `.cache/huggingface/hierens` of the folder that they are for, which is never
uploaded to the Hub. The rename of that to `saved` is the moment from which they count: their names then mean them
(`find`), not what the folder still holds, and they are moved there one by one. After a kill before that moment the old
files are all there, after it the new ones are, and the next save finishes the moving. When it is done, plain names are
all there is.

Other programs know plain names only. JSON files say what the others are (`config.json`, `export.json`), so while files
are moved the old ones are gone first and the new ones come last: such a program finds no model rather than a mixed one.

Writers to one folder wait for each other where the system can lock a folder: not on Windows, nor on some network file
systems, where saving works all the same as long as there is one writer at a time. Readers never wait: they look whether
what they read was replaced meanwhile (`identities`), as `hierens.core.fetching.read_files` does.
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
_GONE = ".gone"  # an empty file that says: this name is no longer there


@contextlib.contextmanager
def saving(folder: str | Path, replaces: Iterable[str] = ()) -> Iterator[Path]:
    """A scratch folder to write files to, which all get their names in `folder` at the end, or none of them.

    Args:
        folder: made if missing; what else it holds stays.
        replaces: patterns of names (`depth_*.onnx`): files of such names that are not written anew are removed.

    Raises:
        OSError: the disk does not take it. Then, as after any error inside, the folder is as it was.
    """
    folder = Path(folder)
    made = not folder.exists()
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
                _sweep(folder)
            if made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise


@contextlib.contextmanager
def replacing(file: str | Path) -> Iterator[Path]:
    """A path to write one file to, which gets its name at the end: see `saving`."""
    with saving(Path(file).parent) as partial:
        yield partial / Path(file).name


def find(folder: Path, name: str) -> Path | None:
    """Where a file of a folder is at the moment, None if it is not there."""
    saved = folder / _STAGE / _SAVED
    if (saved / name).is_file():
        return saved / name
    if (saved / f"{name}{_GONE}").exists() or not (folder / name).is_file():
        return None
    return folder / name


def identities(folder: Path, names: Sequence[str]) -> list[object]:
    """What tells whether files were replaced since: equal if none was, wherever they were moved."""
    return [_identity(find(folder, name)) for name in names]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone among those who ask for the same folder, where the system can lock one; the lock ends with the process."""
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
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing would not do it if the process was forked meanwhile
        os.close(descriptor)


def sync(path: Path) -> None:
    """Write a file or a folder's entries through to the disk, where the system can."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _obsolete(folder: Path, partial: Path, patterns: Iterable[str]) -> list[str]:
    there = [path.name for path in folder.iterdir() if not path.is_dir()]
    old = {name for pattern in patterns for name in fnmatch.filter(there, pattern)}
    return sorted(name for name in old if not (partial / name).exists())


def _finish(folder: Path) -> None:
    """Move what was saved to its place, if a save has come so far, and remove what it left."""
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
        saved.rename(saved.with_name(_DONE))  # at once, where deleting it is not
    _sweep(folder)


def _sweep(folder: Path) -> None:
    """Remove the scratch folders, and what they lie in if nothing else does."""
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
        return object()  # it is just being moved
    return found.st_ino, found.st_mtime_ns, found.st_size
