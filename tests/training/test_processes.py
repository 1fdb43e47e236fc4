"""Several processes over gloo: the curve of one, whatever their number, also when it changes on the way."""

import json
import random
import signal

import pytest
from torch.utils.data import DataLoader

import hierens
from hierens.evaluation.metrics import evaluate_model
from hierens.training.data.loaders import create_datasets
from hierens.training.presets import PRESETS
from support.runs import log, wait_for_log

# A smooth activation: the digits' background is one constant, and where rounding moves it across a ReLU's kink, curves
# part by 1e-5 within ten steps, with one process and a single weight changed by one unit of rounding just as well.
SHORT = {"blocks": 2, "epochs": 1, "batch_size": 64, "augment": "none", "checkpoint_steps": 100}
SHORT |= {"backbone_args": {"act_layer": "silu"}}


def losses(directory):
    return [record["loss"] for record in log(directory) if "loss" in record]


def check_validation(directory):
    """What several processes found together is what the saved model gives alone."""
    images = DataLoader(
        create_datasets(PRESETS["digits"].data)[1], 256
    )  # 450 of them do not divide by 2 * 256 or 4 * 64
    expected = evaluate_model(hierens.from_pretrained(directory / "model"), images)
    found = next(record for record in log(directory) if "val_loss" in record)
    assert found["accuracy"] == pytest.approx(expected.accuracy), "every image is validated once"
    assert found["ece"] == pytest.approx(expected.ece, rel=1e-4)


def train(launcher, directory, processes, stop_after=None, settings=SHORT, **environment):
    """To the end, or until one of the processes is told to stop."""
    runs = launcher.start_several(processes, directory, settings, **environment)
    if stop_after is None:
        return [run.finish() for run in runs]
    wait_for_log(directory, stop_after)
    random.choice(runs).kill(signal.SIGTERM)
    assert [run.wait() for run in runs] == [143] * processes, runs[0].output
    return [run.output for run in runs]


@pytest.fixture(scope="module")
def alone(launcher, tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    train(launcher, directory, 1)
    curve = losses(directory)
    assert curve[-1] < curve[0]
    return curve


@pytest.mark.sampled
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_train_as_one(launcher, alone, tmp_path, processes):
    train(launcher, tmp_path, processes)
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-5)
    check_validation(tmp_path)


@pytest.mark.sampled
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_processes_goes_on(launcher, alone, tmp_path, before, after):
    outputs = train(launcher, tmp_path, before, stop_after=3)
    assert sum("SIGTERM: stopped after step" in output for output in outputs) == 1
    assert "resuming from" in train(launcher, tmp_path, after)[0]
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-5)


@pytest.mark.sampled
def test_shared_out_weights_train_as_whole_ones(launcher, alone, tmp_path):
    """FSDP on two processes: the curve of one, through a stop, and a model that loads without any process group."""
    outputs = train(launcher, tmp_path, 2, stop_after=3, ACCELERATE_USE_FSDP="true")
    assert sum("SIGTERM: stopped after step" in output for output in outputs) == 1
    assert "resuming from" in train(launcher, tmp_path, 2, ACCELERATE_USE_FSDP="true")[0]
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-5)
    check_validation(tmp_path)
    for folder in (tmp_path / "model", tmp_path / "checkpoints" / "best"):
        assert json.loads((folder / "config.json").read_text())["label_names"] == list("0123456789")


@pytest.mark.sampled
@pytest.mark.parametrize("environment", [{}, {"ACCELERATE_USE_FSDP": "true"}])
def test_weights_that_branches_share_train_on_two_processes(launcher, tmp_path, environment):
    """DDP and FSDP: the gradient of a shared weight is the sum over branches and processes, as in one process."""
    light = SHORT | {"members": ["rank1"]}
    train(launcher, tmp_path / "alone", 1, settings=light)
    train(launcher, tmp_path / "two", 2, settings=light, **environment)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    check_validation(tmp_path / "two")
    model = hierens.from_pretrained(tmp_path / "two" / "model")
    assert sum(parameter.numel() for parameter in model.parameters()) == model.parameter_counts()[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs several processes, and there is only one"),
        ({"ema_decay": 0.9}, "weights cannot be averaged with FSDP"),
        ({"precision": "fp16"}, "not in fp16"),
    ],
)
def test_what_sharding_cannot_do_is_refused(launcher, tmp_path, settings, message):
    run = launcher.start(tmp_path, SHORT | settings, ACCELERATE_USE_FSDP="true")
    assert run.wait() == 1 and "ValueError: " in run.output and message in run.output


@pytest.mark.sampled
def test_a_run_goes_on_as_it_was_shared_out(launcher, tmp_path):
    train(launcher, tmp_path, 2, stop_after=3)
    runs = launcher.start_several(2, tmp_path, SHORT, ACCELERATE_USE_FSDP="true")
    assert [run.wait() for run in runs] == [1, 1]
    assert "was written without FSDP, this run trains with FSDP" in runs[0].output


@pytest.mark.sampled
def test_processes_train_again_and_again_each_time_as_asked(launcher, alone, tmp_path):
    """Four runs in the same two processes: shared out as they were launched, once more, told not to, and told to."""
    asked = {"sharded": ["", "", "false", "true"]}
    for run in launcher.start_several(2, tmp_path, SHORT | asked, ACCELERATE_USE_FSDP="true"):
        run.finish()
    for number, sharded in enumerate((True, True, False, True)):
        assert losses(tmp_path / str(number)) == pytest.approx(alone, rel=1e-5)
        written = [file.name for file in (tmp_path / str(number) / "checkpoints").glob("*/optimizer*")]
        assert written and all((name == "optimizer_by_name.bin") is sharded for name in written), number
