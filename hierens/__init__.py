"""Hierarchical neural ensembles and multi-exit networks from any timm backbone: one checkpoint, every budget.

Importing hierens registers its models with timm, which takes as long as importing torch. Only the program `hierens`
delays this until a command needs it: see `_hierens_cli.py`.
"""

import sys
from typing import TYPE_CHECKING, Any

from hierens.core.version import __version__ as __version__

if TYPE_CHECKING or "_hierens_cli" not in sys.modules:
    from hierens.core.protocol import Step
    from hierens.core.tree import Tree
    from hierens.cutting.cut import CutError, CutPoint, cut_points
    from hierens.inference.calibration import calibrate
    from hierens.models.adaptive import Adaptive
    from hierens.models.conversion import hierensify, multi_exit, tree_with_exits
    from hierens.models.ensemble import FusedEnsemble, HierarchicalEnsemble
    from hierens.models.loading import from_pretrained
    from hierens.models.multi_exit import MultiExit
    from hierens.models.tree_exits import TreeWithExits
else:
    _MODULES = {
        "core.protocol": ("Step",),
        "models.adaptive": ("Adaptive",),
        "inference.calibration": ("calibrate",),
        "cutting.cut": ("CutError", "CutPoint", "cut_points"),
        "models.conversion": ("hierensify", "multi_exit", "tree_with_exits"),
        "models.ensemble": ("FusedEnsemble", "HierarchicalEnsemble"),
        "models.multi_exit": ("MultiExit",),
        "models.loading": ("from_pretrained",),
        "core.tree": ("Tree",),
        "models.tree_exits": ("TreeWithExits",),
    }

    def __getattr__(name: str) -> Any:
        """Import public names from their modules at first use (PEP 562)."""
        from importlib import import_module

        for module, names in _MODULES.items():
            if name in names:
                return getattr(import_module(f"hierens.{module}"), name)
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
