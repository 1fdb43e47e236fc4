"""Hierarchical neural ensembles of any timm backbone: one checkpoint, every inference budget."""

__version__ = "0.1.0"

from hierens.calibration import calibrate
from hierens.cutting import CutError, CutPoint, cut_points
from hierens.ensemble import HierarchicalEnsemble, Step, hierensify
from hierens.fusing import FusedEnsemble
from hierens.hub import from_pretrained
from hierens.tree import Tree

__all__ = [
    "CutError",
    "CutPoint",
    "FusedEnsemble",
    "HierarchicalEnsemble",
    "Step",
    "Tree",
    "calibrate",
    "cut_points",
    "from_pretrained",
    "hierensify",
]
