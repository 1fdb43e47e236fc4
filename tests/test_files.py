"""Saving several files at once: killed at any of its calls to the system, it leaves the old ones or the new ones.

What kills forks of itself runs in an interpreter of its own: this file as a script, with a check and a folder.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    import _hierens_cli  # noqa: F401  hierens without torch: hundreds of forks would copy its page tables

from hierens.core import atomic_files as files
from hierens.core.atomic_files import find, replacing, saving

OLD = {"config.json": "old", "model.safetensors": "old", "policy.json": "old", "README.md": "old"}
NEW = {"config.json": "new", "model.safetensors": "new", "README.md": "new", "accuracy.png": "new"}


@pytest.fixture(autouse=True)
def no_disk(monkeypatch):
    """Kills lose nothing that the system has taken, so there is no need to wait for the disk."""
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)


def write(folder, content):
    with saving(folder, replaces=("policy.json", "*.png")) as partial:
        for name, text in content.items():
            (partial / name).write_text(text)


def state(folder):
    """What a reader finds: by name, what the file holds."""
    found = {name: find(folder, name) for name in OLD | NEW}
    return {name: path.read_text() for name, path in found.items() if path is not None}


def plain(folder):
    """What a program finds that knows plain names only."""
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file() and path.name != "notes.txt"}


def dies_at(call, work):
    """Whether a process that does the work dies, which it does by the given call to the system that changes files."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    calls = 0

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                os._exit(9)
            return function(*args, **kwargs)

        return wrapper

    for name in ("rename", "replace", "unlink", "mkdir", "rmdir", "touch", "write_text"):
        setattr(Path, name, counted(getattr(Path, name)))
    for name in ("fsync", "unlink", "rmdir"):
        setattr(files.os, name, counted(getattr(os, name)))
    work()
    os._exit(0)


def kills(tmp_path, content=NEW):
    """A folder for every call that a save in it was killed at."""
    for call in range(1, 1000):
        folder = tmp_path / str(call)
        write(folder, OLD)
        (folder / "notes.txt").write_text("mine")
        if not dies_at(call, lambda folder=folder: write(folder, content)):
            assert call > 20
            return
        yield folder


@pytest.mark.parametrize(
    "check",
    [
        "killed_at_any_call_all_is_old_or_all_is_new",
        "other_programs_find_nothing_rather_than_a_mixture",
        "the_next_save_finishes_what_a_kill_left",
    ],
)
def test_kills(check, tmp_path):
    done = subprocess.run([sys.executable, __file__, check, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def killed_at_any_call_all_is_old_or_all_is_new(tmp_path):
    seen = []
    for folder in kills(tmp_path):
        seen.append(state(folder))
        assert seen[-1] in (OLD, NEW), folder
    assert sum(found == NEW for found in seen) > 5 and sum(found == OLD for found in seen) > 5
    assert seen == sorted(seen, key=lambda found: found == NEW), "it is new from one moment on"


def other_programs_find_nothing_rather_than_a_mixture(tmp_path):
    incomplete = 0
    for folder in kills(tmp_path):
        found = plain(folder)
        incomplete += "config.json" not in found
        if "config.json" in found:
            assert len({found[name] for name in ("config.json", "model.safetensors", "README.md")}) == 1, folder
    assert incomplete, "it was killed while files were moved"


def the_next_save_finishes_what_a_kill_left(tmp_path):
    for folder in kills(tmp_path):
        before = state(folder)
        with replacing(folder / "policy.json") as partial:
            partial.write_text("later")
        assert plain(folder) == state(folder) == before | {"policy.json": "later"}
        assert sorted(path.name for path in folder.iterdir()) == sorted([*before | {"policy.json": ""}, "notes.txt"])


def test_a_failure_leaves_all_as_it_was(tmp_path):
    write(tmp_path / "there", OLD)
    for name, before in (("there", OLD), ("made", None)):
        with pytest.raises(OSError, match="no room"), saving(tmp_path / name, ["policy.json"]) as partial:
            (partial / "config.json").write_text("new")
            raise OSError("no room")
        assert (plain(tmp_path / name) if before else None) == before
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == sorted(OLD)


def test_files_have_the_usual_permissions(tmp_path):
    with replacing(tmp_path / "saved.json") as partial:
        partial.write_text("{}")
    (tmp_path / "usual.json").write_text("{}")
    assert (tmp_path / "saved.json").stat().st_mode == (tmp_path / "usual.json").stat().st_mode


def test_saving_keeps_the_files_of_other_programs(tmp_path):
    """Also what the Hub's own programs keep in the same hidden folder."""
    own = tmp_path / ".cache" / "huggingface" / "download" / "config.json.metadata"
    own.parent.mkdir(parents=True)
    own.write_text("theirs")
    (tmp_path / "policy.json").mkdir()
    write(tmp_path, NEW)
    assert own.read_text() == "theirs" and (tmp_path / "policy.json").is_dir()
    assert not (tmp_path / ".cache" / "huggingface" / "hierens").exists()


if __name__ == "__main__":
    files.os.fsync = lambda descriptor: None
    globals()[sys.argv[1]](Path(sys.argv[2]))
