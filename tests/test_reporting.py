"""Reports: runs grouped by what sets them apart, averaged over seeds, drawn."""

import json

import pytest
from PIL import Image

from hierens.evaluation import plotting
from hierens.evaluation.reporting import Group, comparison, read_runs, write_report
from hierens.evaluation.run_names import APPLIES, distinct_names
from hierens.objectives import DISTILLED, TERMS
from hierens.training.config import Run, to_json


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
    page, *pictures = write_report(read_runs(runs), tmp_path / "report")
    text = page.read_text()
    assert text.count("objective=a") >= 5 and "objective=b: 2" in text
    assert [picture.name for picture in pictures] == ["accuracy.png", "diversity.png", "leaves.png"]
    for picture in pictures:
        assert f"({picture.name})" in text
        assert min(Image.open(picture).size) > 300


@pytest.fixture
def figures(monkeypatch):
    """All figures that are drawn."""
    made, create = [], plotting._figure
    monkeypatch.setattr(plotting, "_figure", lambda *size: made.append(create(*size)) or made[-1])
    return made


def inside(figure, artist):
    """Whether an artist lies within the edges of its figure."""
    box, edges = artist.get_window_extent(), figure.bbox
    return box.x0 >= edges.x0 and box.x1 <= edges.x1 and box.y0 >= edges.y0 and box.y1 <= edges.y1


@pytest.mark.parametrize("count", [1, 2, 5, 6, 9])
def test_legends_and_titles_lie_inside_the_pictures(count, runs, figures, tmp_path):
    record = read_runs(runs[:1])[0].records[0]
    objective = "independent+hierarchical_codistillation"
    names = [f"objective={objective}, alpha=0.{n}, blocks=4, label_smoothing=0.1" for n in range(count)]
    groups = [Group(name, record["macs"], [record], milliseconds=[2, 3, 5]) for name in names]
    write_report(groups, tmp_path / "report", "milliseconds")
    for figure in figures:
        assert all(inside(figure, legend) for legend in figure.legends)
        assert all(inside(figure, axes.title) for axes in figure.axes if axes.get_title())
    accuracy = figures[0]
    labels = [text.get_text() for legend in accuracy.legends for text in legend.get_texts()]
    titles = [axes.get_title() for axes in accuracy.axes if axes.get_visible()]
    shown = labels if count <= 5 else titles
    assert ["".join(text.split()) for text in shown] == ["".join(name.split()) for name in names]
    (line, *_) = accuracy.axes[0].get_lines()
    assert list(line.get_xdata()) == [2, 3, 5]


def config(objective="independent", **train):
    return {"model": {"method": "hne", "blocks": 4}, "train": {"objective": objective, **train}}


def test_names_have_only_fields_that_differ_and_have_an_effect():
    def names(*configs):
        return distinct_names(configs, ["run"] * len(configs))

    distilled = "independent+codistillation"
    assert names(config(alpha=0.5), config(distilled, alpha=0.7), config(distilled, alpha=0.9)) == [
        "objective=independent",
        f"objective={distilled}, alpha=0.7",
        f"objective={distilled}, alpha=0.9",
    ]
    both = names(config(alpha=0.5, temperature=1.0), config(distilled, alpha=0.7, temperature=2.0))
    assert both == ["objective=independent", f"objective={distilled}"]
    assert names(config(alpha=0.5), config(alpha=0.7)) == ["run", "run"]
    assert names(config(log_steps=1, lr=0.1), config(log_steps=2, lr=0.2)) == ["lr=0.1", "lr=0.2"]
    exits = {"model": {"method": "multi_exit", "blocks": 3}, "train": {"objective": "independent"}}
    assert names(config(), exits) == ["method=hne", "method=multi_exit"]


def test_the_fields_of_names_are_those_of_configurations():
    fields = {f"{part}.{name}" for part, content in to_json(Run()).items() for name in content}
    assert APPLIES.keys() <= fields
    for term in (*TERMS, "one_for_all"):
        used = APPLIES["train.alpha"]({"train.objective": term})
        assert used == (term in (*DISTILLED, "one_for_all")), term


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
