"""The kinds of a tree's members, and the check of the arguments that choose them."""

from __future__ import annotations

from collections.abc import Sequence
from reprlib import repr as short
from typing import Any, Literal, get_args

Kind = Literal["full", "rank1", "lora"]
_MOST_RANK = 2**16


def member_kinds(members: Any, rank: Any, levels: int) -> tuple[Kind, ...]:
    """The kind of each level, then of the head and of the classifier: that of the last level.

    Args:
        members: one kind for all levels, or a sequence with one per level.
        rank: of the kind `lora`; None without it.
        levels: of the tree.

    Raises:
        ValueError: an unknown kind, another number of kinds than of levels, or no rank that fits.
    """
    kinds = [members] * levels if isinstance(members, str) else members
    known = get_args(Kind)
    if not isinstance(kinds, Sequence) or not all(isinstance(kind, str) and kind in known for kind in kinds):
        raise ValueError(f"members must be {', '.join(known)}, or a list of these, got {short(members)}.")
    if len(kinds) != levels:
        raise ValueError(f"members names {len(kinds)} kinds, and the tree has {levels} levels: give one for each.")
    if "lora" in kinds and not (type(rank) is int and 1 <= rank <= _MOST_RANK):
        raise ValueError(f"members 'lora' need a rank from 1 to {_MOST_RANK}, got {short(rank)}.")
    if "lora" not in kinds and rank is not None:
        raise ValueError(f"rank={short(rank)} is for members 'lora', and there are none: leave it out.")
    return (*kinds, kinds[-1], kinds[-1])
