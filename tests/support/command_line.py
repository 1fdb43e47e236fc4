"""Commands run in this process, as the console script runs them."""

import contextlib
import io
from dataclasses import dataclass

from hierens import cli
from support.accelerator import reset_accelerator

SMALL = ["--preset", "digits", "--epochs", "1", "--batch-size", "64", "--blocks", "2"]


@dataclass
class Done:
    """The exit code of a command and what it printed."""

    code: int
    out: str
    err: str


def hierens(*arguments):
    """Run a command."""
    reset_accelerator()
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code or 0
    return Done(code, out.getvalue(), err.getvalue())
