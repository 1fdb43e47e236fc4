"""The results pages: differences between rows, and pages written from records alone."""

import json
import math

import drift_page
import drift_stream
import exits
import exits_tried
import paper
import pytest
import retrieval
import torch
from comparison import budgets, recipes, records
from comparison.differences import Claim, Difference, Point, difference, front, gains, verdict, verdicts

import hierens
from hierens.evaluation.reporting import Group
from hierens.inference.policies import FixedDepth
from support.networks import tiny_backbone, tiny_tree

FIELDS = ("nll", "ece", "std", "agreement")


def record(accuracy, seed=0, **more):
    return {
        "seed": seed,
        "accuracy": list(accuracy),
        "leaves": [2**depth for depth in range(len(accuracy))],
        "leaf_accuracy": [accuracy[0]] * 2 ** (len(accuracy) - 1),
        "parameters": [1000 * (depth + 1) for depth in range(len(accuracy))],
        "test_images": 100,
        "thresholds": {"macs": [1.2e6, 1.6e6], "accuracy": [accuracy[0], accuracy[-1]]} if len(accuracy) > 1 else {},
        "machine": {"processor": "some", "torch": "2"},
        "config": {"train": {"epochs": 3}},
        **{name: [value / 100 for value in accuracy] for name in FIELDS},
        **more,
    }


def group(name, *of_seeds):
    """Runs with the accuracies given, a tuple per seed."""
    records_ = [record(accuracy, seed) for seed, accuracy in enumerate(of_seeds)]
    return Group(name, [1e6 * (depth + 1) for depth in range(len(of_seeds[0]))], records_)


def test_differences_are_paired_by_seed():
    a, b = group("a", (92, 93), (94, 94)), group("b", (91, 93), (92, 93), (0, 0))
    found = difference(a, b)
    assert [one.mean for one in found] == [1.5, 0.5] and {one.seeds for one in found} == {2}
    assert [one.error for one in found] == pytest.approx([0.5, 0.5])
    later = Group("c", a.macs, [record((50, 50), 7)])
    assert difference(a, later) == []


@pytest.mark.parametrize(
    ("more", "less", "expected"),
    [
        (((92, 93), (92.1, 93.1)), ((91, 92), (91.1, 92.1)), "yes"),
        (((91, 92), (91.1, 92.1)), ((92, 93), (92.1, 93.1)), "no, the reverse"),
        (((92, 93), (90, 93)), ((91, 92), (89.9, 92.9)), "within the noise"),
        (((92, 91), (92, 91)), ((91, 92), (91, 92)), "not at every depth"),
        (((92, 93), (92.1, 95)), ((91, 92), (91.1, 92)), "not at every depth"),
        (((92, 91), (90, 92)), ((91, 92), (91, 91)), "within the noise"),
        (((92, 93),), ((91, 92),), "one seed"),
    ],
)
def test_verdicts_separate_effects_from_noise(more, less, expected):
    assert verdict(difference(group("a", *more), group("b", *less))) == expected


def test_a_claim_is_judged_at_its_depths():
    groups = {"a": group("a", (92, 91), (92.1, 91.1)), "b": group("b", (91, 92), (91.1, 92.1))}
    said = verdicts(groups, [Claim("x", "a", "b", "first"), Claim("y", "a", "b", "last"), Claim("z", "a", "missing")])
    assert [row.split("|")[-2].strip() for row in said.splitlines()[2:]] == ["yes", "no, the reverse", "not run"]


def test_differences_are_written_with_their_error():
    assert str(Difference(0.5, 0.1, 3)) == "+0.50 ± 0.10" and str(Difference(-0.5, 0.0, 1)) == "-0.50"
    assert not Difference(5.0, 0.0, 1).clear


def test_losers_are_listed():
    groups = {"base": group("base", (92, 93)), "worse": group("worse", (91, 92))}
    assert "-1.00" in gains(groups, "base", ["worse", "not trained"])


def test_the_front_is_what_nothing_cheaper_reaches():
    kept = front([Point("a", "0", 1, 50), Point("b", "0", 2, 49), Point("c", "1", 2, 51), Point("d", "", 3, 51)])
    assert [point.row for point in kept] == ["a", "c"]


@pytest.mark.parametrize("claim", [*paper.CLAIMS, *exits.CLAIMS], ids=lambda claim: claim.text)
def test_every_claim_names_rows_that_exist(claim):
    assert {claim.more, claim.less} <= {*recipes.ROWS, records.DEEP_ENSEMBLE}


def test_every_row_that_a_page_shows_exists():
    shown = {*paper.TABLE1, *paper.FIGURE4, *paper.FIGURE5, *paper.CANDIDATES, *paper.RIVALS, *exits.IMTA, *exits.AEP}
    assert shown <= {*recipes.ROWS, records.DEEP_ENSEMBLE}


@pytest.mark.parametrize(
    "rows",
    [("tree-distilled",), ("tree-distilled", "multi-branch"), (*recipes.ROWS, records.DEEP_ENSEMBLE)],
    ids=["first run", "two rows", "all"],
)
def test_pages_are_made_of_records_alone(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RECORDS", tmp_path)
    for row in rows:
        for seed in (0, 1):
            depths = 1 if row.startswith("single") else 7 if row == "tree-with-exits" else 4
            made = record([50.0 + depth + 0.1 * seed for depth in range(depths)], seed)
            title = recipes.ROWS[row].title if row in recipes.ROWS else "deep ensemble"
            made |= {"title": title, "macs": [2e6 * (depth + 1) for depth in range(depths)]}
            file = records.record_file("cifar100", row, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            records.write_json(file, made)
    page = paper.page("cifar100", tmp_path)
    assert "tree, L_I + L_HD" in page and "100 test images" in page
    assert (tmp_path / "cifar100_table1.png").is_file()
    assert (tmp_path / "cifar100_costs.png").is_file() == (len(rows) > 1)
    if len(rows) > 2:
        assert "not run" not in page.lower()
        page = exits.page("cifar100", tmp_path)
        assert "exits, equilibrium" in page and "## Budgeted batch classification" in page
        assert (tmp_path / "cifar100_exits_budgets.png").is_file()
    else:
        with pytest.raises(ValueError, match="train them first"):
            exits.page("cifar100", tmp_path)
        missing = "Not run yet, and therefore not in this comparison: tree, L_H + L_HD, tree, L_H, tree with" in page
        assert missing == (len(rows) > 1) and ("Only trees were trained" in page) == (len(rows) == 1)


def test_thresholds_are_compared_with_fixed_depths_of_the_same_cost():
    made = [
        record([40.0, 50.0], seed, macs=[1e6, 5e6], thresholds={"macs": [3e6], "accuracy": [48.0 + seed]})
        for seed in (0, 2)
    ]
    exits_ = Group("exits", [1e6, 5e6], made)
    cells = budgets.at_equal_cost({"exits": exits_}).splitlines()[-1].split("|")[2:-1]
    assert [cell.strip() for cell in cells[:3]] == ["44.50 (+2.00 ± 0.50)", "49.50 (+2.00 ± 0.50)", ""]
    assert [(p.cost, p.accuracy) for p in budgets.curve(exits_)] == [(1, 40), (3, 49), (5, 50)]


def test_saved_time_is_measured_on_images_that_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(budgets, "RECORDS", tmp_path)
    model = hierens.multi_exit(tiny_backbone(), 3)
    monkeypatch.setattr(budgets, "create_ensemble", lambda run, classes: model)
    monkeypatch.setattr(budgets, "RECIPES", {"cifar100": recipes.Run(recipes.DataConfig(input_size=(1, 16, 16)))})
    monkeypatch.setattr(budgets, "configured", lambda *_: None)
    monkeypatch.setattr(budgets, "IMAGES", 32)
    monkeypatch.setattr(budgets, "MEASURED", ("exits",))
    assert budgets.saved("cifar100") == "Not measured yet."
    row = json.loads(budgets.measure("cifar100").read_text())["rows"]["exits"]
    first, *_, last = model.macs((1, 16, 16))
    assert row["macs"] == pytest.approx([(1 - share) * (1 - first / last) for share in budgets.SHARES], abs=0.1)
    assert row["other_depth"] == 0 and row["time"].keys() == {"1", "256"}
    assert "Of 192 predictions, 0 left" in budgets.saved("cifar100")


def test_the_page_on_retrieval_is_made_of_records_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "RECORDS", tmp_path)
    for row, about in retrieval.ROWS.items():
        for seed in (0, 1):
            depths = range(about.blocks)
            recall = {field: [40.0 + depth + seed for depth in depths] for field in retrieval.FIELDS}
            counts = {"training_images": 50, "index_images": 30, "query_images": 20}
            made = {"seed": seed, **recall, **counts, "macs": [1e6 + depth for depth in depths]}
            made |= {"machine": {"cores": 1}, "config": {"epochs": 1, "batch_size": 8, "weight": 4}}
            records.write_json(retrieval._file(row, seed), made)
    page = retrieval.page(retrieval.read_records(), tmp_path)
    assert (tmp_path / "retrieval.png").is_file() and "20 queries per seed" in page
    assert "+2.00 ± 0.00" in page, "depth 2 of a tree minus the single network"


def test_the_page_on_what_was_tried_is_made_of_records_alone():
    plain, other = (
        Group(name, [1.0] * 4, [record((start, 2, 3, 4), "16-channels/0", budgeted=[start] * 7)])
        for name, start in (("exits", 1), ("boosted", 1.5))
    )
    text = exits_tried.page({"exits": plain, "boosted": other})
    assert "16 channels, 6 epochs" in text and "24 channels" not in text
    assert text.count("+0.50") == 1 + 7 and "exits_tried.py --data-dir DIR" in text


def test_the_page_on_drift_is_made_of_its_record_alone(tmp_path):
    part = {"images": 100, "agreement": 0.9871, "p50": 20.0, "p99": 140.4, "late": 0.002, "macs": 0.4}
    phases = [{**part, "delay": delay} for delay in (0.0, 3.5, None, 0.0, 0.0)]
    run = {"rate": 300.0, "lost": 0, "twice": 0, "phases": phases, "lines": [part] * 10}
    runs = {f"{load}/{name}": {**run, "shadow": 0.05} for load in (0.7, 1.4) for name in drift_page.NAMES}
    about = {"cores": 1, "processor": "some", "torch": "2"}
    record = {
        "runs": runs,
        "capacity": 400.0,
        "machine": about,
        "target_ms": 150,
        "agreement": 0.98,
        "seconds": 4,
        "batch": 16,
    }
    text = drift_page.page({**record, "loads": [0.7, 1.4]}, tmp_path)
    assert (tmp_path / "drift.png").is_file() and text.count("98.71") == 30 and "5.0% of the time" in text
    assert text.count(" never ") == 6 and "3.5 s" in text


def test_requests_of_the_drift_benchmark_arrive_in_bursts_and_are_answered_once():
    due = drift_stream.arrivals(1000, 10)
    counts = [((due >= at) & (due < at + 1)).sum() for at in range(10)]
    assert all(850 < count < 1150 for at, count in enumerate(counts) if at % 5 < 4)
    assert counts[4] > 1750 and counts[9] > 1750 and (drift_stream.arrivals(1000, 10) == due).all()
    model, images = tiny_tree(), torch.rand(40, 1, 16, 16)
    found = drift_stream.serve(model, FixedDepth(1), 8, due[:40], images)
    assert found.answers.tolist() == [1] * 40 and (found.latency_ms > 0).all()
    assert found.predicted.tolist() == model(images, depth=1).argmax(1).tolist()


def test_images_that_would_leave_at_an_exit_weigh_most_in_its_loss():
    logits = torch.zeros(4, 2, 2)
    logits[:2, 0, 0] = 4.0  # two images leave at the first exit
    loss = exits_tried.sample_weighted(0.5, logits, torch.empty(0), torch.zeros(4, dtype=torch.long))
    expected = [1.5 * 2 * math.log1p(math.exp(-4)), 0.5 * 2 * math.log(2), (1.5 + 0.5) * 2 * math.log(2)]
    assert loss.item() == pytest.approx(sum(expected) / 4, rel=1e-5)
