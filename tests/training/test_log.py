"""The log holds whole lines, in order, after a kill and after a full disk."""

import json
import resource

import pytest

from hierens.training.log import JsonLines


@pytest.mark.parametrize("room", [0, 5])
def test_lines_that_do_not_fit_wait(tmp_path, capsys, room):
    lines = JsonLines(tmp_path / "log.jsonl")
    lines.append({"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (lines.path.stat().st_size + room, before[1]))
        lines.append({"step": 2})
        lines.append({"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert lines.path.read_text() == '{"step": 1}\n'
    shown = capsys.readouterr().out
    assert shown.count("log.jsonl cannot be written (") == 1 and "MB free in" in shown
    lines.append({"step": 4})
    assert [json.loads(line)["step"] for line in lines.path.read_text().splitlines()] == [1, 2, 3, 4]


def test_what_a_kill_cut_short_is_dropped(tmp_path):
    lines = JsonLines(tmp_path / "logs" / "log.jsonl")
    lines.restart(lambda record: True)
    for step in (1, 2, 3):
        lines.append({"step": step, "nested": {}})
    whole = lines.path.read_text()
    for size in range(len(whole)):
        lines.path.write_text(whole[:size])
        lines.restart(lambda record: record["step"] < 3)
        assert lines.path.read_text() == "".join(f"{line}\n" for line in whole.splitlines()[:2] if line in whole[:size])


def test_lines_that_are_no_records_are_put_aside_and_said(tmp_path, capsys):
    lines = JsonLines(tmp_path / "log.jsonl")
    lines.append({"epoch": 1, "step": 1, "loss": 0.5})
    foreign = ["null", "{}", "[" * 100_000, '{"step": "x"}', '{"val_loss": 1, "step": 1}', "\x00"]
    with lines.path.open("a") as file:
        file.writelines(f"{line}\n" for line in foreign)
    lines.append({"epoch": 1, "step": 2, "loss": float("nan")})
    lines.restart(lambda record: record["step"] <= 2)
    assert [json.loads(line)["step"] for line in lines.path.read_text().splitlines()] == [1, 2]
    assert (tmp_path / "log.jsonl.foreign").read_text().split("\n") == [*foreign, ""]
    assert (
        "log.jsonl had 6 lines that are not records of a run, such as 'null': they were moved"
        in capsys.readouterr().out
    )
