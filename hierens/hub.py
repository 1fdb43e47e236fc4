"""Models as files: timm's own layout on disk and on the Hugging Face Hub, with a model card.

A saved model is `config.json` (what to build: backbone, cuts, tree), `model.safetensors` (its weights) and `README.md`
(the card). timm loads it by itself once hierens is imported: `timm.create_model("local-dir:PATH", pretrained=True)`.
Nothing is unpickled.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
from huggingface_hub import HfApi, ModelCardData
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import save_for_hf
from timm.models._hub import save_config_for_hf

import hierens
import hierens.architectures  # registers the entry points that a config names
from hierens.adaptive import Adaptive
from hierens.fetching import LoadError, fetch
from hierens.policies import Policy, save_policy
from hierens.profiling import millions, table

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_MOST_LEAVES = 4096
_MOST_EXITS = 256
_SHARED = {"backbone", "backbone_args", "at", "num_classes", "in_chans"}
_ARGUMENTS = {
    "hne": _SHARED | {"branching", "leaves", "looped"},
    "multi_exit": _SHARED | {"head", "collaborate", "weights", "learn_weights", "kept"},
}

__all__ = ["LoadError", "SaveError", "from_pretrained", "model_card", "push_to_hub", "save_config", "save_pretrained"]

_KINDS = {  # titles of model cards, and how their first sentence begins
    "hne": (
        "Hierarchical neural ensemble",
        "A tree of {leaves} networks that share their first layers ([Ruiz & Verbeek](https://arxiv.org/abs/2003.01474)),",
    ),
    "multi_exit": (
        "Multi-exit network",
        "A network with {leaves} exits ([Li et al.](https://arxiv.org/abs/1908.06294)),",
    ),
}


class SaveError(ValueError):
    """A model could not be made again from what would be saved."""


def save_pretrained(
    model: Adaptive,
    directory: str | Path,
    results: Mapping[str, Sequence[float]] | None = None,
    policy: Policy | None = None,
) -> Path:
    """Write `config.json`, `model.safetensors` and a model card.

    Args:
        model: the model; its training mode and device do not matter.
        directory: made if missing.
        results: further columns of the card's table, a value per depth, such as `{"accuracy (%)": [97.1, 97.8]}`.
        policy: how deep to go by default, as `policy.json`: `hierens.policies.load_policy` reads it.

    Returns:
        The directory.

    Raises:
        SaveError: the backbone was not made by `timm.create_model`, or changed since, so that loading would fail.
    """
    _check_remakable(model)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # safetensors stores plain layouts only, and the caller's model may well be channels_last.
    plain = copy.deepcopy(model).to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    plain._model_args = _arguments(model)
    save_for_hf(plain, str(directory), model_config={"hierens": hierens.__version__}, safe_serialization=True)
    (directory / CARD).write_text(model_card(model, results))
    if policy is not None:
        save_policy(policy, directory)
    return directory


def save_config(model: Adaptive, directory: str | Path) -> None:
    """Write `config.json` alone, beside weights that are there already."""
    described = SimpleNamespace(**vars(model))  # FSDP's models cannot be copied
    described._model_args = _arguments(model)
    save_config_for_hf(described, str(Path(directory) / CONFIG), model_config={"hierens": hierens.__version__})


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

    Returns:
        The address of the commit.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as directory:
        save_pretrained(model, directory, results, policy)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=directory, revision=revision, commit_message=commit_message
        )
    return str(commit.commit_url)


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
    config_file, weights = fetch(name, (CONFIG, WEIGHTS), revision=revision, token=token, cache_dir=cache_dir)
    config = _read_config(config_file)
    model = _build(config, config_file)
    _load_weights(model, weights)
    return model.eval()


def model_card(model: Adaptive, results: Mapping[str, Sequence[float]] | None = None) -> str:
    """The text of a model card: what the model is, what each depth costs and gives, how to use it."""
    args, size = _arguments(model), tuple(model.pretrained_cfg["input_size"])
    data = ModelCardData(library_name="timm", tags=["image-classification", "timm", "hierens", "anytime-inference"])
    columns = dict(results or {})
    if wrong := [name for name, values in columns.items() if len(values) != model.depths]:
        raise ValueError(f"results need a value per depth ({model.depths}): {', '.join(wrong)} have not.")
    costs = zip(model.sizes, model.macs(size), model.parameter_counts(), strict=True)
    rows = [
        (f"{depth}", f"{leaves}", millions(macs), millions(count), *(f"{v[depth]:.2f}" for v in columns.values()))
        for depth, (leaves, macs, count) in enumerate(costs)
    ]
    header = ("depth", model.unit, "MACs", "parameters", *columns)
    title, about = _KINDS[model.architecture]
    height_width = "x".join(map(str, size[1:]))
    return f"""---
{data.to_yaml()}
---

# {title} of {args["backbone"]}

{about.format(leaves=model.leaves)}
made with hierens from timm's `{args["backbone"]}`. One checkpoint serves every budget below: `depth` says how many of
the {model.unit} are run. {model.num_classes} classes; costs are for images of {size[0]} channels and {height_width}
pixels.

{table(header, rows)}

```python
import hierens

model = hierens.from_pretrained("user/name")  # or a directory with this model's files
logits = model(images, depth=1)               # images: (N, {size[0]}, {size[1]}, {size[2]})
for step in model.anytime(images):            # or one after the other, for as long as there is time
    print(step.leaves, step.macs, step.logits.argmax(-1))
```
"""


def _arguments(model: Adaptive) -> dict[str, Any]:
    """What the entry point needs to make the model again."""
    return {key: value for key, value in model.arguments().items() if key in _ARGUMENTS[model.architecture]}


def _check_remakable(model: Adaptive) -> None:
    args = _arguments(model)
    if not args.get("backbone"):
        raise SaveError("only models of backbones that timm.create_model made can be saved: others have no name.")
    if model.num_classes < 1:
        raise SaveError("the classifier was removed: reset_classifier to the classes of the saved model first.")
    try:
        json.dumps(args)
        with torch.device("meta"):
            kwargs = {**args["backbone_args"], "num_classes": model.num_classes, "in_chans": model.in_chans}
            fresh = timm.create_model(args["backbone"], **kwargs).state_dict()
    except Exception as error:
        raise SaveError(f"the backbone {args['backbone']} cannot be made again from its arguments: {error}") from error
    for part, copies in model.backbone_parts():
        for name, tensor in part.state_dict().items():
            if name not in fresh or fresh[name].numel() * copies != tensor.numel():
                raise SaveError(
                    f"{name} is not what timm.create_model({args['backbone']!r}) makes: the backbone was changed after "
                    "it was made; pass the change as an argument of timm.create_model instead."
                )


def _read_config(file: Path) -> dict[str, Any]:
    """The `model_args` and the rest of a config, checked before anything is built."""
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"{file} is not valid JSON: {error}.") from error
    args = config.get("model_args") if isinstance(config, dict) else None
    if not isinstance(args, dict):
        raise LoadError(f"{file} has no model_args: it is not the config of a hierens model.")
    kind = config.get("architecture")
    if kind not in _ARGUMENTS:
        raise LoadError(f"{file} names the architecture {kind!r}; hierens loads {' and '.join(_ARGUMENTS)} only.")
    backbone = args.get("backbone")
    if not isinstance(backbone, str) or not timm.is_model(backbone):
        raise LoadError(f"{file} names the backbone {backbone!r}, which this timm ({timm.__version__}) does not have.")
    for key in ("num_classes", "in_chans"):
        if type(args.get(key)) is not int or not 1 <= args[key] <= 10_000_000:
            raise LoadError(f"{file} has no usable {key} (got {args.get(key)!r}).")
    if not isinstance(args.get("at"), list) or not all(isinstance(name, str) for name in args["at"]):
        raise LoadError(f"{file} has no usable list of cuts, `at` (got {args.get('at')!r}).")
    _check_tree(args, file) if kind == "hne" else _check_exits(args, file)
    # timm writes the image size of a transformer beside the rest: the backbone takes it.
    if unknown := set(args) - {*_ARGUMENTS[kind], "img_size"}:
        raise LoadError(f"{file} has model_args that hierens does not know: {', '.join(sorted(unknown))}.")
    return config


def _check_tree(args: dict[str, Any], file: Path) -> None:
    branching, leaves = args.get("branching"), args.get("leaves")
    whole = isinstance(branching, list) and all(type(f) is int and 1 <= f <= _MOST_LEAVES for f in branching)
    if not whole or type(leaves) is not int or not 1 <= leaves <= _MOST_LEAVES or len(branching or []) > 64:
        raise LoadError(f"{file} has no usable branching and leaves (got {branching!r} and {leaves!r}).")


def _check_exits(args: dict[str, Any], file: Path) -> None:
    kept, blocks = args.get("kept"), len(args["at"]) + 1
    whole = isinstance(kept, list) and kept and all(type(exit) is int and 0 <= exit < blocks for exit in kept)
    if not whole or blocks > _MOST_EXITS or sorted(set(kept or [])) != kept:
        raise LoadError(f"{file} has no usable list of exits, `kept` (got {kept!r} of {blocks}).")


def _build(config: dict[str, Any], file: Path) -> Adaptive:
    kind = config["architecture"]
    try:
        model = timm.create_model(kind, **({"init": "copy"} if kind == "hne" else {}), **config["model_args"])
    except Exception as error:
        raise LoadError(f"{file} describes a model that cannot be built: {error}") from error
    assert isinstance(model, Adaptive)
    if isinstance(config.get("pretrained_cfg"), dict):
        model.pretrained_cfg.update(config["pretrained_cfg"], architecture=kind)
    # timm writes these beside the rest, and reads them back so.
    model.pretrained_cfg.update({key: config[key] for key in ("label_names", "label_descriptions") if key in config})
    return model


def _load_weights(model: Adaptive, file: Path) -> None:
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{file} is damaged or no safetensors file ({error}): copy or download it again.") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise LoadError(f"the weights in {file} do not fit the config beside them: {error}") from error
