"""Hierarchical neural ensembles and multi-exit networks of any timm backbone: one checkpoint, every budget.

Importing it registers its models with timm, which takes as long as importing torch does. Only the program `hierens`
puts that off until a command needs it: see `_hierens_cli.py`.
"""

import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING or "_hierens_cli" not in sys.modules:
    from hierens.adaptive import Adaptive, Step
    from hierens.calibration import calibrate
    from hierens.cutting import CutError, CutPoint, cut_points
    from hierens.ensemble import HierarchicalEnsemble, hierensify
    from hierens.exits import MultiExit, multi_exit
    from hierens.fusing import FusedEnsemble
    from hierens.hub import from_pretrained
    from hierens.tree import Tree
    from hierens.tree_exits import TreeWithExits, tree_with_exits
else:
    _HOMES = {
        "adaptive": ("Adaptive", "Step"),
        "calibration": ("calibrate",),
        "cutting": ("CutError", "CutPoint", "cut_points"),
        "ensemble": ("HierarchicalEnsemble", "hierensify"),
        "exits": ("MultiExit", "multi_exit"),
        "fusing": ("FusedEnsemble",),
        "hub": ("from_pretrained",),
        "tree": ("Tree",),
        "tree_exits": ("TreeWithExits", "tree_with_exits"),
    }

    def __getattr__(name: str) -> Any:
        """The public names all the same, each from its module when it is asked for (PEP 562)."""
        from importlib import import_module

        for home, names in _HOMES.items():
            if name in names:
                return getattr(import_module(f"hierens.{home}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "Adaptive",
    "CutError",
    "CutPoint",
    "FusedEnsemble",
    "HierarchicalEnsemble",
    "MultiExit",
    "Step",
    "Tree",
    "TreeWithExits",
    "calibrate",
    "cut_points",
    "from_pretrained",
    "hierensify",
    "multi_exit",
    "tree_with_exits",
]
