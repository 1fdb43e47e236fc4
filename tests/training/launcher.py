"""Starts the demo again and again without its imports: a warm parent forks a process per run.

As a script it is that parent. It reads a JSON line per run, {"output", "settings", "log", "environment"}, and answers
with the process's number; then, unasked, with its return code (negative: the signal that ended it).
"""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

TIMEOUT = 240
CLOCKED = ("images_per_s", "data_wait")


class Run:
    """A process that trains: what the tests do to it."""

    def __init__(self, launcher, pid, log):
        self.launcher, self.pid, self.log, self.returncode = launcher, pid, Path(log), None

    @property
    def output(self):
        return self.log.read_text()

    def wait(self, timeout=TIMEOUT):
        """The return code, or None if it is still running after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.returncode is None and (left := deadline - time.monotonic()) > 0:
            self.launcher.listen(left)
        return self.returncode

    def finish(self):
        assert self.wait() == 0, self.output
        return self.output

    def kill(self, number):
        os.kill(self.pid, number)


class Launcher:
    """The warm parent; a context manager."""

    def __enter__(self):
        command = [sys.executable, __file__]
        self.runs, self.answers = {}, queue.Queue()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.parent = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.parent.stdin.close()
        self.parent.wait(TIMEOUT)

    def _read(self):
        for line in self.parent.stdout:
            self.answers.put(json.loads(line))

    def listen(self, timeout):
        try:
            pid, code = self.answers.get(timeout=timeout)
        except queue.Empty:
            return
        if code is None:
            self.runs[pid] = self.last = Run(self, pid, self.log)
        else:
            self.runs[pid].returncode = code

    def start(self, output, settings=None, **environment):
        output = Path(output)
        output.mkdir(parents=True, exist_ok=True)
        self.log, self.last = str(output / f"output-{time.monotonic_ns()}.txt"), None
        request = {"output": str(output), "settings": settings or {}, "log": self.log, "environment": environment}
        self.parent.stdin.write(json.dumps(request) + "\n")
        while self.last is None:
            self.listen(TIMEOUT)
        return self.last

    def start_several(self, processes, output, settings=None, **environment):
        """Processes that train together over gloo, or one that trains alone."""
        if processes == 1:
            return [self.start(output, settings, **environment)]
        port = str(free_port())
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes), **environment}
        return [
            self.start(output, settings, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(processes)
        ]


def weights(directory):
    return (Path(directory) / "model" / "model.safetensors").read_bytes()


def log(directory):
    """The records of the log, but for what a clock says."""
    records = [json.loads(line) for line in (Path(directory) / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in CLOCKED} for record in records]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve():
    """Fork for every line, say what became of it."""
    import demo_run  # and with it everything else; no import starts a thread, which a fork would lose
    import sklearn.datasets
    import sklearn.model_selection  # noqa: F401

    def answer(*what):
        os.write(1, (json.dumps(what) + "\n").encode())

    def reap(number, frame):
        while children:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            children.discard(pid)
            answer(pid, os.waitstatus_to_exitcode(status))

    children = set()
    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        request = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            os.setpgid(0, 0)
            file = os.open(request["log"], os.O_WRONLY | os.O_CREAT)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout.reconfigure(line_buffering=True)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.environ.update(request["environment"])
            demo_run.main(request["output"], request["settings"])
            sys.exit(0)
        children.add(pid)
        answer(pid, None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    for pid in children:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
