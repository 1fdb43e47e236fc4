"""Saves models on disk and on the Hugging Face Hub in timm's layout, with a model card.

A saved model is `config.json` (backbone, cuts, tree), `model.safetensors` (the weights) and `README.md` (the card).
Once hierens is imported, timm can load it: `timm.create_model("local-dir:PATH", pretrained=True)`. Nothing is pickled.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Unpack

import timm
import torch
from huggingface_hub import HfApi
from timm.models import save_for_hf
from timm.models._hub import save_config_for_hf

from hierens.branches.light import factor_names
from hierens.core.adaptive_base import AdaptiveBase
from hierens.core.atomic_files import saving
from hierens.core.fetching import LoadError, explain
from hierens.core.version import __version__
from hierens.hub.cards import PICTURE, About, draw_accuracy, model_card
from hierens.hub.validate import ARGUMENTS, check_arguments, read_config
from hierens.inference.policies import POLICY, Policy, save_policy

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


class SaveError(ValueError):
    """A model could not be rebuilt from what would be saved."""


def save_pretrained(
    model: AdaptiveBase,
    directory: str | Path,
    results: Mapping[str, Sequence[float]] | None = None,
    policy: Policy | None = None,
    *,
    name: str = "user/name",
    picture: bool = False,
    **about: Unpack[About],
) -> Path:
    """Write `config.json`, `model.safetensors` and a model card, all of them or, after any failure, none.

    A model that is already in the directory is replaced, with its policy and picture. Loading at the same time, or
    after a kill, gives the old model or the new one. Other files in the directory are kept.

    Args:
        model: the model; its training mode and device do not matter.
        directory: created if missing.
        results: further columns of the card's table, a value per depth, such as `{"accuracy (%)": [97.1, 97.8]}`.
        policy: the default policy, saved as `policy.json`, which `hierens.inference.policies.load_policy` reads.
        name: the name for loading the model that the card shows.
        picture: draw the accuracies in the results as `accuracy.png`, if matplotlib is installed.
        about: `license`, `base_model`, `datasets` and `label_names`, for the card: see `hierens.hub.cards.About`. The
            names are also written to `config.json`.

    Returns:
        The directory.

    Raises:
        SaveError: the backbone was not created by `timm.create_model`, or was changed afterwards, so that loading would
            fail; or `pretrained_cfg` has an invalid value.
        ValueError: results or class names do not fit the model.
    """
    _check_rebuildable(model)
    model_card(model, results, **about)  # raises before anything is written
    # safetensors stores contiguous tensors only, and the caller's model may be channels_last.
    plain = copy.deepcopy(model).to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    plain._model_args = _arguments(model)
    extra = {"hierens": __version__, **_labels(model, about)}
    with saving(directory, replaces=(POLICY, PICTURE)) as partial:
        save_for_hf(plain, str(partial), model_config=extra, safe_serialization=True)
        try:
            read_config(partial / CONFIG)
        except LoadError as error:
            raise SaveError(f"what was saved could not be loaded: {error}") from error
        drawn = picture and draw_accuracy(model, results or {}, partial)
        (partial / CARD).write_text(model_card(model, results, name, drawn, **about), encoding="utf-8")
        if policy is not None:
            save_policy(policy, partial)
    return Path(directory)


def _labels(model: AdaptiveBase, about: About) -> dict[str, Any]:
    """The class names, from `about` or from the model's config, in the fields that timm's tools read."""
    if names := about.get("label_names"):
        return {"label_names": list(names)}
    kept = {key: model.pretrained_cfg.get(key) for key in ("label_names", "label_descriptions")}
    names = kept["label_names"] or ()
    in_range = all(int(index) < model.num_classes for index in names) if isinstance(names, dict) else False
    fit = in_range or len(names) == model.num_classes
    return {key: value for key, value in kept.items() if value} if fit else {}


def save_config(model: AdaptiveBase, directory: str | Path) -> None:
    """Write `config.json` alone, beside existing weights."""
    described = SimpleNamespace(**vars(model))  # FSDP's models cannot be copied
    described._model_args = _arguments(model)
    save_config_for_hf(
        described, str(Path(directory) / CONFIG), model_config={"hierens": __version__, **_labels(model, {})}
    )


def push_to_hub(
    model: AdaptiveBase,
    repo_id: str,
    *,
    results: Mapping[str, Sequence[float]] | None = None,
    policy: Policy | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model of hierens",
    **about: Unpack[About],
) -> str:
    """Publish a model on the Hugging Face Hub; the repository is created if missing.

    Args:
        model: the model.
        repo_id: `user/name`.
        results: as for `save_pretrained`.
        policy: as for `save_pretrained`.
        private: whether a new repository is private; by default as in the account's settings.
        token: access token; by default that of `hf auth login`.
        revision: branch to push to.
        commit_message: of the upload.
        about: as for `save_pretrained`.

    Returns:
        The URL of the commit.

    Raises:
        SaveError: as for `save_pretrained`, or the Hub refused the upload.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as directory:
        save_pretrained(model, directory, results, policy, name=repo_id, picture=True, **about)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = _retried(
                lambda: api.upload_folder(
                    repo_id=repo_id, folder_path=directory, revision=revision, commit_message=commit_message
                )
            )
        except Exception as error:
            raise SaveError(f"uploading {repo_id} failed: {explain(error, revision)}.") from error
    return str(commit.commit_url)


def _retried(upload: Callable[[], Any], times: int = 3) -> Any:
    """Upload, and retry after network and server errors; files that arrived are not sent again."""
    for attempt in range(1, times + 1):
        try:
            return upload()
        except Exception as error:  # the class of network errors differs between versions of huggingface_hub
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if attempt == times or status < 500 or isinstance(error, ValueError):
                raise
            time.sleep(attempt)


def _arguments(model: AdaptiveBase) -> dict[str, Any]:
    """The arguments of the entry point that rebuilds the model."""
    return {key: value for key, value in model.arguments().items() if key in ARGUMENTS[model.architecture]}


def _check_rebuildable(model: AdaptiveBase) -> None:
    args = _arguments(model)
    if not args.get("backbone"):
        raise SaveError(
            "only models of backbones from timm.create_model can be rebuilt from a config: save the weights of this "
            "one by safetensors.torch.save_model(model, file), to load them into a model converted in the same way, "
            "or export it by model.export(directory)."
        )
    try:
        json.dumps(args, allow_nan=False)
        check_arguments(args["backbone_args"])
        with torch.device("meta"):
            kwargs = {**args["backbone_args"], "num_classes": model.num_classes, "in_chans": model.in_chans}
            fresh = timm.create_model(args["backbone"], **kwargs).state_dict()
    except Exception as error:
        raise SaveError(f"the backbone {args['backbone']} cannot be rebuilt from its arguments: {error}") from error
    for part in model.backbone_parts():
        factors = factor_names(part)
        for name, tensor in part.state_dict().items():
            if name in factors:
                continue
            if name not in fresh or fresh[name].shape != tensor.shape:
                raise SaveError(
                    f"{name} differs from that of timm.create_model({args['backbone']!r}): the backbone was changed "
                    "afterwards; pass the change as an argument of timm.create_model instead."
                )
