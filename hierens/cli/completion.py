"""`hierens completion`: completion scripts for shells, by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from hierens.cli.command import Command, Flag

_FILES = ("MODEL", "IMAGES", "RUNS", "DIRECTORY", "--config", "--start", "--weights", "--policy", "--results")
_FOLDERS = ("--data-dir", "--output-dir", "--output")


@dataclass(frozen=True)
class CompletionSettings:
    """The shell."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish", "tcsh"]]
    """shell to print the script for"""


def completion_of(commands: Mapping[str, Command]) -> Command:
    """The command that prints completion scripts for all commands, including itself."""

    def completion(arguments: Sequence[str]) -> None:
        settings = command.parse(arguments)

        import shtab

        print(shtab.complete(parser([*commands.values(), command]), settings.shell))

    command = Command(
        "completion",
        "print a script that completes commands and flags: bash, zsh, fish or tcsh",
        CompletionSettings,
        completion,
        "SHELL",
        examples=(
            "bash: hierens completion bash > ~/.local/share/bash-completion/completions/hierens",
            "zsh:  hierens completion zsh > DIR/_hierens, where DIR is in $fpath",
            "fish: hierens completion fish > ~/.config/fish/completions/hierens.fish",
            "tcsh: hierens completion tcsh > FILE, and `source FILE` in ~/.tcshrc",
        ),
    )
    return command


def parser(commands: Sequence[Command]) -> argparse.ArgumentParser:
    """Commands and flags in the form that shtab reads; it is not used for parsing."""
    top = argparse.ArgumentParser("hierens")
    top.add_argument("--version", action="store_true", help="print the version")
    subparsers = top.add_subparsers()
    for command in {command.name: command for command in commands}.values():
        own = subparsers.add_parser(command.name, help=_plain(command.summary))
        own.add_argument("--help-all", action="store_true", help="list all flags")
        for flag in command.flags():
            _add(own, flag)
    return top


def _add(parser: argparse.ArgumentParser, flag: Flag) -> None:
    import shtab

    about = _plain(flag.about)
    if flag.name.startswith("--") and not flag.kind:
        parser.add_argument(flag.name, action="store_true", help=about)
        return
    action = parser.add_argument(flag.name, choices=flag.choices or None, help=about)
    if flag.name in (*_FILES, *_FOLDERS):
        action.complete = shtab.DIRECTORY if flag.name in _FOLDERS else shtab.FILE  # type: ignore[attr-defined]


def _plain(text: str) -> str:
    """Text without characters that have a meaning in shells."""
    return text.replace("`", "").replace("%", "%%").replace("'", "").replace('"', "")
