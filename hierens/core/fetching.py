"""Reads files of a saved model from a folder or the Hugging Face Hub, and explains the Hub's errors."""

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
_TIMEOUT = 10.0  # seconds of trying to read a folder whose files keep changing


class LoadError(ValueError):
    """A saved model cannot be loaded: a file is missing or damaged, or describes a model that cannot be built."""


class MissingFileError(LoadError):
    """The folder or repository exists, but not the file."""


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
    """Read files of a folder, all from the same save, or of a repository, downloaded if necessary.

    Args:
        name: a folder, or a repository `user/name`.
        files: names of files in it.
        read: called with the paths of the files and then of the optional ones, None for missing ones. For a folder it
            is called again if a file was replaced meanwhile, so it should only open and read.
        optional: names of files that may be missing.
        revision: branch, tag or commit of the repository.
        token: access token for a private repository.
        cache_dir: the folder for downloads.

    Returns:
        The result of `read`.

    Raises:
        LoadError: there is no such folder and the download failed or is damaged, or the folder's files keep changing.
        MissingFileError: a file is missing in the folder or repository.
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
    """Read files of a folder while no save replaces them."""
    names, deadline = (*files, *optional), time.monotonic() + _TIMEOUT
    while time.monotonic() < deadline:
        before, problem = identities(folder, names), None
        try:
            paths = {file: find(folder, file) for file in names}
            if missing := [file for file in files if paths[file] is None]:
                raise MissingFileError(f"{folder} holds no {' and no '.join(missing)}: the saved model is incomplete.")
            found = read(*paths.values())
        except (ValueError, OSError) as error:
            problem = error
        if identities(folder, names) == before:
            if problem is not None:
                raise problem
            return found
        time.sleep(0.01)
    raise LoadError(
        f"{folder} is being written: its files changed for {_TIMEOUT:.0f} s. Load it again when the save is done."
    )


def _downloaded(name: str, file: str, revision: str | None, token: str | None, cache_dir: str | None) -> Path:
    try:
        path = Path(hf_hub_download(name, file, revision=revision, token=token, cache_dir=cache_dir))
    except Exception as error:
        missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if isinstance(error, LocalEntryNotFoundError):  # the cache records files that a repository does not have
            known = try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision)
            missing = known is not None and not isinstance(known, str)
        kind, reason = (MissingFileError, f"it has no {file}") if missing else (LoadError, explain(error, revision))
        raise kind(f"{name} is not a local directory, nor available from the Hub: {reason}.") from error
    _check_content(path)
    return path


def _check_content(path: Path) -> None:
    """Verify the SHA-256 of a large file, which is its name in the cache: downloads are checked by length only."""
    expected = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", expected):
        with path.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != expected:
                raise LoadError(f"{path} is damaged: its checksum is not the Hub's. Delete it and try again.")


def explain(error: BaseException, revision: str | None = None) -> str:
    """The reason for an error of the Hub, to end a sentence that begins with the repository's name.

    Args:
        error: raised by huggingface_hub.
        revision: the requested one.
    """
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
    cause = error
    while status == 0 and (cause.__cause__ or cause.__context__) is not None:
        cause = cause.__cause__ or cause.__context__ or cause
        response = getattr(cause, "response", None)
        status = getattr(response, "status_code", 0)
    if isinstance(error, HFValidationError):
        return "repository names have the form user/name"
    if isinstance(error, GatedRepoError):
        return "its owner requires you to accept conditions first, on its page"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no branch, tag or commit {revision!r}"
    if status in (401, 403) and not isinstance(error, RepositoryNotFoundError):
        return f"the token is invalid or has no permission ({status}); log in with `hf auth login`, or pass token="
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private and the token gives no access"
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return "it is not in the cache, and HF_HUB_OFFLINE forbids downloads"
    if status >= 500:
        return f"the Hub at {constants.ENDPOINT} returned an error ({status}); try again later"
    if isinstance(error, LocalEntryNotFoundError):
        return f"the Hub at {constants.ENDPOINT} cannot be reached, and it is not in the cache"
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
