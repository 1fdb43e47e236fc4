"""The program `hierens`, which prints help, completion and usage errors without importing torch.

It is beside the package because a package's `__init__` runs before any module in it, and `import hierens` must import
timm, and with it torch, to register its models. `hierens/__init__.py` checks whether this module was imported first; if
so, it leaves the imports to the commands.
"""

from __future__ import annotations


def main() -> None:
    """Run a command: see `hierens.cli.main`."""
    from hierens.cli import main as run

    run()


if __name__ == "__main__":
    main()
