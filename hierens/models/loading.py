"""Loads saved models from a directory or from the Hub. Config and weights are checked before a model is built.

Nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import timm
from safetensors import SafetensorError, safe_open

# These register the entry points that a config can name.
import hierens.models.msdnet
import hierens.models.paper_networks
import hierens.models.registry
import hierens.models.small_resnets  # noqa: F401
from hierens.core.errors import first_line
from hierens.core.fetching import LoadError, read_files
from hierens.core.modes import ordinary_tensors
from hierens.hub.saving import CONFIG, WEIGHTS
from hierens.hub.validate import TREES, Stored, check_fit, check_leaves, read_config, read_header, unbuildable
from hierens.inference.policies import POLICY, Policy, read_policy
from hierens.models.adaptive import Adaptive


def from_pretrained(
    name: str | Path, *, revision: str | None = None, token: str | None = None, cache_dir: str | None = None
) -> Adaptive:
    """Load a model, in evaluation mode, from a directory or from the Hugging Face Hub.

    Args:
        name: a directory that `save_pretrained` wrote, or a repository `user/name`.
        revision: branch, tag or commit of the repository.
        token: access token of a private repository.
        cache_dir: where downloads are kept.

    Raises:
        LoadError: a missing or damaged file, a config from which no model can be built, weights that do not fit it.
    """
    source: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    return _model_of(read_files(name, (CONFIG, WEIGHTS), _read, **source))


def load_with_policy(
    name: str | Path, *, revision: str | None = None, token: str | None = None, cache_dir: str | None = None
) -> tuple[Adaptive, Policy | None]:
    """`from_pretrained` and `load_policy` in one call. If the folder is being saved again, both are of the same save.

    Args:
        name: as for `from_pretrained`.
        revision: likewise.
        token: likewise.
        cache_dir: likewise.

    Returns:
        The model, and the policy saved beside it or None.

    Raises:
        LoadError: as for `from_pretrained` and `load_policy`.
    """
    source: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    saved = read_files(name, (CONFIG, WEIGHTS), _read, optional=(POLICY,), **source)
    return _model_of(saved), saved.policy


class _Saved(NamedTuple):
    """Contents of the files of a model. The weights are an open file, so replacing the file does not change them."""

    config: dict[str, Any]
    config_file: Path
    header: dict[str, Stored]
    weights: Any
    weights_file: Path
    policy: Policy | None


def _read(config_file: Path, weights_file: Path, policy_file: Path | None = None) -> _Saved:
    config, header = read_config(config_file), read_header(weights_file)
    policy = None if policy_file is None else read_policy(policy_file)
    return _Saved(config, config_file, header, safe_open(weights_file, "pt"), weights_file, policy)


@ordinary_tensors
def _model_of(saved: _Saved) -> Adaptive:
    config = saved.config
    # The check uses no values, so it cannot run the self-check that finds the levels to loop.
    unlooped = {"looped": config["model_args"].get("looped") or {}} if config["architecture"] in TREES else {}
    check_leaves(config, saved.header, saved.config_file)
    check_fit(lambda: _build(config, **unlooped), saved.header, saved.config_file, saved.weights_file)
    try:
        model = _build(config)
    except Exception as error:
        raise unbuildable(saved.config_file, error) from error
    _load_weights(model, saved.weights, saved.weights_file)
    return model.eval()


def _build(config: dict[str, Any], **settled: Any) -> Adaptive:
    kind = config["architecture"]
    settled |= {"init": "copy"} if kind in TREES else {}
    model = timm.create_model(kind, **{**config["model_args"], **settled})
    assert isinstance(model, Adaptive)
    _describe(model, config)
    return model


def _describe(model: Adaptive, config: dict[str, Any]) -> None:
    model.pretrained_cfg.update(config["pretrained_cfg"], num_classes=model.num_classes)
    # timm writes these beside `pretrained_cfg`, not in it.
    model.pretrained_cfg.update({key: config[key] for key in ("label_names", "label_descriptions") if key in config})


def _load_weights(model: Adaptive, weights: Any, file: Path) -> None:
    try:
        model.load_state_dict({name: weights.get_tensor(name) for name in weights.keys()})  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:
        raise LoadError(f"the weights in {file} cannot be read: {first_line(error)}.") from error
