"""benchmarks/members.py: trees with light members against full trees, from records."""

import json
import shutil

import members
import pytest
from comparison import records
from comparison.recipes import ROWS, configured

FULL, SINGLE = members.FULL, members.SINGLE


def test_every_light_tree_differs_from_the_full_one_in_its_members_and_a_named_objective_alone():
    full = configured("cifar100", FULL, 0, "", "")
    for row in members.LIGHT:
        run = configured("cifar100", row, 0, "", "")
        assert run.model.members
        assert (run.train.objective == full.train.objective) == ("L_I" not in ROWS[row].title)
        assert set(ROWS[row].changes) <= {"objective", "members", "rank", "symmetry_signs"}


def test_the_page_says_how_much_of_the_gain_is_kept(tmp_path, monkeypatch):
    for row in (FULL, SINGLE):
        shutil.copytree(records.RECORDS / "cifar100" / row, tmp_path / "cifar100" / row)
    monkeypatch.setattr(records, "RECORDS", tmp_path)
    with pytest.raises(ValueError, match="a tree with light members: train them first"):
        members.page(tmp_path)
    groups = records.read_records("cifar100")
    one, best = (groups[row].mean("accuracy")[-1] for row in (SINGLE, FULL))
    record = json.loads((tmp_path / "cifar100" / FULL / "0.json").read_text())
    record["title"], record["accuracy"][-1] = "tree, rank1", (one + best) / 2
    (tmp_path / "cifar100" / "light-rank1").mkdir()
    (tmp_path / "cifar100" / "light-rank1" / "0.json").write_text(json.dumps(record))
    page = members.page(tmp_path)
    (line,) = [line for line in page.splitlines() if line.startswith("| tree, rank1 ") and "50 %" in line]
    assert f"{(one + best) / 2:.2f}" in line and (tmp_path / "members.png").is_file()
    assert "Not run yet: light-early, " in page and "light-rank1-signs" in page
    assert "keeps the most" not in page and "No light tree keeps 75%." in page  # it has the size of a full one
    record["parameters"][-1], record["accuracy"][-1] = 200_000, best
    (tmp_path / "cifar100" / "light-rank1" / "0.json").write_text(json.dumps(record))
    page = members.page(tmp_path)
    assert "*tree, rank1* keeps the most, 100%." in page
    assert "*tree, rank1* is the smallest light tree that keeps 75%, with 1.1 times" in page
