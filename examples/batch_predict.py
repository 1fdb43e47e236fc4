"""Predicts a folder of images, or any data set that hierens reads, with a saved model; writes Parquet files, resumable.

pip install -e ".[batch]"                                                              what it needs
python examples/batch_predict.py --model DIR --input FOLDER --output OUT               images in it and below
python examples/batch_predict.py --model user/name --dataset fashion_mnist --input DIR --output OUT
accelerate launch examples/batch_predict.py ...                                        on all devices
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import PartialState
from inputs import Batch, Batches, Folder, Indexed, Stream, open_inputs
from torch.utils.data import DataLoader

import hierens
from hierens.core.install import install_command
from hierens.inference.policies import Deadline, FixedDepth, Policy, load_policy
from hierens.models.loading import load_with_policy
from hierens.training.checkpoints.files import publish
from hierens.training.config import DataConfig
from hierens.training.preprocessing import PREPARED, data_config, label_names

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    sys.exit(f"error: Parquet files are written by pyarrow: {install_command('batch')}.")

MANIFEST = "_manifest.json"  # readers of Parquet folders ignore names with a leading underscore
SCHEMA = pa.schema(
    [
        ("index", pa.int64()),  # among the inputs, from 0
        ("path", pa.string()),  # below --input, or shard and key; null for data sets by index
        ("label", pa.int32()),  # null if unknown
        ("prediction", pa.int32()),
        ("name", pa.string()),  # of the predicted class, null if the classes have no names
        ("probability", pa.float32()),
        ("entropy", pa.float32()),  # of the prediction, in nats
        ("networks", pa.int32()),
        ("macs", pa.int64()),
        ("error", pa.string()),  # why there is no prediction, null otherwise
    ]
)


@dataclass(frozen=True)
class Settings:
    """Model, inputs and depth."""

    model: str
    """folder of a saved model, or user/name on the Hub"""
    output: str
    """folder for the Parquet files; an interrupted run is resumed with the missing files"""
    input: str = ""
    """folder of images, with its subfolders; or the location of the data set"""
    dataset: str = ""
    """`clothing`, `digits`, `fashion_mnist`; timm's `torch/..`, `hfds/..`, `hfids/..`, `wds/..`; empty for a folder"""
    split: str = "validation"
    """split of the data set"""
    policy: str = ""
    """a policy.json, or its folder; by default that of the model, else all networks are evaluated"""
    depth: int | None = None
    """evaluate the first 2^depth networks instead of using a policy"""
    labels: tuple[str, ...] = ()
    """names of the classes; by default those in the model's config, the data set, or the folders"""
    batch_size: int = 64
    """images per batch and process"""
    shard_size: int = 10_000
    """images per Parquet file"""
    workers: int = 4
    """loader processes per predicting process"""
    cpu: bool = False
    """use the CPU"""


def main() -> None:
    """Run from the command line."""
    run(tyro.cli(Settings, description=__doc__))


def run(settings: Settings) -> None:
    """Predict the inputs whose files are missing in the output folder.

    Raises:
        ValueError: settings are invalid, or differ from those of the existing files. Raised before any work.
    """
    for name in ("batch_size", "shard_size"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}.")
    state = PartialState(cpu=settings.cpu)
    model, policy = load(settings)
    where = {"dataset": settings.dataset, "data_dir": settings.input, "val_split": settings.split}
    config = replace(data_config(model, settings.model), **where)
    inputs = open_inputs(config)
    names = class_names(settings, model, inputs)
    output = Path(settings.output)
    settle(output, describe(settings, model, policy, config, inputs, names), state)
    done = {int(file.stem.removeprefix("part-")) for file in output.glob("part-*.parquet")}
    state.wait_for_everyone()  # all processes must list the files before one writes a new file
    batches = Batches(
        inputs, done, (state.process_index, state.num_processes), settings.shard_size, settings.batch_size
    )
    loader = DataLoader(batches, batch_size=None, collate_fn=_as_it_is, num_workers=inputs.workers(settings.workers))
    state.print(f"{policy}; {len(done)} files exist already")
    began = time.perf_counter()
    for part, of_part in itertools.groupby(loader, key=lambda batch: batch.part):
        table = predict(model.to(state.device), policy, of_part, names)
        write(table, output / f"part-{part:05d}.parquet")
        bad, taken = table.num_rows - table["error"].null_count, time.perf_counter() - began
        print(f"part {part}: {table.num_rows:,} images, {bad} unreadable, {table.num_rows / taken:,.0f} images/s")
        began = time.perf_counter()


def load(settings: Settings) -> tuple[hierens.Adaptive, Policy]:
    """The model, and the given depth or policy, by default the policy of the model, else full depth.

    Raises:
        ValueError: the model does not have the depth, or the policy depends on the clock.
    """
    if settings.depth is not None and settings.policy:
        raise ValueError("give --depth or --policy, not both.")
    if settings.depth is not None:
        model = hierens.from_pretrained(settings.model)
        model.leaves_at(settings.depth)
        return model, FixedDepth(settings.depth)
    if settings.policy:
        model, policy = hierens.from_pretrained(settings.model), load_policy(settings.policy)
    else:
        model, saved = load_with_policy(settings.model)
        policy = saved or FixedDepth()
    if isinstance(policy, Deadline):
        raise ValueError(
            f"the policy in {settings.policy or settings.model} depends on the clock, so results are not "
            "reproducible: give --depth or --policy."
        )
    return model, policy


def class_names(settings: Settings, model: hierens.Adaptive, inputs: Folder | Indexed | Stream) -> list[str] | None:
    """Names of the model's classes, if known; also sets the class indices of folders.

    Raises:
        ValueError: the number of `labels` is not the number of classes.
    """
    if settings.labels and len(settings.labels) != model.num_classes:
        raise ValueError(f"--labels has {len(settings.labels)} names, but the model {model.num_classes} classes.")
    of_inputs = inputs.names if len(inputs.names) == model.num_classes else None
    names = list(settings.labels) or label_names(model) or of_inputs
    if isinstance(inputs, Folder) and names:
        inputs.classes = {name: index for index, name in enumerate(names)}
    return names


def describe(
    settings: Settings,
    model: hierens.Adaptive,
    policy: Policy,
    config: DataConfig,
    inputs: Folder | Indexed | Stream,
    names: list[str] | None,
) -> dict[str, Any]:
    """Everything that rows depend on, which must be the same for all files of an output folder."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(f"{name} {tuple(tensor.shape)}".encode())
        weights.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    prepared = asdict(config)
    found = {"dataset": settings.dataset, "split": settings.split, "found": inputs.fingerprint()}
    described = {
        "model": weights.hexdigest(),
        "policy": policy.to_dict(),
        "preprocessing": {field: prepared[field] for field in PREPARED},
        "inputs": hashlib.sha256(json.dumps(found).encode()).hexdigest(),
        "labels": names,
        "shard size": settings.shard_size,
    }
    return dict(json.loads(json.dumps(described)))


def settle(output: Path, described: dict[str, Any], state: PartialState) -> None:
    """Compare with the manifest of the output folder, or write it.

    Raises:
        ValueError: the manifest differs.
    """
    file = output / MANIFEST
    if file.exists():
        try:
            begun = json.loads(file.read_text())
            before = {name: begun[name] for name in described}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} cannot be read: choose another --output, or empty this one.") from error
        for name, value in described.items():
            if before[name] != value:
                was, now = (_short(values[name]) for values in (before, described))
                raise ValueError(
                    f"{output} was started with another {name} (then {was}, now {now}): use the same settings, or "
                    "choose another --output."
                )
    elif next(output.glob("part-*.parquet"), None):
        raise ValueError(f"{output} contains Parquet files but no {MANIFEST}: choose another --output.")
    state.wait_for_everyone()
    if state.is_main_process and not file.exists():
        output.mkdir(parents=True, exist_ok=True)
        partial = output / f"{MANIFEST}.partial"
        partial.write_text(json.dumps({"hierens": hierens.__version__, **described}, indent=1) + "\n")
        publish(partial, file)


def predict(model: hierens.Adaptive, policy: Policy, batches: Iterable[Batch], names: list[str] | None) -> pa.Table:
    """The rows of one Parquet file."""
    rows: dict[str, list[Any]] = {field.name: [] for field in SCHEMA}
    device = next(model.parameters()).device
    for batch in batches:
        found: dict[str, Iterator[Any]] = {}
        if len(batch.images):
            answer = policy(model, batch.images.to(device))
            log_p = answer.logits.double().log_softmax(-1)
            best, classes = log_p.max(-1)
            values = {
                "prediction": classes,
                "probability": best.exp(),
                "entropy": -(log_p.exp() * log_p).sum(-1),
                "networks": answer.leaves,
                "macs": answer.macs,
            }
            found = {name: iter(tensor.tolist()) for name, tensor in values.items()}
        known = {"index": batch.indices, "path": batch.paths, "label": batch.labels, "error": batch.errors}
        for name, column in known.items():
            rows[name] += column
        for error in batch.errors:
            for name in ("prediction", "probability", "entropy", "networks", "macs"):
                rows[name].append(None if error is not None else next(found[name]))
            chosen = rows["prediction"][-1]
            rows["name"].append(names[chosen] if names and chosen is not None else None)
    return pa.table(rows, SCHEMA)


def write(table: pa.Table, file: Path) -> None:
    """Write a Parquet file atomically."""
    partial = file.with_name(f"_{file.name}.partial")
    pq.write_table(table, partial, compression="zstd")
    publish(partial, file)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _as_it_is(batch: Batch) -> Batch:
    return batch


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
