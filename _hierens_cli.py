"""The program `hierens`: help, completion and complaints within a fraction of a second, since torch is not imported.

It stands beside the package because a package's `__init__` runs before any module in it: `import hierens` must import
timm, and with it torch, to register its models there. `hierens/__init__.py` looks whether this module was imported
first, and leaves that to the commands then, each of which imports what it needs.
"""

from __future__ import annotations


def main() -> None:
    """Run a command: see `hierens.cli.main`."""
    from hierens.cli import main as run

    run()


if __name__ == "__main__":
    main()
