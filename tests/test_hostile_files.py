"""Untrusted files load or raise an error of one line, in bounded memory and time."""

import pytest

import hierens
from support.attempts import attempt, summary
from support.hostile_files import FULL, SAMPLE, storm
from support.networks import tiny_tree


@pytest.fixture(scope="module")
def cpu_seconds(tmp_path_factory):
    """Of loading a small valid model: the measure of the time that an attack may take."""
    folder = tmp_path_factory.mktemp("control")
    tiny_tree().save_pretrained(folder)
    return max(attempt(lambda: hierens.from_pretrained(folder) and "").seconds for _ in range(3))


def check(kind, count, folder, seed, cpu_seconds):
    outcomes = storm(kind, count, folder, seed)
    assert max(outcome.seconds for outcome in outcomes) < 500 * cpu_seconds
    assert max(outcome.mib for outcome in outcomes) < 1024
    assert len(summary(outcomes, folder)) > 3, "the attacks differ"


@pytest.mark.sampled
@pytest.mark.parametrize("kind", SAMPLE)
def test_untrusted_files_load_or_raise_one_line(kind, tmp_path, cpu_seconds):
    check(kind, SAMPLE[kind], tmp_path, 0, cpu_seconds)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULL)
def test_many_untrusted_files_load_or_raise_one_line(kind, tmp_path, cpu_seconds):
    check(kind, FULL[kind], tmp_path, 1, cpu_seconds)
