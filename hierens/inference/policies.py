"""Policies, which choose how much of a model is evaluated for a request, and their files.

A policy is called with a model and images, and returns a `Prediction`. Its fields are plain values, which are saved as
JSON beside a model (`save_policy`, `load_policy`). What a policy measures during use (the speed of this machine, the
recent load) is not saved, except by `LatencyObjective`. Threads may share a policy.

- `FixedDepth`: always the same networks.
- `Deadline`: as many networks as fit into a time.
- `Load`: a depth that falls while requests queue up, and rises again.
- `Confidence`: each image leaves as soon as its prediction is certain enough;
  `hierens.inference.calibration.calibrate` chooses the thresholds for a budget.
- `LatencyObjective`: batch size, maximal depth and thresholds for a percentile of latencies; follows load and images.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from hierens.core.atomic_files import replacing
from hierens.core.fetching import LoadError, MissingFileError, read_files
from hierens.core.json_files import read_json, short
from hierens.inference.confidence import EVERYBODY, NOBODY, Confidence
from hierens.inference.controllers import Deadline, Load
from hierens.inference.latency_objective import LatencyObjective
from hierens.inference.policy import FixedDepth, Policy, Prediction

__all__ = [
    "EVERYBODY",
    "NOBODY",
    "POLICIES",
    "POLICY",
    "Confidence",
    "Deadline",
    "FixedDepth",
    "LatencyObjective",
    "Load",
    "Policy",
    "Prediction",
    "from_dict",
    "load_policy",
    "read_policy",
    "save_policy",
]

POLICY = "policy.json"
POLICIES: dict[str, type[Policy]] = {
    kind.kind: kind for kind in (FixedDepth, Deadline, Load, Confidence, LatencyObjective)
}


def from_dict(values: dict[str, Any]) -> Policy:
    """The policy that `to_dict` described.

    Raises:
        ValueError: an unknown policy, or values that it does not take.
    """
    if not isinstance(values, dict):
        raise ValueError(f"a policy is described by fields and values, got {short(values)}.")
    known = POLICIES.get(str(values.get("policy")))
    if known is None:
        raise ValueError(f"there is no policy {short(values.get('policy'))}: choose {', '.join(POLICIES)}.")
    fields = {f.name for f in dataclasses.fields(known) if f.init}
    given = {name: value for name, value in values.items() if name != "policy"}
    if unknown := short(", ".join(sorted(given.keys() - fields)), plain=True):
        raise ValueError(f"a {known.kind} policy takes {', '.join(sorted(fields))}, not {unknown}.")
    try:
        return known(**given)
    except TypeError as error:
        raise ValueError(f"the values of the {known.kind} policy do not fit: {error}.") from error


def save_policy(policy: Policy, directory: str | Path) -> Path:
    """Write `policy.json` beside a saved model."""
    file = Path(directory) / POLICY
    with replacing(file) as partial:
        partial.write_text(json.dumps(policy.to_dict(), indent=2) + "\n")
    return file


def load_policy(
    name: str | Path,
    default: Policy | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
) -> Policy:
    """Load the policy beside a saved model, in a folder or on the Hub, or from its own file.

    Args:
        name: a folder, a file, or a repository `user/name`.
        default: returned if there is a model but no policy beside it; without a default, that is an error.
        revision: branch, tag or commit of the repository.
        token: access token of a private repository.
        cache_dir: where downloads are kept.

    Raises:
        LoadError: there is no policy, or it cannot be read.
    """
    if Path(name).is_file():
        return read_policy(Path(name))
    try:
        return read_files(name, (POLICY,), read_policy, revision=revision, token=token, cache_dir=cache_dir)
    except MissingFileError:
        if default is None:
            raise
        return default


def read_policy(file: Path) -> Policy:
    """The policy in a file.

    Raises:
        LoadError: the file cannot be read, or holds no policy, or values that the policy does not take.
    """
    values = read_json(file, "a policy")
    if not isinstance(values, dict):
        raise LoadError(f"{file} holds no policy.")
    try:
        return from_dict(values)
    except ValueError as error:
        raise LoadError(f"{file} holds no usable policy: {error}") from error
