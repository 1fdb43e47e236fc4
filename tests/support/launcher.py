"""Starts training runs without the time of their imports: a parent that has imported everything forks per run.

As a script it is that parent. For every line of JSON, {"output", "settings", "log", "environment"}, it forks a run and
writes the number of its process, and later its return code (negative: the signal that ended it).
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from support.processes import environment, free_port, script

TIMEOUT = 240


class Run:
    """A process that trains."""

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
    """The parent process; a context manager."""

    def __enter__(self):
        self.runs, self.answers = {}, queue.Queue()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.parent = subprocess.Popen(script("launcher"), env=environment(), **pipes)
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

    def start(self, output, settings=None, **variables):
        """Start a run in a folder, with these variables of the environment."""
        output = Path(output)
        output.mkdir(parents=True, exist_ok=True)
        self.log, self.last = str(output / f"output-{time.monotonic_ns()}.txt"), None
        request = {"output": str(output), "settings": settings or {}, "log": self.log, "environment": variables}
        self.parent.stdin.write(json.dumps(request) + "\n")
        while self.last is None:
            assert self.parent.poll() is None, "the parent process has ended"
            self.listen(TIMEOUT)
        return self.last

    def start_several(self, processes, output, settings=None, **variables):
        """Processes that train together over gloo, or one that trains alone."""
        if processes == 1:
            return [self.start(output, settings, **variables)]
        port = str(free_port())
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes), **variables}
        return [
            self.start(output, settings, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(processes)
        ]


def serve():
    """Fork a run per line of stdin."""
    import sklearn.datasets
    import sklearn.model_selection  # noqa: F401

    from support import demo_run  # imports everything else; no import starts a thread, which a fork would lose

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
