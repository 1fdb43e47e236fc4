"""Progress bars: on request, on terminals, one at a time, in one process."""

import io
from contextlib import redirect_stderr

import pytest
import torch

import hierens
from hierens import cli
from hierens.core.progress import progress_bars, with_progress

STEPS = {
    "checking the executors": lambda tree, folder: hierens.hierensify(tree, 2),
    "tuning": lambda tree, folder: hierens.hierensify(tree, 2, looped={}).tune(torch.zeros(1, 1, 32, 32)),
    "writing graphs": lambda tree, folder: hierens.hierensify(tree, 2, looped={}).export(
        folder / "out", "torch-export", depths=[0], check=False
    ),
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch):
    """A function that runs another one, and returns what that wrote on a terminal's stderr."""
    monkeypatch.setenv("TERM", "xterm")

    def run(call, *arguments):
        with redirect_stderr(Terminal()) as stderr:
            call(*arguments)
        return stderr.getvalue()

    return run


def steps(what):
    assert list(with_progress("ab", 2, what)) == ["a", "b"]


@pytest.mark.parametrize("what", STEPS)
def test_long_steps_show_a_bar_on_request_only(what, small_backbone, shown, tmp_path):
    assert not shown(STEPS[what], small_backbone, tmp_path)
    with progress_bars():
        assert what in shown(STEPS[what], small_backbone, tmp_path)
    assert not shown(steps, "later")


def test_one_bar_at_a_time_on_a_terminal_in_the_first_process(shown, monkeypatch):
    def nested():
        for _ in with_progress("ab", None, "outer"):
            steps("inner")

    def left_early():
        for _ in with_progress("ab", 2, "left"):
            break

    with progress_bars():
        written = shown(nested)
        assert "outer" in written and "inner" not in written
        assert "left" in shown(left_early) and "next" in shown(steps, "next")
        with redirect_stderr(io.StringIO()) as file:
            steps("file")
        assert not file.getvalue()
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert not shown(steps, "elsewhere")


def test_the_program_asks_for_bars(shown):
    assert "cutting" in shown(cli.main, ["zoo", "test_resnet", "--blocks", "2"])
