"""The program as a whole: there at once, help on a screen, faults in one line, exit codes."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from hierens import cli
from hierens.cli.output import print_table
from support.command_line import hierens

ROOT = Path(__file__).parents[2]
PROGRAM = "import sys; from _hierens_cli import main; main()"
HEAVY = "{name for name in ('torch', 'timm', 'numpy', 'accelerate') if name in sys.modules}"


def program(code, *arguments, timeout=120):
    """A new process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def test_help_version_and_completion_come_without_torch():
    code = f"""
import sys
from _hierens_cli import main
sys.argv[:1] = ["hierens"]
for arguments in [["--help"], ["--version"], ["completion", "bash"], *([n, "--help"] for n in {list(cli.COMMANDS)})]:
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, stop
    assert not {HEAVY}, (arguments, {HEAVY})
sys.argv[1:] = ["train", "--preset", "demo", "--print-config"]
main()
assert not {HEAVY}, {HEAVY}
"""
    done = program(["-c", code])
    assert done.returncode == 0, done.stderr
    assert all(f"usage: hierens {name}" in done.stdout for name in cli.COMMANDS)


@pytest.mark.sampled
def test_the_public_names_are_there_in_the_program_too():
    code = """
import sys, _hierens_cli, hierens
assert 'torch' not in sys.modules and set(hierens.__all__) <= set(dir(hierens))
assert all(getattr(hierens, name) is not None for name in hierens.__all__)
assert hierens.hierensify.__module__ == 'hierens.models.conversion' and not hasattr(hierens, 'nothing')
import timm
assert timm.is_model('hne')
"""
    done = program(["-c", code])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["hierens", "hierens.cli"])
def test_it_is_a_module(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hierens", "tain"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module(module, run_name="__main__")
    assert "did you mean 'train'" in capsys.readouterr().err


@pytest.mark.parametrize("name", [None, *cli.COMMANDS])
def test_help_fits_a_screen(name):
    done = hierens(*([name] if name else []), "--help")
    lines = done.out.splitlines()
    assert done.code == 0 and len(lines) <= 40 and max(map(len, lines)) <= 100, (len(lines), max(lines, key=len))
    assert done.out.startswith(f"usage: hierens {name or 'COMMAND'}")


def test_help_shows_the_recipes_values_and_all_of_it_if_asked():
    short = hierens("train", "--preset", "finetune", "--help").out
    assert "efficientnet_b0" in short and "--symmetry-noise" not in short and "more flags" in short
    whole = hierens("train", "--help-all").out
    assert "--symmetry-noise" in whole and "--print-config" in whole


def test_the_version():
    assert hierens("--version").out.startswith("hierens 0.")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tain"], 2, "there is no command 'tain', did you mean 'train'"),
        (["train", "--epoch", "3"], 2, "has no flag --epoch, did you mean '--epochs'"),
        (["train", "--preset"], 2, "--preset"),
        (["train", "--preset", "paper-cifra"], 2, "did you mean 'paper-cifar'"),
        (["train", "--preset", "demo", "--config", "x"], 2, "not both"),
        (["train", "--config", "none.yaml"], 2, "none.yaml cannot be read"),
        (["train", "--preset", "demo", "--objective", "nonsense"], 1, "unknown objective 'nonsense'"),
        (["eval"], 2, "give the model first"),
        (["eval", "nowhere", "--dataset", "digits"], 1, "nowhere"),
        (["report", "nowhere"], 1, "nowhere is not a finished run"),
        (["profile", "resnet81"], 1, "neither a folder nor a timm model, did you mean 'resnet"),
        (["profile", "resnet10t", "--blocks", "99"], 1, "--blocks 99 is more than"),
        (
            ["profile", "resnet10t", "--method", "multi_exit", "--blocks", "4"],
            2,
            "one network with exits: use --exits",
        ),
        (["profile", "resnet10t", "--exits=4"], 2, "--exits has no meaning for --method hne, which creates a tree of"),
        (["profile", "resnet10t", "--method", "hne_exits", "--exits", "4"], 2, "but the last: use --blocks"),
        (["profile", "user/name", "--blocks", "4"], 2, "user/name is already an ensemble: leave out --blocks"),
        (["profile", "hne_resnet50_cifar_small", "--blocks", "5"], 2, "already an ensemble: leave out --blocks"),
        (["train", "--preset", "demo", "--exits", "4"], 2, "which creates a tree of networks: use --blocks"),
        (["train", "--preset", "demo-exits", "--blocks", "4"], 2, "which creates one network with exits: use --exits"),
        (
            ["train", "--start", "user/name", "--backbone", "resnet18", "--drop-path", "0.1"],
            2,
            "--backbone and --drop-path",
        ),
        (["train", "--backbone", "hne_resnet50_cifar", "--blocks", "5"], 2, "already an ensemble: leave out --blocks"),
        (
            ["train", "--branching", "1", "2", "2", "--blocks", "3"],
            2,
            "--branching 1 2 2 sets the number of blocks",
        ),
        (["zoo", "--blocks", "3"], 2, "give a name or a pattern"),
        (["predict", "nowhere", "a.png"], 1, "nowhere"),
        (["predict", "nowhere", "."], 1, "there is no image in . or below"),
        (["predict", "m", "a.png", "--depth", "1", "--policy", "p"], 2, "not both"),
        (["export", "nowhere", "out", "--depths", "some"], 2, "`all` or numbers"),
        (["push", "nowhere", "name"], 2, "user/name"),
        (["zoo", "resnot18"], 1, "did you mean 'resnet18'"),
    ],
)
def test_faults_end_in_one_line_and_their_exit_code(arguments, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = hierens(*arguments)
    assert done.code == code and message in done.err and not done.out, done.err
    assert done.err.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("value", "message"), [("many", "--epochs"), ("0", "epochs must be at least 1")])
def test_values_that_a_flag_does_not_take_are_wrong_usage(value, message):
    done = hierens("train", "--epochs", value)
    assert done.code == 2 and message in done.err and not done.out


def test_a_closed_pipe_prints_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", PROGRAM, "--help"], stdout=write, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(write)
    assert done.returncode == 1 and not done.stderr


def test_tables_on_a_terminal_have_text_to_the_left_and_numbers_to_the_right(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    print_table(("image", "class", "%"), [("a/000.png", "shoes", "89.03"), ("hat.png", "hat", "2.50")])
    assert capsys.readouterr().out.splitlines()[2].split("hat") == ["", ".png    ", "     2.50"]
