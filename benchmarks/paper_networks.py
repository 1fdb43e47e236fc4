"""Computes the costs of the paper's networks; writes docs/results/paper_networks.md.

python benchmarks/paper_networks.py
"""

from __future__ import annotations

from pathlib import Path

import timm

import hierens
from hierens.core.tree import nested_sizes
from hierens.evaluation.profiling import millions, table

PAGE = Path(__file__).parents[1] / "docs" / "results" / "paper_networks.md"
INTRODUCTION = """# The paper's networks

Multiply-accumulates per image and parameters of the networks of Ruiz & Verbeek
([arXiv 2003.01474](https://arxiv.org/abs/2003.01474), version 2), computed by `python benchmarks/paper_networks.py`.
The paper has no table of costs; its statements about costs are quoted below each table. It calls a multiply-accumulate
a FLOP. The [entry points](../reference/architectures.md) document the details that its tables of layers leave open, and
the choices made here.
"""
NETWORKS = [
    (
        "hne_mobilenetv2_075",
        {"num_classes": 1000},
        "ImageNet: 224 pixels, 1000 classes (Table 3).",
        'Section 4.3: "a similar inference cost range than our HNE based on MobileNetv2 architecture '
        '(~ 150 - 600M FLOPs)".',
    ),
    (
        "hne_resnet50_cifar",
        {"num_classes": 100},
        "CIFAR-100: 32 pixels, 100 classes (Table 2).",
        'Section 4.3: "We report HNE result for ensembles of sizes up to eight, in order to provide a maximum FLOP '
        'count similar to the compared methods (<250M)".',
    ),
    (
        "hne_resnet50_cifar_small",
        {"num_classes": 100},
        "CIFAR-100: 32 pixels, 100 classes (section 4.2).",
        'Section 4.2: "a version where for all layers we divided the number of feature channels by two".',
    ),
]
SHARING = """
## Sharing schemes

The paper's figure 5 compares sharing schemes of the same blocks: independent networks, one backbone for the first three
blocks and 16 branches of the last two, and the tree. Each is `timm.create_model("hne_resnet50_cifar", branching=...)`.
"""
SCHEMES = {
    "independent networks": (16, 1, 1, 1, 1),
    "multi-branch": (1, 1, 1, 16, 1),
    "tree": (1, 2, 2, 2, 2),
}


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for name, arguments, images, said in NETWORKS:
        model = timm.create_model(name, seed=0, **arguments)
        parts.append(f"\n## {name}\n\n{images}\n\n{costs(model)}\n\n{said}\n")
    tree = timm.create_model("hne_resnet50_cifar", seed=0, num_classes=100)
    blocks = tree.branch_macs()
    sizes = nested_sizes(16)
    rows = [
        (scheme, *(millions(hierens.Tree(branching).cost(blocks, leaves)) for leaves in sizes))
        for scheme, branching in SCHEMES.items()
    ]
    header = ("MACs by networks run", *map(str, sizes))
    return "".join([*parts, f"{SHARING}\n{table(header, rows)}\n"])


def costs(model: hierens.HierarchicalEnsemble) -> str:
    """A table of costs, with a row per depth."""
    columns = zip(nested_sizes(model.tree.leaves), model.macs(), model.parameter_counts(), strict=True)
    rows = [
        (str(depth), str(leaves), millions(macs), millions(parameters))
        for depth, (leaves, macs, parameters) in enumerate(columns)
    ]
    return table(("depth", "networks", "MACs", "parameters"), rows)


if __name__ == "__main__":
    main()
