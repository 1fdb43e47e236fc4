"""`hierens profile` and `hierens zoo`: the costs of depths, and the cuts of backbones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from hierens.cli.command import Command, UsageError
from hierens.cli.methods import check_made, check_method
from hierens.cli.output import json_output, print_table, print_to_stderr
from hierens.core.errors import did_you_mean, first_line
from hierens.core.progress import with_progress

if TYPE_CHECKING:
    from torch import nn

    from hierens.cutting.cut import Cutting
    from hierens.models.adaptive import Adaptive

_OF_TIMM_MODELS = ("method", "blocks", "exits")  # flags of `profile` that have no meaning for saved models


@dataclass(frozen=True)
class ProfileSettings:
    """A saved model, or a backbone to convert."""

    model: tyro.conf.Positional[str]
    """folder of a saved model, user/name on the Hub, or a timm model, which is converted with random weights"""
    method: Literal["hne", "multi_exit", "hne_exits"] = "hne"
    """convert a timm model to a tree of networks, one network with exits, or a tree with exits"""
    blocks: int = 4
    """blocks of the tree: 2^(blocks-1) networks"""
    exits: int | None = None
    """exits of a multi-exit network: 4, or those of the backbone itself"""
    size: tuple[int, int, int] | None = None
    """channels, height and width of the images; by default the model's"""
    batch_size: int = 1
    """images per forward pass, for the latency"""
    json: bool = False
    """print one JSON object instead of a table"""


def profile(arguments: Sequence[str]) -> None:
    """Print networks, MACs, parameters and latency of every depth."""
    settings = PROFILE.parse(arguments)
    if settings.batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {settings.batch_size}.")
    given = PROFILE.given(arguments)
    check_method(given, settings.method)
    if _is_saved(settings.model):
        check_made(given, settings.model, _OF_TIMM_MODELS)
    with json_output(settings.json) as write_json:
        model = _model(settings, given)
        try:
            found = model.profile(settings.size, settings.batch_size)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"{settings.model} takes no images of size {settings.size}: {first_line(error)}."
            ) from error
        if settings.json:
            write_json({"model": settings.model, **found.to_dict()})
        else:
            print_table(*found.cells())


def _is_saved(name: str) -> bool:
    return Path(name).is_dir() or "/" in name


def _model(settings: ProfileSettings, given: set[str]) -> Adaptive:
    import timm

    from hierens.models.adaptive import Adaptive
    from hierens.models.conversion import hierensify, multi_exit, tree_with_exits
    from hierens.models.loading import from_pretrained

    name = settings.model
    if _is_saved(name):
        return from_pretrained(name)
    if not timm.is_model(name):
        raise ValueError(f"{name} is neither a folder nor a timm model{did_you_mean(name, timm.list_models())}.")
    channels = {"in_chans": settings.size[0]} if settings.size else {}
    backbone = timm.create_model(name, **channels).eval()
    if isinstance(backbone, Adaptive):  # hne_...: already a tree
        check_made(given, name, _OF_TIMM_MODELS)
        return backbone
    if settings.method != "hne" and not backbone.num_classes and hasattr(backbone, "reset_classifier"):
        backbone.reset_classifier(1000)  # exits are classifiers
    if settings.method == "multi_exit":
        return multi_exit(backbone, settings.exits)
    return (tree_with_exits if settings.method == "hne_exits" else hierensify)(backbone, settings.blocks)


PROFILE = Command(
    "profile",
    "MACs, parameters and latency of every depth of a saved model or a timm backbone",
    ProfileSettings,
    profile,
    "MODEL|BACKBONE",
    examples=(
        "hierens profile runs/demo/model",
        "hierens profile mobilenetv2_075 --blocks 4 --size 3 128 128",
        "hierens profile resnet50 --method multi_exit --exits 3",
    ),
)


@dataclass(frozen=True)
class ZooSettings:
    """The models of timm to cut."""

    pattern: tyro.conf.Positional[str] = ""
    """a name, or a pattern such as 'convnext*' (in quotes); without one, all names are listed and nothing is cut"""
    blocks: int = 4
    """number of blocks"""
    json: bool = False
    """print one JSON object instead of a table"""


def zoo(arguments: Sequence[str]) -> None:
    """Cut models without weights, on the meta device, and print the blocks' shares of the MACs."""
    settings = ZOO.parse(arguments)
    if not settings.pattern and "blocks" in ZOO.given(arguments):
        raise UsageError("--blocks needs models to cut: give a name or a pattern, as in hierens zoo 'convnext*'.")

    import timm
    from timm.models import model_entrypoint

    known = [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("timm.")]
    chosen = known
    if settings.pattern:
        matching = set(timm.list_models(settings.pattern))
        chosen = [name for name in known if name in matching]
    if not chosen:
        raise ValueError(f"timm has no model {settings.pattern!r}{did_you_mean(settings.pattern, known)}.")
    with json_output(settings.json) as write_json:
        if not settings.pattern:
            write_json({"models": chosen}) if settings.json else print("\n".join(chosen))
            print_to_stderr(f"{len(chosen)} models; hierens zoo PATTERN cuts those that match.")
            return
        found = [
            cut_report(n, settings.blocks, len(chosen) == 1) for n in with_progress(chosen, len(chosen), "cutting")
        ]
        if len(found) == 1 and "error" in found[0]:
            raise ValueError(f"{chosen[0]} cannot be cut into {settings.blocks} blocks: {found[0]['error']}")
        if settings.json:
            write_json({"blocks": settings.blocks, "models": found})
        elif len(found) > 1:
            print_table(("model", "MACs", "shares of the blocks (%)", "cut before"), map(_line, found))
        else:
            _print_one(found[0])


def cut_report(name: str, blocks: int, places: bool = False) -> dict[str, Any]:
    """Where a timm model is cut and each block's share of its MACs, or why it cannot be cut.

    Args:
        name: of the model; it is created without weights.
        blocks: number of blocks.
        places: also list all places where it could be cut without opening its blocks.
    """
    import timm
    import torch

    from hierens.cutting.cut import cut, cut_points

    try:
        with torch.device("meta"):
            backbone = timm.create_model(name).eval()
        cutting = cut(backbone, blocks)
        macs = _macs(backbone, cutting)
        record: dict[str, Any] = {
            "name": name,
            "macs": sum(macs),
            "at": list(cutting.at),
            "shares": [round(count / sum(macs), 4) for count in macs[:blocks]],
        }
        if places:
            points = cut_points(backbone)
            record["places"] = [
                {"name": p.name, "macs_before": round(p.macs_before, 4), "stage_end": p.stage_end} for p in points
            ]
    except Exception as error:  # a forward pass on the meta device raises all kinds of errors
        return {"name": name, "error": first_line(error)}
    return record


def _macs(backbone: nn.Module, cutting: Cutting) -> list[int]:
    """The MACs of each block, of the head and of the classifier."""
    from torch import nn

    from hierens.core.macs import count_macs
    from hierens.core.timm_info import input_size

    def piece_by_piece(pieces: Iterable[nn.Module], value: Any) -> Iterator[Any]:
        for piece in pieces:
            value = piece(*value) if isinstance(value, tuple) else piece(value)
            yield

    pieces = nn.ModuleList([*cutting.blocks, cutting.head, cutting.classifier])
    return list(count_macs(pieces, input_size(backbone), piece_by_piece))


def _line(record: dict[str, Any]) -> tuple[str, ...]:
    from hierens.evaluation.profiling import millions

    if "error" in record:
        return (record["name"], "", "", f"not cut: {record['error']}")
    shares = " ".join(f"{100 * share:.0f}" for share in record["shares"])
    return (record["name"], millions(record["macs"]), shares, " ".join(record["at"]))


def _print_one(record: dict[str, Any]) -> None:
    print_table(("model", "MACs", "shares of the blocks (%)", "cut before"), [_line(record)])
    print("\nplaces where it can be cut without opening its blocks (at=[...]):\n")
    rows = [
        (place["name"], f"{100 * place['macs_before']:.1f}", "yes" if place["stage_end"] else "")
        for place in record["places"]
    ]
    print_table(("before", "MACs before it (%)", "end of a stage"), rows)


ZOO = Command(
    "zoo",
    "timm's models: whether and where they are cut, and the blocks' shares of the MACs",
    ZooSettings,
    zoo,
    "[PATTERN]",
    examples=("hierens zoo resnet50", "hierens zoo 'mobilenetv3*' --blocks 3"),
)
