"""A clock that only the test moves, in place of `time.perf_counter`."""

import time


class Clock:
    """Seconds that pass when `wait` is called."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def wait(self, seconds):
        self.now += seconds
