"""One run at a time in an output folder, and what a kill leaves does not stop the next."""

import signal

import pytest

from hierens.training.lock import check_unlocked, lock_folder
from hierens.training.run import train as train_run
from support.runs import trainer, wait_for_log

SHORT = {"blocks": 2, "epochs": 2, "batch_size": 64, "checkpoint_steps": 5, "log_steps": 1}
REFUSED = "another run is writing to {}: wait until it ends, or choose another output_dir."


@pytest.mark.sampled
def test_a_second_run_is_told_and_a_killed_one_does_not_stop_the_next(launcher, tmp_path):
    first = launcher.start(tmp_path, SHORT | {"workers": 2})
    wait_for_log(tmp_path, 7)
    described = (tmp_path / "run.json").read_bytes()
    second = launcher.start(tmp_path, SHORT | {"lr": 0.5})
    assert second.wait() == 1
    assert second.output.rstrip().endswith("ValueError: " + REFUSED.format(tmp_path))
    assert (tmp_path / "run.json").read_bytes() == described
    first.kill(signal.SIGKILL)
    third = launcher.start(tmp_path, SHORT)  # at once, while the loader's workers have not noticed
    assert "resuming from" in third.finish()


@pytest.mark.sampled
def test_several_processes_of_one_run_share_it(launcher, tmp_path):
    for run in launcher.start_several(2, tmp_path, SHORT | {"epochs": 1}):
        run.finish()
    assert (tmp_path / "results.json").exists()


def test_it_is_told_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("hierens.training.run.create_loaders", lambda *args: pytest.fail("data were made"))
    from hierens.training.config import Run, TrainConfig

    with lock_folder(tmp_path / "out"), pytest.raises(ValueError) as refused:
        train_run(Run(train=TrainConfig(output_dir=str(tmp_path / "out"))))
    assert str(refused.value) == REFUSED.format(tmp_path / "out")


def test_the_trainer_itself_refuses_and_touches_nothing(tmp_path):
    trainer(tmp_path).fit()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = trainer(tmp_path, resume="never")
    with lock_folder(tmp_path), pytest.raises(ValueError, match="another run is writing to"):
        again.fit()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert again.fit()


def test_a_free_folder_is_not_made_by_looking(tmp_path):
    check_unlocked(tmp_path / "out")
    assert not list(tmp_path.iterdir())
