"""Told to stop, a run finishes its step, writes a checkpoint, and goes on from there in the same bits."""

import os
import random
import re
import signal
import sys
import threading
import time

import pytest
from torch.utils.data import TensorDataset

from hierens.training import signals
from hierens.training.checkpoints.selection import newest_checkpoint
from hierens.training.signals import StopSignals, TrainingInterrupted
from support.runs import log, made_up_data, trainer, wait_for_log, weights


@pytest.mark.sampled
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 2)])
def test_a_signal_ends_the_run_after_its_step(launcher, short_run, tmp_path, number, workers):
    settings, undisturbed = short_run
    run = launcher.start(tmp_path, settings | {"workers": workers})
    wait_for_log(tmp_path, random.randrange(1, 12))
    os.killpg(run.pid, number)  # as a terminal does: the loader's workers are told too
    assert run.wait() == 128 + number, run.output
    checkpoint = newest_checkpoint(tmp_path)
    step = int(checkpoint.name.removeprefix("step-"))
    line = f"{number.name}: stopped after step {step}; the newest checkpoint is {checkpoint}. The same command with"
    assert line in run.output.splitlines()[-1]
    assert f"resuming from {checkpoint}" in launcher.start(tmp_path, settings).finish()
    assert weights(tmp_path) == weights(undisturbed)
    assert log(tmp_path) == log(undisturbed)


def test_a_signal_that_ends_the_workers_as_well_is_clear(launcher, short_run, tmp_path):
    run = launcher.start(tmp_path, short_run[0] | {"workers": 2, "checkpoint_steps": 2})
    wait_for_log(tmp_path, 2)
    os.killpg(run.pid, signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM, run.output
    assert re.search(r"SIGTERM: stopped (after|within) .* the newest checkpoint is ", run.output)


class Signalling(TensorDataset):
    """Sends this process a signal when an image is asked for, once."""

    def __init__(self, number, image, images=96, seed=0):
        super().__init__(*made_up_data(images, seed).tensors)
        self.number, self.image = number, image

    def __getitem__(self, index):
        if self.image is not None and self.image == index:
            self.image = None
            signal.raise_signal(self.number)
        return super().__getitem__(index)


def test_handlers_come_back_and_fit_goes_on(tmp_path):
    mine = signal.signal(signal.SIGTERM, handler := lambda number, frame: None)
    try:
        run = trainer(tmp_path, data=Signalling(signal.SIGTERM, 5))
        with pytest.raises(TrainingInterrupted) as stopped:
            run.fit()
        assert stopped.value.code == 143 and stopped.value.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is handler
        assert run.fit() and run.state.step == 6
        trainer(tmp_path / "whole").fit()
        assert weights(tmp_path) == weights(tmp_path / "whole")
    finally:
        signal.signal(signal.SIGTERM, mine)


class LosingWorkers(Signalling):
    """After the signal, reading fails as it does if the signal has also ended a worker that was sending a batch."""

    error: type[Exception] = ConnectionResetError

    def __getitem__(self, index):
        lost = self.image == index
        sample = super().__getitem__(index)
        if lost:
            raise self.error("Connection reset by peer")
        return sample


@pytest.mark.parametrize("error", [ConnectionResetError, EOFError, FileNotFoundError])
def test_a_signal_that_ends_a_sending_worker_is_no_error(tmp_path, error):
    data = LosingWorkers(signal.SIGTERM, 5)
    data.error = error
    with pytest.raises(TrainingInterrupted) as stopped:
        trainer(tmp_path, data=data).fit()
    assert stopped.value.code == 143
    data = LosingWorkers(0, 5)  # signal 0 is none
    data.error = error
    with pytest.raises(error):
        trainer(tmp_path / "without", data=data).fit()


def test_stopped_while_validating_it_validates_again(tmp_path):
    run = trainer(tmp_path, ema_decay=0.9)
    run.val_loader.dataset.__class__ = Signalling
    run.val_loader.dataset.__dict__.update(number=signal.SIGTERM, image=35)
    with pytest.raises(TrainingInterrupted):
        run.fit()
    assert newest_checkpoint(tmp_path).name == "step-000000003" and not run.state.history
    trainer(tmp_path, ema_decay=0.9).fit()
    trainer(tmp_path / "whole", ema_decay=0.9).fit()
    assert weights(tmp_path) == weights(tmp_path / "whole")
    assert log(tmp_path) == log(tmp_path / "whole")


def test_ctrl_c_in_a_notebook_leaves_the_session(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    run = trainer(tmp_path, data=Signalling(signal.SIGINT, 5))
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert newest_checkpoint(tmp_path) is not None
    assert run.fit() and run.state.step == 6


def test_outside_the_main_thread_signals_are_left_alone(tmp_path):
    before, history = signal.getsignal(signal.SIGTERM), []
    run = trainer(tmp_path, epochs=1)
    thread = threading.Thread(target=lambda: history.extend(run.fit()))
    thread.start()
    thread.join()
    assert len(history) == 1 and signal.getsignal(signal.SIGTERM) is before


def test_what_a_parent_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as noted:
            signal.raise_signal(signal.SIGINT)
            assert not noted.received
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("echo", [0.0, 60.0])
def test_the_second_signal_ends_at_once(monkeypatch, echo):
    """But not the one that a launcher hands on right after the terminal's."""
    monkeypatch.setattr(signals, "_ECHO_SECONDS", echo)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with StopSignals():
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.01)
            signal.raise_signal(signal.SIGTERM)
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (-signal.SIGTERM if echo == 0.0 else 7)


def test_a_signal_that_nobody_acted_on_takes_effect_at_the_end():
    with pytest.raises(KeyboardInterrupt), StopSignals():
        signal.raise_signal(signal.SIGINT)
