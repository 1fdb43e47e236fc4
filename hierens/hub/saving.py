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
from typing import Any, NamedTuple, Unpack

import timm
import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from timm.models import save_for_hf
from timm.models._hub import save_config_for_hf

import hierens
import hierens.models.architectures  # registers the entry points that a config names
from hierens.core.adaptive import Adaptive
from hierens.core.errors import first_line
from hierens.core.modes import ordinary_tensors
from hierens.files.fetching import LoadError, explain, read_files
from hierens.files.saving import saving
from hierens.hub.cards import PICTURE, About, draw_accuracy, model_card
from hierens.hub.vetting import (
    ARGUMENTS,
    TREES,
    Stored,
    check_arguments,
    check_fit,
    check_leaves,
    read_config,
    read_header,
    unbuildable,
)
from hierens.inference.policies import POLICY, Policy, read_policy, save_policy

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
__all__ = [
    *("LoadError", "SaveError", "from_pretrained", "load_with_policy", "model_card", "push_to_hub", "save_config"),
    "save_pretrained",
]


class SaveError(ValueError):
    """A model could not be made again from what would be saved."""


def save_pretrained(
    model: Adaptive,
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
    model: Adaptive,
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
    extra = {"hierens": hierens.__version__, **_labels(model, about)}
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


def _labels(model: Adaptive, about: About) -> dict[str, Any]:
    """The classes' names, as given or as the model was loaded with, where timm's tools look for them."""
    if names := about.get("label_names"):
        return {"label_names": list(names)}
    kept = {key: model.pretrained_cfg.get(key) for key in ("label_names", "label_descriptions")}
    names = kept["label_names"] or ()
    whole = all(int(index) < model.num_classes for index in names) if isinstance(names, dict) else False
    fit = whole or len(names) == model.num_classes
    return {key: value for key, value in kept.items() if value} if fit else {}


def save_config(model: Adaptive, directory: str | Path) -> None:
    """Write `config.json` alone, beside weights that are there already."""
    described = SimpleNamespace(**vars(model))  # FSDP's models cannot be copied
    described._model_args = _arguments(model)
    save_config_for_hf(
        described, str(Path(directory) / CONFIG), model_config={"hierens": hierens.__version__, **_labels(model, {})}
    )


def push_to_hub(
    model: Adaptive,
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
        LoadError: a missing or damaged file, a config that names what cannot be built, weights that do not fit it.
    """
    source: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    return _made(read_files(name, (CONFIG, WEIGHTS), _read, **source))


def load_with_policy(
    name: str | Path, *, revision: str | None = None, token: str | None = None, cache_dir: str | None = None
) -> tuple[Adaptive, Policy | None]:
    """`from_pretrained` and `load_policy` at once: of a folder that is being saved anew, both are of the same save.

    Args:
        name: as for `from_pretrained`.
        revision: as for `from_pretrained`.
        token: likewise.
        cache_dir: likewise.

    Returns:
        The model, and the policy saved beside it, None if there is none.

    Raises:
        LoadError: as `from_pretrained` and `load_policy` do.
    """
    source: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    saved = read_files(name, (CONFIG, WEIGHTS), _read, optional=(POLICY,), **source)
    return _made(saved), saved.policy


class _Saved(NamedTuple):
    """What the files of a model say; the weights are opened, and so stay what they are if the file is replaced."""

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
def _made(saved: _Saved) -> Adaptive:
    config = saved.config
    # Which levels are looped is nothing to find out by computing, where there are no values to compare.
    unlooped = {"looped": config["model_args"].get("looped") or {}} if config["architecture"] in TREES else {}
    check_leaves(config, saved.header, saved.config_file)
    check_fit(lambda: _build(config, **unlooped), saved.header, saved.config_file, saved.weights_file)
    try:
        model = _build(config)
    except Exception as error:
        raise unbuildable(saved.config_file, error) from error
    _load_weights(model, saved.weights, saved.weights_file)
    return model.eval()


def _arguments(model: Adaptive) -> dict[str, Any]:
    """What the entry point needs to make the model again."""
    return {key: value for key, value in model.arguments().items() if key in ARGUMENTS[model.architecture]}


def _check_remakable(model: Adaptive) -> None:
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


def _build(config: dict[str, Any], **settled: Any) -> Adaptive:
    kind = config["architecture"]
    settled |= {"init": "copy"} if kind in TREES else {}
    model = timm.create_model(kind, **{**config["model_args"], **settled})
    assert isinstance(model, Adaptive)
    _describe(model, config)
    return model


def _describe(model: Adaptive, config: dict[str, Any]) -> None:
    model.pretrained_cfg.update(config["pretrained_cfg"], num_classes=model.num_classes)
    # timm writes these beside the rest, and reads them back so.
    model.pretrained_cfg.update({key: config[key] for key in ("label_names", "label_descriptions") if key in config})


def _load_weights(model: Adaptive, weights: Any, file: Path) -> None:
    try:
        model.load_state_dict({name: weights.get_tensor(name) for name in weights.keys()})  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:
        raise LoadError(f"the weights in {file} cannot be read: {first_line(error)}.") from error
