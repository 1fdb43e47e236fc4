"""Files of a saved model, from a folder or from the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError


class LoadError(ValueError):
    """A saved model cannot be loaded: a file is missing, damaged, or says what cannot be built."""


class MissingFileError(LoadError):
    """What should hold a file is there, the file is not."""


def fetch(
    name: str | Path,
    files: Sequence[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
) -> list[Path]:
    """Where files lie, downloaded if need be.

    Args:
        name: a folder, or a repository `user/name`.
        files: names in it.
        revision: branch, tag or commit of the repository.
        token: access token of a private repository.
        cache_dir: where downloads are kept.

    Raises:
        LoadError: there is no such folder and the Hub does not give the files.
        MissingFileError: the folder or the repository does not have one of them.
    """
    folder = Path(name)
    if folder.is_dir():
        if missing := [file for file in files if not (folder / file).is_file()]:
            raise MissingFileError(f"{folder} holds no {' and no '.join(missing)}: it is not all that was saved.")
        return [folder / file for file in files]
    try:
        return [
            Path(hf_hub_download(str(name), file, revision=revision, token=token, cache_dir=cache_dir))
            for file in files
        ]
    except Exception as error:
        reason = " ".join(str(error).split())
        kind = MissingFileError if isinstance(error, EntryNotFoundError) else LoadError
        raise kind(f"{name} is no directory here, and the Hub did not give it: {reason}") from error
