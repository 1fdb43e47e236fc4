"""Completion scripts: valid, and they complete."""

import shutil
import subprocess

import pytest

from hierens import cli
from support.command_line import hierens

COMPLETE = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
[[ "{words}" == *" " ]] && COMP_WORDS+=("") && COMP_CWORD=$(( COMP_CWORD + 1 ))
_shtab_hierens 2>/dev/null
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    done = hierens("completion", "bash")
    assert done.code == 0, done.err
    file = tmp_path_factory.mktemp("completion") / "hierens"
    file.write_text(done.out)
    return file


def complete(script, words):
    done = subprocess.run(["bash", "-c", COMPLETE.format(script=script, words=words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {word.strip() for word in done.stdout.split()}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("hierens tr", {"train"}),
        ("hierens ", set(cli.COMMANDS)),
        ("hierens train --pres", {"--preset"}),
        ("hierens train --preset paper", {"paper-cifar", "paper-imagenet"}),
        ("hierens train --method ", {"hne", "hne_exits", "multi_exit"}),
        ("hierens profile --bl", {"--blocks"}),
    ],
)
def test_bash_completes(script, words, expected):
    subprocess.run(["bash", "-n", script], check=True)
    assert complete(script, words) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_every_shell_gets_all_commands(shell):
    done = hierens("completion", shell)
    assert done.code == 0 and all(name in done.out for name in cli.COMMANDS)
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.out, text=True, check=True)
