"""The command line. No module imports torch before a command has read its flags, so help appears at once.

`command.py` reads flags and prints help, `output.py` prints results; every other module is a group of commands. Exit
codes: 0 success; 1 failure; 2 wrong usage, and nothing was done; 128 + n ended by signal n.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from hierens.core.install import install_command

if missing := [name for name in ("tyro", "rich", "yaml") if find_spec(name) is None]:
    sys.exit(f"error: the command line needs {' and '.join(missing)}: {install_command('train')}.")

from hierens.cli.calibrate import CALIBRATE
from hierens.cli.command import Command, UsageError
from hierens.cli.completion import completion_of
from hierens.cli.costs import PROFILE, ZOO
from hierens.cli.demo import DEMO
from hierens.cli.predict import PREDICT
from hierens.cli.results import EVAL, REPORT, results_table
from hierens.cli.sharing import EXPORT, PUSH
from hierens.cli.training import TRAIN, train
from hierens.core.errors import did_you_mean
from hierens.core.progress import progress_bars
from hierens.core.version import __version__

__all__ = ["COMMANDS", "main", "results_table", "train"]

COMMANDS: dict[str, Command] = {
    command.name: command for command in (DEMO, TRAIN, EVAL, CALIBRATE, REPORT, PROFILE, PREDICT, EXPORT, PUSH, ZOO)
}
COMMANDS["completion"] = completion_of(COMMANDS)

_BROUGHT_BY = {"matplotlib": "train", "torchmetrics": "train", "yaml": "train", "shtab": "train", "sklearn": "demo"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; an error becomes one line on stderr and an exit code."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        if name in ("-h", "--help"):
            print(usage())
        elif name == "--version":
            print(f"hierens {__version__}")
        elif name in COMMANDS:
            with progress_bars():
                COMMANDS[name].run(rest)
        else:
            raise UsageError(
                f"there is no command {name!r}{did_you_mean(name, COMMANDS)}: choose {', '.join(COMMANDS)}."
            )
        sys.stdout.flush()
    except UsageError as error:
        _fail(error, 2, name)
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(1) from None
    except ModuleNotFoundError as error:
        extra = _BROUGHT_BY.get(str(error.name).partition(".")[0])
        if extra is None:
            raise
        _fail(ValueError(f"hierens {name} needs {error.name}: {install_command(extra)}."), 1, name)
    except (ValueError, OSError) as error:
        _fail(error, 1, name)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def usage() -> str:
    """All commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hierens COMMAND ...",
            "",
            *lines,
            "",
            "`hierens COMMAND --help` shows its flags, `hierens --version` the version. Commands that print",
            "a result accept --json: one JSON object on stdout, everything else on stderr.",
            "Exit codes: 0 success, 1 failure, 2 wrong usage, 128 + n ended by signal n.",
        ]
    )


def _fail(error: Exception, code: int, name: str) -> None:
    message = COMMANDS[name].in_flags(str(error)) if name in COMMANDS else error
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code) from error
