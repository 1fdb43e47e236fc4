"""Files of a saved model, from a folder or from the Hugging Face Hub, and what the Hub's refusals mean."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hierens.core.atomic_files import find, identities

_Read = TypeVar("_Read")
_PATIENCE = 10.0  # seconds until a folder whose files are replaced all the time is given up


class LoadError(ValueError):
    """A saved model cannot be loaded: a file is missing, damaged, or says what cannot be built."""


class MissingFileError(LoadError):
    """What should hold a file is there, the file is not."""


def read_files(
    name: str | Path,
    files: Sequence[str],
    read: Callable[..., _Read],
    *,
    optional: Sequence[str] = (),
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
) -> _Read:
    """Read files of a folder, all as one save wrote them, or of a repository, downloaded if need be.

    Args:
        name: a folder, or a repository `user/name`.
        files: names in it.
        read: called with the paths of the files and then of the optional ones, None for those that are not there. Of a
            folder it is called again if a file was replaced meanwhile, so it should only open and read.
        optional: names of further files.
        revision: branch, tag or commit of the repository.
        token: access token of a private repository.
        cache_dir: where downloads are kept.

    Returns:
        What `read` returned.

    Raises:
        LoadError: there is no such folder and the Hub does not give the files, or gave others than it lists; or the
            folder's files are replaced all the time.
        MissingFileError: the folder or the repository does not have one of them.
    """
    folder = Path(name)
    if folder.is_dir():
        return _read_settled(folder, files, optional, read)
    paths: list[Path | None] = [_downloaded(str(name), file, revision, token, cache_dir) for file in files]
    for file in optional:
        try:
            paths.append(_downloaded(str(name), file, revision, token, cache_dir))
        except MissingFileError:
            paths.append(None)
    return read(*paths)


def _read_settled(folder: Path, files: Sequence[str], optional: Sequence[str], read: Callable[..., _Read]) -> _Read:
    """Read files of a folder when no save replaces them."""
    names, deadline = (*files, *optional), time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        before, problem = identities(folder, names), None
        try:
            paths = {file: find(folder, file) for file in names}
            if missing := [file for file in files if paths[file] is None]:
                raise MissingFileError(f"{folder} holds no {' and no '.join(missing)}: it is not all that was saved.")
            found = read(*paths.values())
        except (ValueError, OSError) as error:
            problem = error
        if identities(folder, names) == before:
            if problem is not None:
                raise problem
            return found
        time.sleep(0.01)
    raise LoadError(
        f"{folder} is being written: for {_PATIENCE:.0f} s its files were replaced whenever they were read. Load it "
        "again when the saving is done."
    )


def _downloaded(name: str, file: str, revision: str | None, token: str | None, cache_dir: str | None) -> Path:
    try:
        path = Path(hf_hub_download(name, file, revision=revision, token=token, cache_dir=cache_dir))
    except Exception as error:
        missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if isinstance(error, LocalEntryNotFoundError):  # the cache remembers what a repository does not have
            known = try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision)
            missing = known is not None and not isinstance(known, str)
        kind, reason = (MissingFileError, f"it has no {file}") if missing else (LoadError, explain(error, revision))
        raise kind(f"{name} is no directory here, and the Hub did not give it: {reason}.") from error
    _check_content(path)
    return path


def _check_content(path: Path) -> None:
    """Compare a large file to its SHA-256, under which the cache keeps it: a download is compared by length only."""
    promised = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", promised):
        with path.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != promised:
                raise LoadError(f"{path} is damaged, it has another checksum than on the Hub: delete it and try again.")


def explain(error: BaseException, revision: str | None = None) -> str:
    """Why the Hub refused, as the end of a sentence that begins with the repository's name.

    Args:
        error: what huggingface_hub raised.
        revision: what was asked for.
    """
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
    reached = error
    while status == 0 and (reached.__cause__ or reached.__context__) is not None:
        reached = reached.__cause__ or reached.__context__ or reached
        response = getattr(reached, "response", None)
        status = getattr(response, "status_code", 0)
    if isinstance(error, HFValidationError):
        return "a repository is named user/name"
    if isinstance(error, GatedRepoError):
        return "its owner asks to accept conditions first, on its page"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no branch, tag or commit {revision!r}"
    if status in (401, 403) and not isinstance(error, RepositoryNotFoundError):
        return f"the token is wrong or may not do this ({status}); log in with `hf auth login`, or pass token="
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private and the token does not open it"
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return "it is not in the cache, and HF_HUB_OFFLINE forbids to download it"
    if status >= 500:
        return f"the Hub at {constants.ENDPOINT} has trouble ({status}); try again later"
    if isinstance(error, LocalEntryNotFoundError):
        return f"the Hub at {constants.ENDPOINT} cannot be reached, and it is not in the cache"
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
