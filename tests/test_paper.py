"""The benchmark of the paper's comparisons: what it says of differences, and a small run of it from end to end."""

import dataclasses

import paper
import pytest
from accelerate.state import AcceleratorState

from hierens.reporting import Group
from hierens.training.presets import dump_run, preset


def group(name, *seeds):
    """Runs with the accuracies given, a tuple per seed; other fields are theirs over 100."""
    names = ("nll", "ece", "std", "agreement", "ema_accuracy")
    records = [{"accuracy": list(s), **{n: [v / 100 for v in s] for n in names}} for s in seeds]
    return Group(name, [1e6, 2e6], [{**record, "leaf_accuracy": [90.0, 90.0]} for record in records])


def said(more, less, at="every"):
    """The last column of the verdict on a claim that the first group has more than the second."""
    claim = paper.Claim("a beats b", "study", "a", "b", at)
    row = paper.verdicts({"study": {"a": more, "b": less}}, [claim]).splitlines()[2]
    return row.split("|")[-2].strip()


def test_differences_are_paired_by_seed():
    found = paper.difference(group("a", (92, 93), (94, 94)), group("b", (91, 93), (92, 93), (0, 0)), "accuracy")
    assert [gap for gap, _, _ in found] == [1.5, 0.5] and {seeds for _, _, seeds in found} == {2}
    assert [round(spread, 3) for _, spread, _ in found] == [0.707, 0.707]


@pytest.mark.parametrize(
    ("more", "less", "expected"),
    [
        (((92, 93), (92.1, 93.1)), ((91, 92), (91.1, 92.1)), "yes"),
        (((91, 92), (91.1, 92.1)), ((92, 93), (92.1, 93.1)), "no, the reverse"),
        (((92, 93), (90, 93)), ((91, 92), (90.9, 93.9)), "yes, within the noise"),
        (((92, 91), (92, 91)), ((91, 92), (91, 92)), "not throughout"),
        (((92, 93),), ((91, 92),), "yes (one seed)"),
    ],
)
def test_verdicts_tell_effects_from_noise(more, less, expected):
    assert said(group("a", *more), group("b", *less)) == expected


def test_a_claim_is_looked_at_where_it_is_made():
    a, b = group("a", (92, 91), (92.1, 91.1)), group("b", (91, 92), (91.1, 92.1))
    assert said(a, b, "first") == "yes" and said(a, b, "full") == "no, the reverse"


def test_every_claim_names_rows_that_exist():
    for claim in paper.CLAIMS:
        assert {claim.more, claim.less} <= set(paper.STUDIES[claim.study]), claim.text


def test_a_small_run_from_any_configuration(tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper, "RESULTS", tmp_path)
    demo = preset("demo")
    model = dataclasses.replace(demo.model, backbone_args={"channels": [4, 4, 4]})
    train = dataclasses.replace(demo.train, epochs=1, batch_size=256, warmup_epochs=0, ema_decay=0.9)
    (tmp_path / "demo.yaml").write_text(dump_run(dataclasses.replace(demo, model=model, train=train)))
    settings = paper.Settings(config="demo.yaml", name="digits", only=("table1", "figure5"), seeds=(0,))
    paper.main(settings)
    page = (tmp_path / "paper_digits.md").read_text()
    assert page.count("not run") >= 3 and "one seed" in page and "multi-branch" in page
    assert all((tmp_path / f"paper_digits_{part}.png").is_file() for part in ("table1", "figure4", "figure5", "leaves"))
    runs = list(tmp_path.glob("runs/paper/digits/*/0/results.json"))
    assert len(runs) == 6, "figure 4 and 5 share their L_I + L_HD with Table 1"
    before = [run.stat().st_mtime_ns for run in runs]
    paper.main(settings)
    assert [run.stat().st_mtime_ns for run in runs] == before, "what is finished is not repeated"
