"""What the tests of several modules start processes with."""

import pytest
from launcher import Launcher


@pytest.fixture(scope="module")
def launcher():
    with Launcher() as running:
        yield running
