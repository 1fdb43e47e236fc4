"""Error messages and pages name commands that install what is missing, from where hierens came."""

import json
import re
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

from hierens.core import install
from hierens.core.install import install_command

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize(
    ("recorded", "command"),
    [
        (None, 'pip install "hierens[train]"'),
        ({"url": "file:///a/b", "dir_info": {}}, 'pip install "hierens[train] @ file:///a/b"'),
        (
            {"url": "https://a/b.git", "vcs_info": {"vcs": "git", "commit_id": "0"}},
            'pip install "hierens[train] @ git+https://a/b.git"',
        ),
    ],
)
def test_an_installed_package_is_installed_again_from_its_origin(recorded, command, tmp_path, monkeypatch):
    monkeypatch.setattr(install, "__file__", str(tmp_path / "hierens" / "core" / "install.py"))
    text = json.dumps(recorded) if recorded else None
    monkeypatch.setattr(install, "distribution", lambda name: SimpleNamespace(read_text=lambda file: text))
    assert install_command("train") == command


def test_a_checkout_is_named_by_its_folder_and_a_copied_package_by_its_name(tmp_path, monkeypatch):
    assert install_command("train") == f'pip install -e "{ROOT}[train]"'
    monkeypatch.setattr(install, "__file__", str(tmp_path / "hierens" / "core" / "install.py"))

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(install, "distribution", missing)
    assert install_command("train") == 'pip install "hierens[train]"'


def test_every_message_asks_for_its_command_and_for_an_extra_that_exists():
    sources = [path for folder in ("hierens", "examples") for path in (ROOT / folder).rglob("*.py")]
    texts = {path.name: path.read_text() for path in (*sources, ROOT / "README.md", *ROOT.glob("docs/**/*.md"))}
    assert {name for name, text in texts.items() if re.search(r"pip install ['\"]?hierens", text)} <= {
        *("install.py", "install.md")
    }
    named = {extra for text in texts.values() for extra in re.findall(r"install_command\([\"'](\w+)", text)}
    assert {"train", "demo", "export", "serve"} <= named <= set(EXTRAS)


def test_the_page_lists_every_extra():
    table = (ROOT / "docs/how-to/install.md").read_text().partition("## Extras")[2].partition("\n\nSize of")[0]
    listed = {name for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for name in re.findall(r"\w+", row)}
    assert listed == set(EXTRAS)
