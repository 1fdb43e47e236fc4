"""The tutorial does what it says, block after block: on few photographs, and slowly as a reader runs it."""

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hierens.training.data import builtin
from support.command_line import hierens

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/tutorial.md"
BLOCKS = re.findall(r"```(python|bash|text)\n(.*?)```", PAGE.read_text(), re.DOTALL)
CONSOLE = re.findall(r"```console\n(.*?)```", PAGE.read_text(), re.DOTALL)[-1]
CLASS = re.compile(rf"(?<![\w/-])({'|'.join(builtin.CLASSES['clothing'])})(?![\w/-])")
TRAIN, SERVE, ASK = ("hierens train", "python examples/serve.py", "curl")
PORT = "8919"


def forms(text):
    """The lines of an output without numbers, class names and widths of columns; tables as on a terminal."""
    lines = (re.sub(r"\d[\d,.]*", "#", CLASS.sub("CLASS", line.replace("|", " "))) for line in text.splitlines())
    return [" ".join(line.split()) for line in lines if not re.fullmatch(r"[\s:-]*", line)]


def run_page(run_command):
    """Run all blocks; what is shown after a block is the form of the last lines that it printed."""
    names, printed = {}, ""
    for language, block in BLOCKS:
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block, str(PAGE), "exec"), names)
            printed = out.getvalue()
        elif language == "bash":
            printed = run_command(block.strip())
        else:
            shown = forms(block)
            assert forms(printed)[-len(shown) :] == shown, f"the page shows\n{block}\nafter what printed\n{printed}"


@pytest.mark.sampled
def test_each_block_prints_what_is_shown(tmp_path, monkeypatch):
    def run_command(command):
        if command.startswith((SERVE, ASK)):
            return ""
        short = ["--epochs", "1"] if command.startswith(TRAIN) else []
        done = hierens(*shlex.split(command)[1:], *short)
        assert done.code == 0, done.err
        return done.out

    whole = builtin.clothing

    def few(config, training):
        return tuple(part[:: 8 if training else 1] for part in whole(config, training))

    monkeypatch.setattr(builtin, "clothing", few)
    monkeypatch.chdir(tmp_path)
    run_page(run_command)
    assert {"policy.json", "config.json"} <= {file.name for file in Path("my-model").iterdir()}
    assert json.loads(Path("my-model/config.json").read_text())["label_names"] == list(builtin.CLASSES["clothing"])


class Reader:
    """Types the commands of the page in processes of their own, and presses Ctrl-C once during training."""

    def __init__(self):
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self.servers = []

    def start(self, command, **streams):
        program, *words = shlex.split(command)
        start = {"hierens": [sys.executable, "-m", "hierens"], "python": [sys.executable]}.get(program, [program])
        return subprocess.Popen([*start, *words], env=self.environment, text=True, **streams)

    def start_until(self, command, text):
        """A process that has printed a text, and the file in which it prints."""
        file = Path(f"output-{time.monotonic_ns()}.txt")
        with file.open("w") as stream:
            process = self.start(command, stdout=stream, stderr=subprocess.STDOUT)
        while text not in file.read_text():
            assert process.poll() is None, file.read_text()
            time.sleep(0.2)
        return process, file

    def __call__(self, command):
        if command.startswith(SERVE):
            self.servers.append(self.start_until(f"{command} --port {PORT}", "is served on")[0])
            return ""
        if command.startswith(TRAIN):
            process, file = self.start_until(command, "epoch 5:")
            process.send_signal(signal.SIGINT)
            assert process.wait() == 128 + signal.SIGINT
            stopped, resumed = forms(CONSOLE)[1], forms(CONSOLE)[3]
            assert forms(file.read_text())[-1] == stopped
        silent = subprocess.DEVNULL if command.startswith(ASK) else None
        process = self.start(command.replace(":8000", f":{PORT}"), stdout=subprocess.PIPE, stderr=silent)
        printed, _ = process.communicate()
        assert process.returncode == 0, command
        if command.startswith(TRAIN):
            assert forms(printed)[0] == resumed
        if command.startswith(ASK):
            (answer,) = json.loads(printed)["answers"]
            assert {found["name"] for found in answer["classes"]} <= set(builtin.CLASSES["clothing"])
        return printed


@pytest.mark.slow
def test_from_nothing_to_a_calibrated_exported_and_served_model(tmp_path, monkeypatch):
    pytest.importorskip("uvicorn")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    reader = Reader()
    try:
        run_page(reader)
        assert len(reader.servers) == 1 and all(server.poll() is None for server in reader.servers)
    finally:
        for server in reader.servers:
            server.terminate()
            server.wait()
    assert json.loads(Path("runs/mine/results.json").read_text())["accuracy"][-1] > 50
    assert Path("my-model/policy.json").is_file() and Path("exported/depth_3.pt2").is_file()
