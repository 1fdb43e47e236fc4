"""Loads thousands of malicious files and records outcome, memory and time; writes docs/results/hostile.md.

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
    """Settings of the benchmark."""

    share: float = 1.0
    """fraction of the full number of attacks to run"""
    seed: int = 1
    """seed of the attacks"""
    part: str = ""
    """one kind of attack, whose outcomes are printed; by default all kinds, each in a separate process"""


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
    return f"""# Untrusted files

Loading a saved model, a policy, a tuning file or a checkpoint either succeeds or raises an error of one line that names
the file, the field and the value. This page tests it on malicious files, drawn by a seed: values are replaced, removed,
added or nested too deeply, and files are truncated, swapped, compressed, of other types, or written by other programs.

| kind | tried | loaded | refused in one line | most memory (MiB) | longest (s of CPU) | longest (s) |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{table}

An attack passes if the file is loaded, or if a `ValueError` with a single line of at most 1,200 characters is raised.
It must also print at most 20 lines (a warning counts once per place in the code, as Python shows it) and not run out of
memory: each attack may use 1 GiB of address space in addition to what the process already uses. All attacks passed.
"Most memory" is the largest growth of the process during one attack.

- Configs: any values that JSON can represent, in the config of a tree, a multi-exit network, a tree with exits and a
  transformer. A loaded model then counts its multiply-accumulates.
- Folders: files are missing, truncated, bit-flipped, swapped with those of another model, of other types, or replaced
  by symbolic links and pipes.
- Policies: the policy is loaded and evaluates two images. It refuses a depth that the model does not have at that
  point.
- Tuning files: `tune` reads the file. The model's outputs must not change.
- Checkpoints: a run is resumed from the checkpoint for one epoch. In 85 % of the cases the manifest is rewritten after
  the damage, as a forger would do. In the others the trainer finds the damage by the manifest, sets the checkpoint
  aside and starts from scratch, which counts as loaded. Some files would run code if they were unpickled; none did.

## How to repeat it

```bash
python benchmarks/hostile.py --seed {settings.seed}
```

The tests run a sample (`tests/test_hostile_files.py`).

hierens {hierens.__version__}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()},
{platform.machine()}, {threads} of {os.cpu_count()} cores, which also ran other programs.
"""


if __name__ == "__main__":
    main(tyro.cli(Settings))
