"""Models as files: timm's own layout on disk and on the Hugging Face Hub, with a model card.

A saved model is `config.json` (what to build: backbone, cuts, tree), `model.safetensors` (its weights) and `README.md`
(the card). timm loads it by itself once hierens is imported: `timm.create_model("local-dir:PATH", pretrained=True)`.
Nothing is unpickled.
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

from hierens.core.adaptive import AdaptiveBase
from hierens.core.atomic_files import saving
from hierens.core.fetching import LoadError, explain
from hierens.core.version import __version__
from hierens.hub.cards import PICTURE, About, draw_accuracy, model_card
from hierens.hub.validate import ARGUMENTS, check_arguments, read_config
from hierens.inference.policies import POLICY, Policy, save_policy

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


class SaveError(ValueError):
    """A model could not be made again from what would be saved."""


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

    In place of a model that is there already, with its policy and picture: whoever loads meanwhile gets the old one or
    the new one, and so does whoever loads after a kill. Other files in the directory stay.

    Args:
        model: the model; its training mode and device do not matter.
        directory: made if missing.
        results: further columns of the card's table, a value per depth, such as `{"accuracy (%)": [97.1, 97.8]}`.
        policy: how deep to go by default, as `policy.json`: `hierens.inference.policies.load_policy` reads it.
        name: how the card says to load it.
        picture: draw the accuracies among the results as `accuracy.png`, if matplotlib is there.
        about: `license`, `base_model`, `datasets` and `label_names`, for the card: see `hierens.hub.cards.About`. The
            names go into `config.json`, too.

    Returns:
        The directory.

    Raises:
        SaveError: the backbone was not made by `timm.create_model`, or changed since, so that loading would fail; or
            `pretrained_cfg` says what no model can have.
        ValueError: results or names of classes that do not fit the model.
    """
    return _save(model, directory, name, results, policy, picture, about)


def _save(
    model: AdaptiveBase,
    directory: str | Path,
    name: str,
    results: Mapping[str, Sequence[float]] | None,
    policy: Policy | None,
    picture: bool,
    about: About,
) -> Path:
    _check_remakable(model)
    model_card(model, results, **about)  # what does not fit is said before anything is written
    # safetensors stores plain layouts only, and the caller's model may well be channels_last.
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
    """The classes' names, as given or as the model was loaded with, where timm's tools look for them."""
    if names := about.get("label_names"):
        return {"label_names": list(names)}
    kept = {key: model.pretrained_cfg.get(key) for key in ("label_names", "label_descriptions")}
    names = kept["label_names"] or ()
    whole = all(int(index) < model.num_classes for index in names) if isinstance(names, dict) else False
    fit = whole or len(names) == model.num_classes
    return {key: value for key, value in kept.items() if value} if fit else {}


def save_config(model: AdaptiveBase, directory: str | Path) -> None:
    """Write `config.json` alone, beside weights that are there already."""
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
    """Publish a model on the Hugging Face Hub, making the repository if it is missing.

    Args:
        model: the model.
        repo_id: `user/name`.
        results: as for `save_pretrained`.
        policy: as for `save_pretrained`.
        private: whether a new repository is private; the account's default by default.
        token: access token; by default the one that `hf auth login` stored.
        revision: branch to push to.
        commit_message: of the upload.
        about: as for `save_pretrained`.

    Returns:
        The address of the commit.

    Raises:
        SaveError: as for `save_pretrained`, or the Hub did not take it.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as directory:
        _save(model, directory, repo_id, results, policy, True, about)
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
            raise SaveError(f"the Hub did not take {repo_id}: {explain(error, revision)}.") from error
    return str(commit.commit_url)


def _retried(upload: Callable[[], Any], times: int = 3) -> Any:
    """Upload, and once more after trouble on the Hub's side: files that arrived are not sent again."""
    for attempt in range(1, times + 1):
        try:
            return upload()
        except Exception as error:  # a line that went dead has another class in every version of huggingface_hub
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if attempt == times or status < 500 or isinstance(error, ValueError):
                raise
            time.sleep(attempt)


def _arguments(model: AdaptiveBase) -> dict[str, Any]:
    """What the entry point needs to make the model again."""
    return {key: value for key, value in model.arguments().items() if key in ARGUMENTS[model.architecture]}


def _check_remakable(model: AdaptiveBase) -> None:
    args = _arguments(model)
    if not args.get("backbone"):
        raise SaveError("only models of backbones that timm.create_model made can be saved: others have no name.")
    if model.num_classes < 1:
        raise SaveError("the classifier was removed: reset_classifier to the classes of the saved model first.")
    try:
        json.dumps(args, allow_nan=False)
        check_arguments(args["backbone_args"])
        with torch.device("meta"):
            kwargs = {**args["backbone_args"], "num_classes": model.num_classes, "in_chans": model.in_chans}
            fresh = timm.create_model(args["backbone"], **kwargs).state_dict()
    except Exception as error:
        raise SaveError(f"the backbone {args['backbone']} cannot be made again from its arguments: {error}") from error
    for part in model.backbone_parts():
        for name, tensor in part.state_dict().items():
            if name not in fresh or fresh[name].shape != tensor.shape:
                raise SaveError(
                    f"{name} is not what timm.create_model({args['backbone']!r}) makes: the backbone was changed after "
                    "it was made; pass the change as an argument of timm.create_model instead."
                )
