"""Two short runs, for all commands that want a saved model."""

import pytest
from command_line import hierens

SMALL = ["--preset", "demo", "--epochs", "1", "--batch-size", "64", "--blocks", "2"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Two short runs that differ in their seed, and what each printed: the second one by --json."""
    directory = tmp_path_factory.mktemp("cli")
    printed = []
    for seed, flags in enumerate(([], ["--json"])):
        done = hierens("train", *SMALL, "--seed", seed, "--output-dir", directory / f"run{seed}", *flags)
        assert done.code == 0, done.err
        printed.append(done)
    return directory, *printed
