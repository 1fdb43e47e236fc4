"""Which flags make a network: those that its kind does not have would be passed over in silence."""

from __future__ import annotations

from collections.abc import Collection

from hierens.cli.command import UsageError

_OTHERS = {  # by method: a flag that it does not have, what it makes, and the flag that it has for that
    "hne": ("exits", "a tree of networks", "blocks"),
    "hne_exits": ("exits", "a tree with an exit behind every block but the last", "blocks"),
    "multi_exit": ("blocks", "one network with exits", "exits"),
}
_OF_NEW_NETWORKS = (
    *("backbone", "backbone_args", "pretrained", "weights", "blocks", "branching", "exits", "head", "exit_weights"),
    *("learn_weights", "drop_path", "dropout", "init"),
)


def check_method(given: Collection[str], method: str) -> None:
    """Refuse the number of blocks for networks with exits, and that of exits for trees.

    Args:
        given: names of the fields that were given as flags.
        method: how the network is made.

    Raises:
        UsageError: one of them has no meaning for this method.
    """
    other, made, own = _OTHERS[method]
    if other in given:
        raise UsageError(f"--{other} has no meaning for --method {method}, which makes {made}: give --{own}.")


def check_made(given: Collection[str], name: str, without: Collection[str] = _OF_NEW_NETWORKS) -> None:
    """Refuse flags of how a network is made, where it is made already.

    Args:
        given: names of the fields that were given as flags.
        name: of the network.
        without: names of the fields that have no meaning then.

    Raises:
        UsageError: one of them was given.
    """
    if unused := [f"--{field.replace('_', '-')}" for field in without if field in given]:
        raise UsageError(f"{name} is made already: leave {' and '.join(unused)} out.")
