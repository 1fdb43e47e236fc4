"""Files of strangers, by the thousand: what becomes of them, memory and time; writes docs/results/hostile.md.

python benchmarks/hostile.py            # about twenty minutes on one core
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
import tyro

import hierens

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.hostile_files import FULL, storm

RESULTS = ROOT / "docs" / "results"


@dataclass(frozen=True)
class Settings:
    """What the benchmark takes."""

    share: float = 1.0
    """of the full number of attacks"""
    seed: int = 1
    """of the attacks"""
    part: str = ""
    """one kind of attack, whose outcomes are printed; by default all, each in a process of its own"""


def main(settings: Settings) -> None:
    if settings.part:
        _run(settings)
        return
    found = {}
    for part in FULL:
        command = [sys.executable, __file__, "--part", part, "--share", str(settings.share)]
        done = subprocess.run([*command, "--seed", str(settings.seed)], stdout=subprocess.PIPE, text=True, check=True)
        found[part] = json.loads(done.stdout.splitlines()[-1])
        print(part, found[part], flush=True)
    (RESULTS / "hostile.md").write_text(page(found, settings))


def _run(settings: Settings) -> None:
    def log(*what: object) -> None:
        print(*what, file=sys.stderr, flush=True)

    count = max(1, int(FULL[settings.part] * settings.share))
    with tempfile.TemporaryDirectory() as folder:
        outcomes = storm(settings.part, count, Path(folder), settings.seed, log)
    loaded = Counter(outcome.said == "loaded" for outcome in outcomes)[True]
    worst = {name: max(asdict(outcome)[name] for outcome in outcomes) for name in ("mib", "seconds", "wall")}
    print(json.dumps({"tried": count, "loaded": loaded, **worst}))


def page(found: dict[str, dict[str, float]], settings: Settings) -> str:
    rows = [
        f"| {part} | {of['tried']:,} | {of['loaded']:,} | {of['tried'] - of['loaded']:,} | {of['mib']:.0f} "
        f"| {of['seconds']:.1f} | {of['wall']:.1f} |"
        for part, of in found.items()
    ]
    table = "\n".join(rows)
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    return f"""# Files of strangers

Whatever lies in a folder, a policy, a tuning file or a checkpoint, loading it ends in what was asked for or in one line
that names the file, the field and the value. These are files with values replaced, removed and added, cut short,
swapped, compressed, of other types, nested too deeply, or of another program, drawn by a seed.

| kind | tried | loaded | refused in one line | most memory (MiB) | longest (s of CPU) | longest (s) |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{table}

An attack counts as passed if it loads, or raises a `ValueError` of a single line of at most 1,200 characters, prints no
more than 20 lines, and never runs out of memory: each may take 1 GiB of address space beyond what the process has. None
did otherwise. "Most memory" is by how much the process grew at its largest during one attack.

- Configs: values that JSON can say, in the config of a tree, a multi-exit network, a tree with exits and a transformer;
  then the model counts its multiply-accumulates.
- Folders: files missing, cut, flipped, swapped with another model's, of other types, symbolic links and pipes in their
  place.
- Policies: loaded, then asked to answer two images; a depth that the model does not have is refused there.
- Tuning files: read by `tune`; then the model answers, as it did before.
- Checkpoints: a run goes on from them for one epoch. 85 % are sealed again after the damage, as whoever forges one
  would do; the others are seen by their manifest, put aside, and the run starts anew, which counts as loaded. Files
  that would run code if they were unpickled are among them; none did.

## How to repeat it

```bash
python benchmarks/hostile.py --seed {settings.seed}
```

A sample runs with the tests (`tests/test_hostile_files.py`).

hierens {hierens.__version__}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()},
{platform.machine()}, {threads} of {os.cpu_count()} cores that did other work as well.
"""


if __name__ == "__main__":
    main(tyro.cli(Settings))
