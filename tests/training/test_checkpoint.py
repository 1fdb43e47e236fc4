"""Whatever is killed, cut short or full: a run goes on from the newest whole checkpoint and ends in the same bits."""

import contextlib
import json
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

import hierens
from hierens.training.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from hierens.training.checkpoints.files import MANIFEST, damage, publish, recover, remove, seal
from hierens.training.checkpoints.selection import choose_checkpoint, newest_checkpoint, start_from
from support.runs import log, trainer, weights

SHORT = {"blocks": 2, "epochs": 4, "batch_size": 64, "checkpoint_steps": 4, "log_steps": 3}  # 21 steps an epoch


@pytest.fixture(scope="module")
def undisturbed(launcher, tmp_path_factory):
    """A run without faults, and the seconds it took."""
    directory, start = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    launcher.start(directory, SHORT).finish()
    return directory, time.monotonic() - start


def checkpoints(directory):
    return sorted(path for path in (directory / "checkpoints").glob("step-*") if not path.suffix)


def step_of(checkpoint):
    return int(checkpoint.name.removeprefix("step-"))


def cut_short(folder, rng):
    """What a full disk, a bad copy or a power cut leave."""
    file = rng.choice(sorted(path for path in folder.iterdir() if path.stat().st_size))
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])


def last_logged(directory):
    file = directory / "log.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def moment(directory):
    """What a run is at."""
    if any((directory / "checkpoints").glob("*.partial")):
        return "writing a checkpoint"
    if not (directory / "log.jsonl").exists():
        return "starting"
    newest = (directory / "log.jsonl").read_text().splitlines()[-1:]
    return "validating" if newest and re.search(r'"step": (21|42|63|84), "loss"', newest[0]) else "training"


def live(run, directory, seconds, aim):
    """Let a run be for some time, and then until it comes to the moment aimed at; its return code if it ends before."""
    code = run.wait(seconds)
    deadline = time.monotonic() + 1.0
    while aim is not None and code is None and time.monotonic() < deadline and moment(directory) != aim:
        code = run.wait(0.001)
    return code


def survive(launcher, undisturbed, directory, kills, cuts, seed):
    """Kill a run at random moments, cut its newest checkpoint short at some, and start it again each time."""
    whole, seconds = undisturbed
    rng, moments, course, done = random.Random(seed), Counter(), 0, 0
    cut_after = sorted(rng.sample(range(1, kills + 1), cuts))
    expected = lost = None
    while True:
        run_dir = directory / str(course)
        run = launcher.start(run_dir, SHORT)
        if done < kills:
            aim = rng.choice((None, None, "writing a checkpoint", "validating"))
            code = live(run, run_dir, rng.uniform(0, 0.3 + 2 * seconds / max(kills, 6)), aim)
        else:
            code = run.wait()
        if code is None:
            run.kill(signal.SIGKILL)
            run.wait()
        resumed = re.search(r"resuming from (\S+): epoch \d+, step (\d+)", run.output)
        if resumed and expected is not None:
            assert (Path(resumed[1]), int(resumed[2])) == (expected, step_of(expected)), run.output
            assert step_of(expected) >= lost
        if code is not None:
            assert code == 0, run.output
            assert weights(run_dir) == weights(whole)
            assert log(run_dir) == log(whole)
            if done == kills:
                return moments
            course, expected = course + 1, None  # it came to its end before the kill: once more from the beginning
            continue
        done += 1
        moments[moment(run_dir)] += 1
        found = [folder for folder in checkpoints(run_dir) if damage(folder) is None]
        newest = step_of(found[-1]) if found else 0
        aside = [int(path.stem.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("*.damaged")]
        # the log still holds what came after one that was put aside, if the kill came before it was trimmed
        intervals = 1 + len(checkpoints(run_dir)) - len(found) + sum(step > newest for step in aside)
        # Not two in a row before a new one is written: all of keep_checkpoints would be lost, and only the best left.
        spare = len(found) >= 2 and step_of(found[-1]) - step_of(found[-2]) <= SHORT["checkpoint_steps"]
        if cut_after and done >= cut_after[0] and spare:
            cut_short(found.pop(), rng)
            cut_after.pop(0)
            moments["cut short"] += 1
            intervals += 1
        expected = found[-1] if found else None
        lost = last_logged(run_dir) - intervals * SHORT["checkpoint_steps"]
        assert expected is not None or lost <= 0


@pytest.mark.sampled
def test_killed_and_resumed_ends_in_the_same_bits(launcher, undisturbed, tmp_path):
    survive(launcher, undisturbed, tmp_path, kills=3, cuts=1, seed=time.time_ns() % 1000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_twenty_times_ends_in_the_same_bits(launcher, undisturbed, tmp_path, seed):
    moments = survive(launcher, undisturbed, tmp_path, kills=20, cuts=2, seed=seed)
    print(f"seed {seed}: {dict(moments)}")
    assert moments["cut short"] == 2


def sealed(folder, text="weights"):
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True)
    (partial / "trainer.json").write_text(text)
    seal(partial)
    publish(partial, folder)
    return folder


def test_damage_is_seen_in_every_file(tmp_path):
    folder = sealed(tmp_path / "step-000000001")
    (folder / "trainer.json").write_text("WEIGHTS")
    assert damage(folder) == "the contents of trainer.json have changed"
    (folder / "trainer.json").write_text("weight")
    assert damage(folder) == "trainer.json has 6 bytes, not 7"
    (folder / "trainer.json").unlink()
    assert damage(folder) == "trainer.json is missing"
    for size in range(len(manifest := (folder / MANIFEST).read_bytes())):
        (folder / MANIFEST).write_bytes(manifest[:size])
        assert damage(folder) == f"its {MANIFEST} cannot be read"
    (folder / MANIFEST).unlink()
    assert damage(folder) == f"it has no {MANIFEST}"


def test_replacing_a_folder_never_loses_both(tmp_path):
    """A kill after each of the renames that publishing makes over a folder of the same name."""
    final = tmp_path / "step-000000001"
    sealed(final, "old")
    sealed(final, "new")
    assert (final / "trainer.json").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == [final.name]
    final.rename(tmp_path / "step-000000001.replaced")  # killed here, the new one still without its name
    (tmp_path / "step-000000001.partial").mkdir()
    recover(tmp_path, "step-*")
    assert [p.name for p in tmp_path.iterdir()] == [final.name] and damage(final) is None
    sealed(tmp_path / "step-000000001.replaced")  # killed here, the old one not yet gone
    recover(tmp_path, "step-*")
    assert [p.name for p in tmp_path.iterdir()] == [final.name] and (final / "trainer.json").read_text() == "new"
    remove(final)
    assert not list(tmp_path.iterdir())


def test_damaged_checkpoints_are_named_and_put_aside(tmp_path, capsys):
    steps = [sealed(tmp_path / "checkpoints" / f"step-00000000{step}") for step in (1, 2, 3)]
    (steps[2] / "trainer.json").write_text("")
    (tmp_path / "checkpoints" / "step-000000004").mkdir()
    assert choose_checkpoint(tmp_path, "auto") == steps[1]
    assert "step-000000003 is damaged: trainer.json has 0 bytes, not 7" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000000001", "step-000000002", "step-000000003.damaged", "step-000000004.damaged"]
    (steps[1] / "trainer.json").write_text("weighty")
    with pytest.raises(ValueError, match=r"step-000000002 is damaged: the contents of trainer.json have changed"):
        choose_checkpoint(tmp_path, str(steps[1]))
    assert choose_checkpoint(tmp_path, str(steps[0])) == steps[0].resolve()
    start_from(tmp_path, steps[0])
    assert "step-000000002 is newer than where this run starts" in capsys.readouterr().out
    assert newest_checkpoint(tmp_path) == steps[0]
    assert choose_checkpoint(tmp_path, "never") is None
    start_from(tmp_path, None)
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.sampled
def test_the_best_stays_and_is_a_model(tmp_path):
    run = trainer(tmp_path, epochs=4, lr=0.05, keep_checkpoints=1)
    validate = run._validate

    def get_worse_after_the_second_epoch(epoch):
        validate(epoch)
        run.state.history[-1]["accuracy"][-1] = (10.0, 90.0, 50.0, 50.0)[epoch]

    run._validate = get_worse_after_the_second_epoch
    run.fit()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000000006", "step-000000012"]
    best = hierens.from_pretrained(tmp_path / "checkpoints" / "best").state_dict()
    last = hierens.from_pretrained(tmp_path / "checkpoints" / "step-000000012").state_dict()
    assert all(last[name].equal(tensor) for name, tensor in run.ensemble.state_dict().items())
    assert not all(last[name].equal(tensor) for name, tensor in best.items())
    assert choose_checkpoint(tmp_path, str(tmp_path / "checkpoints" / "best")).name == "step-000000006"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamw"}, "written with optimizer='sgd', this run has 'adamw'"),
        ({"ema_decay": 0.9}, "written with ema_decay=None, this run has 0.9"),
        ({"batch_size": 48}, "written with batch_size=32, this run has 48: an epoch that is under way"),
        ({"blocks": 2}, "written with blocks=3, this run has 2"),
    ],
)
def test_checkpoints_of_other_runs_are_refused(tmp_path, settings, message):
    run = trainer(tmp_path, checkpoint_steps=2)
    run._validate = lambda epoch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.fit()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **settings).fit()


def files(folder):
    """What a run wrote, but for what it printed."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".txt"}


@pytest.mark.sampled
@pytest.mark.parametrize(("resume", "optimizer"), [("auto", "adamw"), ("step-000000007", "adamw"), ("nowhere", "sgd")])
def test_a_refused_resume_changes_nothing(launcher, tmp_path, resume, optimizer):
    short = {"blocks": 2, "epochs": 1, "batch_size": 64, "checkpoint_steps": 7}
    launcher.start(tmp_path / "run", short).finish()
    before = files(tmp_path / "run")
    assert before[tmp_path / "run" / "run.json"]
    resume = resume if resume == "auto" else str(tmp_path / "run" / "checkpoints" / resume)
    again = launcher.start(tmp_path / "run", short | {"optimizer": optimizer, "lr": 1e-3, "resume": resume})
    assert again.wait() == 1 and "ValueError" in again.output
    assert files(tmp_path / "run") == before


def test_changed_settings_are_named(tmp_path, capsys):
    trainer(tmp_path).fit()
    trainer(tmp_path, epochs=3, lr=0.01).fit()
    assert "step-000000006: epochs 2 -> 3, lr 0.02 -> 0.01\n" in capsys.readouterr().out


@contextlib.contextmanager
def largest_file(size):
    """Files cannot grow beyond this many bytes: what a quota does, and nearly what a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("weights_fit", [False, True])  # AdamW's state is twice as large
def test_training_outlives_checkpoints_that_cannot_be_written(tmp_path, capsys, weights_fit):
    run = trainer(tmp_path, checkpoint_steps=1, optimizer="adamw", lr=1e-3)
    size = sum(4 * parameter.numel() for parameter in run.model.parameters())
    validate, limit = run._validate, contextlib.ExitStack()

    def and_make_room(epoch):
        validate(epoch)
        limit.close()

    run._validate = and_make_room
    with limit:
        limit.enter_context(largest_file(int(1.5 * size) if weights_fit else 3000))
        run.fit()
    shown = capsys.readouterr().out
    for step in (1, 2):
        line = rf"step-00000000{step} cannot be written \(.*\): [\d,.]+ MB free in .*/checkpoints. Training continues;"
        assert re.search(line, shown), shown
    assert "step-000000003 cannot" not in shown
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    assert newest_checkpoint(tmp_path).name == "step-000000006"


def test_a_model_that_cannot_be_written_is_a_clear_error(tmp_path):
    run = trainer(tmp_path, epochs=1, ema_decay=0.9)
    save_models = run._save_models

    def with_a_full_disk():
        with largest_file(3000):
            save_models()

    run._save_models = with_a_full_disk
    with pytest.raises(ValueError, match=r"model cannot be written .*model_ema cannot .*step-000000003: make room and"):
        run.fit()
    assert not list(tmp_path.glob("model*"))
    trainer(tmp_path, epochs=1, ema_decay=0.9).fit()
    assert hierens.from_pretrained(tmp_path / "model")


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=750k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(small_disk, tmp_path, capsys):
    """Checkpoints until it is full, then none; the run comes to its end all the same."""
    settings = {"epochs": 3, "checkpoint_steps": 1, "keep_checkpoints": 9}
    trainer(small_disk, **settings).fit()
    assert re.search(r"step-000000009 cannot be written .*: 0\.\d MB free", capsys.readouterr().out)
    found = checkpoints(small_disk)
    assert found and all(damage(folder) is None for folder in found)
    assert not list((small_disk / "checkpoints").glob("*.partial"))
    trainer(tmp_path / "whole", **settings).fit()
    assert weights(small_disk) == weights(tmp_path / "whole")
    assert log(small_disk) == log(tmp_path / "whole")


def test_a_stream_in_another_order_is_refused(tmp_path):
    run = trainer(tmp_path, epochs=1)
    folder = save_checkpoint(run.accelerator, run.config, run.state, {"processes": 2, "workers": 4})
    with pytest.raises(ValueError, match=r"streamed to 2 processes, 4 workers, this run has 1 processes, 4 workers"):
        load_checkpoint(run.accelerator, folder, run.config, {"processes": 1, "workers": 4})
    assert load_checkpoint(run.accelerator, folder, run.config, {"processes": 2, "workers": 4}) == run.state
