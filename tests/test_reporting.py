"""Reports: runs grouped by what sets them apart, averaged over seeds, drawn."""

import json

import pytest
from PIL import Image

from hierens.evaluation.reporting import comparison, read_runs, write_report


def finished(directory, seed, objective, first):
    directory.mkdir(parents=True)
    config = {"model": {"backbone": "x"}, "train": {"objective": objective, "seed": seed, "output_dir": str(directory)}}
    (directory / "run.json").write_text(json.dumps(config))
    record = {name: [first, first + 1, first + 2] for name in ("accuracy", "nll", "ece", "std", "agreement")}
    record |= {"macs": [1e6, 2e6, 4e6], "leaf_accuracy": [first] * 4}
    (directory / "results.json").write_text(json.dumps(record))
    return directory


@pytest.fixture
def runs(tmp_path):
    return [
        finished(tmp_path / f"{objective}-{seed}", seed, objective, 90 + 2 * seed + (objective == "b"))
        for objective in "ab"
        for seed in range(2)
    ]


def test_seeds_are_averaged_and_groups_named_by_what_differs(runs):
    groups = read_runs(runs)
    assert [group.name for group in groups] == ["objective=a", "objective=b"]
    assert groups[0].mean("accuracy") == [91, 92, 93] and groups[1].mean("accuracy") == [92, 93, 94]
    assert groups[0].spread("accuracy") == pytest.approx([2**0.5] * 3)
    assert [group.name for group in read_runs(runs[:2], ["one", "two"])] == ["one", "two"]
    assert [group.name for group in read_runs(runs[:1])] == ["a-0"]


def test_tables_have_a_column_per_number_of_networks(runs):
    lines = comparison(read_runs(runs)).splitlines()
    assert lines[0].split("|")[1:-1] == [
        f"{text:>{len(cell) - 2}}".join("  ")
        for text, cell in zip(["", "1", "2", "4"], lines[0].split("|")[1:-1], strict=True)
    ]
    assert "91.00 ± 1.41" in lines[2] and "94.00 ± 1.41" in lines[3]
    assert "±" not in comparison(read_runs(runs[:1]))


def test_a_report_is_a_page_with_pictures(runs, tmp_path):
    page = write_report(read_runs(runs), tmp_path / "report")
    text = page.read_text()
    assert text.count("objective=a") >= 5 and "objective=b: 2" in text
    for name in ("accuracy.png", "leaves.png"):
        assert f"({name})" in text
        assert min(Image.open(page.parent / name).size) > 300


@pytest.mark.parametrize(
    "damage", [lambda d: (d / "run.json").unlink(), lambda d: (d / "results.json").write_text("{")]
)
def test_what_is_no_finished_run_is_named(runs, damage):
    damage(runs[0])
    with pytest.raises(ValueError, match=f"{runs[0]} is not a finished run"):
        read_runs(runs)


def test_names_must_be_as_many_as_runs(runs):
    with pytest.raises(ValueError, match="4 runs need as many names, got 1"):
        read_runs(runs, ["one"])
