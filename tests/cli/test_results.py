"""`hierens eval` and `hierens report`."""

import json

import pytest

from support.command_line import hierens


def test_evaluation_repeats_what_training_found(trained):
    directory, *_ = trained
    done = hierens("eval", directory / "run1" / "model", "--json")
    assert done.code == 0, done.err
    results = json.loads((directory / "run1" / "results.json").read_text())
    found = json.loads(done.out)
    assert found["accuracy"] == pytest.approx(results["accuracy"]) and found["ece"] == pytest.approx(results["ece"])
    shown = hierens("eval", directory / "run1" / "model", "--batch-size", 100).out
    assert f"| {found['accuracy'][1]:12.2f} |" in shown and shown.count("\n") == 4


def test_a_report_of_two_seeds(trained):
    directory, *_ = trained
    done = hierens("report", directory / "run0", directory / "run1", "--output", directory / "out")
    assert done.code == 0, done.err
    files = [f"{directory}/out/{name}" for name in ("report.md", "accuracy.png", "diversity.png", "leaves.png")]
    assert "±" in done.out and done.out.splitlines()[-4:] == [f"wrote {file}" for file in files]
    done = hierens("report", directory / "run0", "--output", directory / "one", "--cost", "milliseconds", "--json")
    record = json.loads(done.out)
    assert record["page"] == record["files"][0] == f"{directory}/one/report.md" and len(record["runs"]) == 1
    assert len(record["runs"][0]["milliseconds"]) == len(record["runs"][0]["macs"]) == 2
