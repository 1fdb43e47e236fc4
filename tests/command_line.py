"""Commands run in this process, as the console script runs them."""

import contextlib
import io
from dataclasses import dataclass

from accelerate.state import AcceleratorState

from hierens import cli

SMALL = ["--preset", "digits", "--epochs", "1", "--batch-size", "64", "--blocks", "2"]


@dataclass
class Done:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


def hierens(*arguments):
    """Run a command."""
    AcceleratorState._reset_state(reset_partial_state=True)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code or 0
    return Done(code, out.getvalue(), err.getvalue())
