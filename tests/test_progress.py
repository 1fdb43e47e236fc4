"""Progress bars: on request, on terminals, one at a time, in one process."""

import io
import sys

import pytest
import torch

import hierens
from hierens import cli
from hierens.core.progress import progress_bars, with_progress

STEPS = {
    "checking the executors": lambda tree, folder: hierens.hierensify(tree, 2),
    "tuning": lambda tree, folder: hierens.hierensify(tree, 2, looped={}).tune(torch.zeros(1, 1, 32, 32)),
    "writing graphs": lambda tree, folder: hierens.hierensify(tree, 2, looped={}).export(
        folder / "out", "torch-export", [0], check=False
    ),
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


@pytest.mark.parametrize("what", STEPS)
def test_long_steps_show_a_bar_on_request_only(what, small_backbone, terminal, tmp_path):
    STEPS[what](small_backbone, tmp_path)
    assert not terminal.getvalue()
    with progress_bars():
        STEPS[what](small_backbone, tmp_path)
    assert what in terminal.getvalue()
    written = terminal.getvalue()
    assert list(with_progress("ab", 2, "later")) == ["a", "b"] and terminal.getvalue() == written


def test_one_bar_at_a_time_on_a_terminal_in_the_first_process(terminal, monkeypatch):
    with progress_bars():
        assert [list(with_progress("ab", 2, "inner")) for _ in with_progress("ab", None, "outer")] == [["a", "b"]] * 2
        assert "outer" in terminal.getvalue() and "inner" not in terminal.getvalue()
        for _ in with_progress("ab", 2, "left early"):
            break
        assert list(with_progress("ab", 2, "after it")) == ["a", "b"] and "after it" in terminal.getvalue()
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert list(with_progress("ab", 2, "elsewhere")) == ["a", "b"] and "elsewhere" not in terminal.getvalue()
        monkeypatch.delenv("LOCAL_RANK")
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        assert list(with_progress("ab", 2, "file")) == ["a", "b"] and not sys.stderr.getvalue()


def test_the_program_asks_for_bars(terminal):
    cli.main(["zoo", "test_resnet", "--blocks", "2"])
    assert "cutting" in terminal.getvalue()
