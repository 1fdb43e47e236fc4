"""Scripts of this package as processes of their own."""

import os
import socket
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def several(processes):
    """The command that starts what follows it in several processes, if they are more than one."""
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    return [sys.executable, *(launch if processes > 1 else [])]


def script(name, *arguments, processes=1):
    """The command that runs a module of this package."""
    return [*several(processes), "-m", f"support.{name}", *map(str, arguments)]


def environment(**more):
    """The variables of a process that finds this package and uses one thread."""
    path = os.pathsep.join(part for part in (str(TESTS), os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
