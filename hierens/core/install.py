"""The command that installs an extra of hierens, for error messages about missing packages."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def install_command(extra: str) -> str:
    """The command that installs an extra from where hierens itself came: a checkout, a file or URL, or an index."""
    root = Path(__file__).parents[2]
    if (root / "pyproject.toml").is_file():
        return f'pip install -e "{root}[{extra}]"'
    origin = _origin()
    return f'pip install "hierens[{extra}]{origin and " @ "}{origin}"'


def _origin() -> str:
    """The URL that hierens was installed from, as pip recorded it (PEP 610); empty if it came from an index."""
    try:
        recorded = json.loads(distribution("hierens").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return ""
    version_control = recorded.get("vcs_info", {}).get("vcs")
    return f"{version_control}+{recorded['url']}" if version_control else str(recorded.get("url", ""))
