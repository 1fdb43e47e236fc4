"""What a release consists of: the built files hold the package alone, with metadata that PyPI accepts, and run."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.metadata import Metadata

from hierens.core.version import __version__

ROOT = Path(__file__).parents[1]
PACKAGE = f"hierens-{__version__}"
RELEASE = ROOT / ".github/workflows/release.yml"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of the checkout, and the wheel that is built from its content, as `uv build` builds it."""
    pytest.importorskip("hatchling")
    dist, content = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("content")
    build = [sys.executable, "-m", "hatchling", "build", "--directory", str(dist), "--target"]
    subprocess.run([*build, "sdist"], cwd=ROOT, check=True)
    sdist, wheel = dist / f"{PACKAGE}.tar.gz", dist / f"{PACKAGE}-py3-none-any.whl"
    with tarfile.open(sdist) as archive:
        archive.extractall(content, filter="data")
    subprocess.run([*build, "wheel"], cwd=content / PACKAGE, check=True)
    assert set(dist.iterdir()) == {sdist, wheel}
    return sdist, wheel


def tracked(*patterns):
    listed = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(filter(None, listed.stdout.split("\0")))


def test_the_files_hold_the_package_and_nothing_else(built):
    sdist, wheel = built
    package = tracked("hierens", "_hierens_cli.py")
    assert {"hierens/py.typed", "hierens/training/data/clothing/train/hat.jpg"} <= package
    about = {f"{PACKAGE}.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == package | about | {f"{PACKAGE}.dist-info/licenses/LICENSE"}
    beside = {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "pyproject.toml", ".gitignore", "PKG-INFO"}
    with tarfile.open(sdist) as archive:
        assert {name.partition("/")[2] for name in archive.getnames()} == package | beside
    assert max(path.stat().st_size for path in built) < 4e6, "the photographs are 2.3 MB of it"


def test_the_metadata_are_those_that_an_index_accepts(built):
    with zipfile.ZipFile(built[1]) as archive:
        text = archive.read(f"{PACKAGE}.dist-info/METADATA")
    metadata = Metadata.from_email(text, validate=True)
    assert str(metadata.version) == __version__ and metadata.license_expression == "Apache-2.0"
    assert metadata.license_files == ["LICENSE"] and metadata.description_content_type == "text/markdown"
    assert metadata.description.startswith("# hierens") and {"train", "all"} <= set(metadata.provides_extra)


def test_one_version_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    sections = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(name for name in sections if name != "Unreleased") == __version__


def step(name):
    jobs = yaml.safe_load(RELEASE.read_text())["jobs"]
    return next(step["run"] for job in jobs.values() for step in job["steps"] if step.get("name") == name)


def test_the_description_on_an_index_has_no_relative_links(tmp_path):
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    known = {"GITHUB_SERVER_URL": "https://host", "GITHUB_REPOSITORY": "a/b", "GITHUB_REF_NAME": "v1"}
    subprocess.run(
        ["bash", "-ec", step("Links of the description")], cwd=tmp_path, env={**os.environ, **known}, check=True
    )
    links = re.findall(r"\]\(([^)]+)\)", (tmp_path / "README.md").read_text())
    assert all("://" in link for link in links)
    assert "https://host/a/b/blob/v1/docs/tutorial.md" in links
    assert "https://host/a/b/raw/v1/docs/results/cifar100_costs.png" in links


@pytest.mark.parametrize(
    ("tag", "heading", "code"),
    [("v1.2", "1.2 - 2030-01-01", 0), ("v1.3", "1.2", 1), ("v1.2", "1.2 (unreleased)", 1), ("v1.2", "Unreleased", 1)],
)
def test_only_the_tag_of_a_described_version_is_published(tmp_path, tag, heading, code):
    (tmp_path / "hierens/core").mkdir(parents=True)
    (tmp_path / "hierens/core/version.py").write_text('"""The version."""\n\n__version__ = "1.2"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {heading}\n")
    command = ["bash", "-ec", step("The tag is the version, and the changelog describes it")]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "GITHUB_REF_NAME": tag}, capture_output=True)
    assert done.returncode == code, done.stderr


@pytest.mark.slow
def test_the_wheel_installs_and_trains(built, tmp_path):
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(tmp_path / "site"),
    ]
    subprocess.run([*pip, str(built[1])], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(sys.executable, "-c", "import hierens; print(hierens.__file__)")
    assert Path(where.strip()).is_relative_to(tmp_path / "site")
    assert run(tmp_path / "site/bin/hierens", "--version") == f"hierens {__version__}\n"
    run(sys.executable, "-m", "hierens", "demo", "--epochs", "1", "--output-dir", "run")
    assert (tmp_path / "run/accuracy.png").is_file() and (tmp_path / "run/model/config.json").is_file()
