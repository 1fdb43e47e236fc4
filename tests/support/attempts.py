"""Calls with limited memory that must succeed or raise a ValueError of one line."""

import collections
import contextlib
import io
import re
import resource
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

ROOM = 2**30  # bytes of address space that a call may take beyond what the process has


@contextlib.contextmanager
def limited_memory(room=ROOM):
    """Limit the address space to `room` bytes more than the process has now."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def out_of_memory(error):
    """Whether an error, or one that caused it, says that memory ran out."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@dataclass
class Outcome:
    """The result of one attempt."""

    said: str
    seconds: float
    """of CPU"""
    wall: float
    mib: float
    """by which the process grew at most"""


@contextlib.contextmanager
def _memory():
    """A function that returns the MiB by which the process has grown at most since now."""

    def status(field):
        return int(re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the largest size so far is forgotten
    before = status("VmRSS")
    yield lambda: max(0.0, status("VmHWM") - before)


def attempt(call):
    """Run a call that may load something or raise a ValueError of one line; anything else is raised."""
    start, wall, printed = time.process_time(), time.perf_counter(), io.StringIO()
    with _memory() as grown, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")  # once per place, as a program shows them
        try:
            with limited_memory(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                said = call() or "loaded"
        except ValueError as error:
            said = str(error)
            assert "\n" not in said and len(said) <= 1200 and said.encode(), f"not one line: {said[:2000]!r}"
            assert not out_of_memory(error), f"memory ran out: {said}"
        mib = grown()
    spam = [str(w.message) for w in warned] + printed.getvalue().splitlines()
    assert len(spam) <= 20 and all(len(line) <= 1200 for line in spam), f"too many words: {spam[:30]}"
    return Outcome(said, time.process_time() - start, time.perf_counter() - wall, mib)


def summary(outcomes, folder):
    """Counts of the distinct messages, without paths and values."""
    plain = (outcome.said.replace(str(folder), "") for outcome in outcomes)
    return collections.Counter(re.sub(r"^[\w/.-]*/|'.*|\d+", "", text)[:50] for text in plain)
