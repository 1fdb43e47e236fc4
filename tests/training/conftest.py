"""Fixtures of the tests that start processes."""

import pytest

from support.launcher import Launcher

SHORT = {"blocks": 2, "epochs": 2, "batch_size": 64, "checkpoint_steps": 100, "log_steps": 3}  # 21 steps an epoch


@pytest.fixture(scope="session")
def launcher():
    with Launcher() as running:
        yield running


@pytest.fixture(scope="session")
def short_run(launcher, tmp_path_factory):
    """Settings of a short run, and the folder of one that was not disturbed."""
    directory = tmp_path_factory.mktemp("short")
    launcher.start(directory, SHORT).finish()
    return SHORT, directory
