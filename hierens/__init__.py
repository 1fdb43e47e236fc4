"""Hierarchical neural ensembles and multi-exit networks of any timm backbone: one checkpoint, every budget."""

__version__ = "0.1.0"

from hierens.adaptive import Adaptive, Step
from hierens.calibration import calibrate
from hierens.cutting import CutError, CutPoint, cut_points
from hierens.ensemble import HierarchicalEnsemble, hierensify
from hierens.exits import MultiExit, multi_exit
from hierens.fusing import FusedEnsemble
from hierens.hub import from_pretrained
from hierens.tree import Tree

__all__ = [
    "Adaptive",
    "CutError",
    "CutPoint",
    "FusedEnsemble",
    "HierarchicalEnsemble",
    "MultiExit",
    "Step",
    "Tree",
    "calibrate",
    "cut_points",
    "from_pretrained",
    "hierensify",
    "multi_exit",
]
