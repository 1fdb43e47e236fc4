"""Signals that stop a run: the trainer acts on the first one after its step, the second one ends the process."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Launchers forward a Ctrl-C that the terminal has also sent to their processes: this is not a second signal.
_ECHO_SECONDS = 1.0


class TrainingInterrupted(SystemExit):
    """A signal ended the training, after a checkpoint. The exit code is 128 + signal, as usual."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class StopSignals:
    """Records SIGTERM and SIGINT in this context, and restores the previous handlers at its end.

    A signal that the process ignores stays ignored. Outside the main thread, where Python cannot set handlers, nothing
    is recorded. A recorded signal takes its usual effect at the end, unless an exception was raised.

    Attributes:
        received: the first signal's number, 0 if there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if self.received and kind is None:
            signal.raise_signal(self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > _ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def interruption(number: int) -> BaseException:
    """The exception to raise once everything is saved; a KeyboardInterrupt for Ctrl-C in an interactive session."""
    if number == signal.SIGINT and hasattr(sys, "ps1"):
        return KeyboardInterrupt()
    return TrainingInterrupted(number)
