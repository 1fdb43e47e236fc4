"""Refuses flags that have no meaning for a kind of network, which would otherwise be ignored silently."""

from __future__ import annotations

from collections.abc import Collection

from hierens.cli.command import UsageError

_OTHERS = {  # by method: a flag that it does not have, its result, and the flag to use instead
    "hne": ("exits", "a tree of networks", "blocks"),
    "hne_exits": ("exits", "a tree with an exit behind every block but the last", "blocks"),
    "multi_exit": ("blocks", "one network with exits", "exits"),
}
_OF_NEW_NETWORKS = (
    *("backbone", "backbone_args", "pretrained", "weights", "blocks", "branching", "members", "rank"),
    *("exits", "head", "exit_weights", "learn_weights", "exit_average", "drop_path", "dropout", "init"),
)


def check_method(given: Collection[str], method: str) -> None:
    """Refuse `--blocks` for networks with exits, and `--exits` for trees.

    Args:
        given: names of the fields that were given as flags.
        method: the method of the network.

    Raises:
        UsageError: a flag has no meaning for this method.
    """
    other, made, own = _OTHERS[method]
    if other in given:
        raise UsageError(f"--{other} has no meaning for --method {method}, which creates {made}: use --{own}.")


def check_made(given: Collection[str], name: str, without: Collection[str] = _OF_NEW_NETWORKS) -> None:
    """Refuse flags that configure a new network, for a network that exists already.

    Args:
        given: names of the fields that were given as flags.
        name: of the network.
        without: names of the fields that have no meaning for it.

    Raises:
        UsageError: one of them was given.
    """
    if unused := [f"--{field.replace('_', '-')}" for field in without if field in given]:
        raise UsageError(f"{name} is already an ensemble: leave out {' and '.join(unused)}.")
