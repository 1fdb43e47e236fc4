"""`hierens calibrate`."""

import json
import shutil
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from hierens.cli.calibrate import CalibrateSettings
from hierens.evaluation.uncertainty import Measure
from hierens.inference import calibration
from hierens.inference.policies import load_policy
from support.command_line import hierens

DIGITS = ("--dataset", "digits", "--workers", 0)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A saved model without a policy, in which an evaluated network takes a millisecond."""
    monkeypatch.setattr(calibration, "call_ms", lambda call, device, seconds: float(call().leaves))
    folder = tmp_path / "model"
    shutil.copytree(Path(__file__).parents[2] / "models" / "digits-tree", folder)
    (folder / "policy.json").unlink()
    return folder


def test_a_policy_is_saved_beside_the_model_and_measured_on_other_images(model):
    done = hierens("calibrate", model, *DIGITS, "--milliseconds", 2, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["calibration_images"] + found["expected"]["images"] == 450
    assert found["expected"]["milliseconds"] == pytest.approx(found["expected"]["leaves"], rel=0.1), "of the bootstrap"
    assert abs(found["expected"]["leaves"]["mean"] - 2) < 4 * found["expected"]["leaves"]["standard_error"]
    assert [depth["leaves"]["mean"] for depth in found["depths"]] == [1, 2, 4, 8]
    assert load_policy(model).to_dict() == found["policy"] and found["file"] == str(model / "policy.json")


def test_the_tail_of_the_latencies_is_a_target(model):
    done = hierens("calibrate", model, *DIGITS, "--p95-milliseconds", 4, "--json")
    assert done.code == 0, done.err
    expected = json.loads(done.out)["expected"]
    assert expected["p95_milliseconds"]["mean"] <= 8 and expected["leaves"]["mean"] > 1


def test_a_table_compares_the_policy_with_fixed_depths(model, tmp_path):
    done = hierens("calibrate", model, *DIGITS, "--accuracy", 97, "--measure", "margin", "--output", tmp_path / "other")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:7]] == [f"depth {depth}" for depth in range(4)] + ["policy"]
    assert "225" in done.out and f"wrote {tmp_path}/other/policy.json" in done.out
    assert load_policy(tmp_path / "other").measure == "margin" and not (model / "policy.json").exists()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ((), 2, "give one target: --budget MACS, --milliseconds TIME, --p95-milliseconds TIME or --accuracy"),
        (("--budget", 1e6, "--accuracy", 90), 2, "give one target"),
        (("--budget", 10), 1, "the budget must be from 7.72e+05 to 3.36e+06 MACs per image, got 10"),
        (("--accuracy", 100.5), 1, "at most 100, got 100.5"),
    ],
)
def test_a_target_out_of_reach_saves_nothing(model, flags, code, message):
    done = hierens("calibrate", model, *DIGITS, *flags)
    assert done.code == code and message in done.err and not done.out
    assert not (model / "policy.json").exists()


def test_a_model_that_is_no_folder_needs_an_output():
    done = hierens("calibrate", "user/name", "--budget", 1e6)
    assert done.code == 2 and "user/name is not a folder: give --output" in done.err


def test_the_measures_are_those_of_policies():
    assert get_args(get_type_hints(CalibrateSettings)["measure"]) == get_args(Measure)
