"""What strangers may put into any file that is loaded ends in what was asked for or in one line, by thousands."""

import pytest
from hostile_files import storm, summary

SAMPLE = {"configs": 100, "folders": 25, "policies": 60, "tuning files": 40, "checkpoints": 12}
FULL = {"configs": 10_000, "folders": 500, "policies": 100, "tuning files": 100, "checkpoints": 100}


def check(kind, count, folder, seed):
    outcomes = storm(kind, count, folder, seed)
    assert max(outcome.seconds for outcome in outcomes) < 10, "seconds of CPU"
    assert max(outcome.mib for outcome in outcomes) < 1024
    assert len(summary(outcomes, folder)) > 3, "and the attacks differ"


@pytest.mark.parametrize("kind", SAMPLE)
def test_files_of_strangers_end_in_a_model_or_one_line(kind, tmp_path):
    check(kind, SAMPLE[kind], tmp_path, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULL)
def test_many_files_of_strangers_end_in_a_model_or_one_line(kind, tmp_path):
    check(kind, FULL[kind], tmp_path, seed=1)
