"""The recipes of the compared data sets, and the rows of the comparisons.

Every row of a table is the recipe of a data set with some fields changed. Network family, epochs, optimiser,
augmentation and training images are the same for all rows of a data set. Most data sets have the rows of the paper's
comparison (`ROWS`); fine-tuning has its own rows (`FINE_TUNED`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hierens.training.config import DataConfig, ModelConfig, Run, TeacherConfig, TrainConfig
from hierens.training.presets import PRESETS

LABELS, DISTILLED = "independent", "independent+hierarchical_codistillation"
HIERARCHICAL_DISTILLED = "hierarchical+hierarchical_codistillation"
BASE_WIDTH = 24
SINGLE_WIDTHS = (BASE_WIDTH, 28, 36, 50)  # their MACs are close to those of the tree at its four depths
WIDE_EXITS = 40  # channels of a network whose exits cover the range of the tree's MACs
ENSEMBLE_SEEDS = tuple(range(8))

# SGD with the sum of eight losses needs hundreds of epochs for the accuracy of ten epochs of AdamW. float32, so that
# records of different machines have the same precision: bfloat16 is 1.3 times as fast on CPUs that support it, and 10
# times slower on CPUs with AVX2 only.
_TRAINING = TrainConfig(
    epochs=16,
    optimizer="adamw",
    lr=4e-3,
    weight_decay=0.02,
    warmup_epochs=1,
    val_batch_size=500,
    val_epochs=16,
    cpu=True,
)


def _network(width: int) -> dict[str, Any]:
    return {"channels": [width, 2 * width, 4 * width], "stem_stride": 2}


_MODEL = ModelConfig(backbone="resnet8_cifar", backbone_args=_network(BASE_WIDTH), blocks=4)
RECIPES = {
    "cifar100": Run(
        DataConfig(
            val_split="test",
            input_size=(3, 32, 32),
            augment="crop_flip",
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            crop_pct=1.0,
            workers=0,
        ),
        _MODEL,
        _TRAINING,
    ),
    "cifar10": Run(
        DataConfig(
            val_split="test",
            input_size=(3, 32, 32),
            augment="crop_flip",
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.247, 0.2435, 0.2616),
            crop_pct=1.0,
            workers=0,
        ),
        _MODEL,
        _TRAINING,
    ),
    "fashion_mnist": Run(
        DataConfig(
            dataset="fashion_mnist",
            input_size=(1, 28, 28),
            augment="crop_flip",
            pad=0,
            mean=(0.286,),
            std=(0.353,),
            crop_pct=1.0,
            workers=0,
        ),
        _MODEL,
        dataclasses.replace(_TRAINING, epochs=6, val_epochs=6, warmup_epochs=0),
    ),
    # The preset `finetune` for few images and one core: smaller batches, fewer epochs, no averaged weights.
    # Settings and thresholds are chosen on validation images; test images are used for evaluation only.
    "clothing": Run(
        dataclasses.replace(
            PRESETS["finetune"].data,
            input_size=(3, 128, 128),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            crop_pct=0.8888,  # of 144 pixels, the short side of the photographs, so nothing is resized
            workers=0,
        ),
        ModelConfig(backbone="tf_efficientnet_lite0", pretrained=True, drop_path=0.1, blocks=3),
        dataclasses.replace(
            PRESETS["finetune"].train,
            epochs=6,
            batch_size=32,
            ema_decay=None,
            symmetry_noise=0.1,  # the best value in docs/results/warm_start.md
            checkpoint_steps=48,
            keep_checkpoints=1,
            keep_best=False,
            cpu=True,
        ),
    ),
}
"""recipes by data set"""

TEST_SPLITS = {"clothing": "test"}
"""test splits of data sets that have one; elsewhere the validation images are the test images"""

_EXITS: dict[str, Any] = {"method": "multi_exit", "exits": 4, "head": "conv", "objective": LABELS}
_EQUILIBRIUM: dict[str, Any] = {"gradient_equilibrium": True}
_COLLABORATION: dict[str, Any] = {"collaborate": True}
# In the first epoch the teacher is untrained, so the first epoch uses labels only.
_ONE_FOR_ALL: dict[str, Any] = {
    "objective": "one_for_all",
    "alpha": 0.9,
    "temperature": 3.0,
    "alpha_warmup_epochs": 1,
}
_MEAN_OVER_CLASSES = {**_ONE_FOR_ALL, "mean_over_classes": True}
_SECOND_STAGE: dict[str, Any] = {
    **_EXITS,
    **_EQUILIBRIUM,
    **_COLLABORATION,
    **_MEAN_OVER_CLASSES,
    "alpha_warmup_epochs": 0,
    "new_classifiers": True,
    "classifiers_only": True,
}
_MSDNET: dict[str, Any] = {
    "method": "multi_exit",
    "backbone": "msdnet_cifar_lin_5",
    "backbone_args": {},
    "objective": LABELS,
}
_ENSEMBLE_OF_EXITS: dict[str, Any] = {**_EXITS, "objective": "independent+ensemble"}
_LEARNED: dict[str, Any] = {"learn_weights": True}


@dataclass(frozen=True)
class Row:
    """One row of a comparison.

    Attributes:
        title: title in tables.
        changes: fields of the model and training configuration that differ from the recipe.
        seeds: seeds of its runs.
        two_views: whether the halves of the tree receive different augmentations of an image.
        start: row whose trained model of the same seed is the start and the frozen teacher.
    """

    title: str
    changes: dict[str, Any]
    seeds: tuple[int, ...] = field(default=(0, 1, 2))
    two_views: bool = False
    start: str = ""


def _single(width: int) -> Row:
    changes = {"branching": (1, 1, 1, 1), "objective": LABELS, "backbone_args": _network(width)}
    seeds = ENSEMBLE_SEEDS if width == BASE_WIDTH else (0, 1, 2)
    return Row(f"single network, {width} channels", changes, seeds)


_SIGNS: dict[str, Any] = {"members": ("rank1",), "symmetry_signs": True}


def _light(title: str, **changes: Any) -> Row:
    return Row(f"tree, {title}", {"objective": HIERARCHICAL_DISTILLED, **changes})


def _weighted(weights: str, **changes: Any) -> dict[str, Any]:
    return {**_ENSEMBLE_OF_EXITS, "exit_weights": weights, **changes}


ROWS: dict[str, Row] = {
    # Table 1 of the HNE paper
    "tree-labels": Row("tree, L_I", {"objective": LABELS}),
    "tree-hierarchical": Row("tree, L_H", {"objective": "hierarchical"}, ENSEMBLE_SEEDS),
    "tree-both-labelled": Row("tree, L_I + L_H", {"objective": "independent+hierarchical"}),
    "tree-distilled": Row("tree, L_I + L_HD", {"objective": DISTILLED}, ENSEMBLE_SEEDS),
    # what a user would pick instead
    **{f"single-{width}": _single(width) for width in SINGLE_WIDTHS},
    "multi-branch": Row("multi-branch, L_I + L_HD", {"objective": DISTILLED, "branching": (1, 1, 8, 1)}),
    "tree-plain-distillation": Row("tree, L_I + L_D", {"objective": "independent+codistillation"}),
    "exits": Row("exits", _EXITS),
    "exits-equilibrium": Row("exits, equilibrium", {**_EXITS, **_EQUILIBRIUM}),
    "exits-ensemble": Row("ensemble of exits, learned weights", _weighted("uniform", **_LEARNED)),
    "exits-wide": Row(f"exits, {WIDE_EXITS} channels", {**_EXITS, "backbone_args": _network(WIDE_EXITS)}),
    "tree-with-exits": Row("tree with exits", {"method": "hne_exits", "head": "conv", "objective": DISTILLED}),
    "independent": Row("independent networks, L_I + L_HD", {"objective": DISTILLED, "branching": (8, 1, 1, 1)}, (0,)),
    "tree-plain-distillation-small-alpha": Row(
        "tree, L_I + L_D, alpha 0.1", {"objective": "independent+codistillation", "alpha": 0.1}
    ),
    # candidates for a better objective
    "tempered-students": Row("students tempered", {"objective": DISTILLED, "temper_students": True}),
    "tempered-students-alpha-0.25": Row(
        "students tempered, alpha 0.25", {"objective": DISTILLED, "temper_students": True, "alpha": 0.25}
    ),
    "label-smoothing": Row("label smoothing of L_I", {"objective": DISTILLED, "label_smoothing": 0.1}),
    "averaged-teacher": Row(
        "teacher of averaged weights", {"objective": DISTILLED, "ema_teacher": True, "ema_decay": 0.998}
    ),
    "all-three-labelled": Row(
        "L_I + L_H + L_HD", {"objective": "independent+hierarchical+hierarchical_codistillation"}
    ),
    "hierarchical-distilled": Row("tree, L_H + L_HD", {"objective": HIERARCHICAL_DISTILLED}, ENSEMBLE_SEEDS),
    "hierarchical-distilled-tempered": Row(
        "L_H + L_HD, students tempered, alpha 0.25",
        {"objective": HIERARCHICAL_DISTILLED, "temper_students": True, "alpha": 0.25},
    ),
    "hierarchical-stepwise": Row("L_H + stepwise", {"objective": "hierarchical+stepwise_codistillation"}),
    "hierarchical-first-depths": Row(
        "L_H, depths weighted 4, 2, 1, 1", {"objective": "hierarchical", "depth_weights": (4.0, 2.0, 1.0, 1.0)}
    ),
    "all-three-tempered": Row(
        "L_I + L_H + L_HD, students tempered, alpha 0.25",
        {
            "objective": "independent+hierarchical+hierarchical_codistillation",
            "temper_students": True,
            "alpha": 0.25,
        },
    ),
    "two-views": Row("an augmentation for each half of the tree", {"objective": DISTILLED}, two_views=True),
    "stepwise-too": Row("L_I + L_HD + stepwise", {"objective": f"{DISTILLED}+stepwise_codistillation", "alpha": 0.25}),
    "stepwise-too-alpha-0.5": Row(
        "L_I + L_HD + stepwise, alpha 0.5", {"objective": f"{DISTILLED}+stepwise_codistillation"}
    ),
    "standardised-logits": Row(
        "logits standardised", {"objective": DISTILLED, "temper_students": True, "standardize_logits": True}
    ),
    # trees whose branches share the weights of dense layers
    "light-rank1": _light("rank1", members=("rank1",)),
    "light-rank1-signs": _light("rank1, random signs", **_SIGNS),
    "light-early": _light("rank1, last level full", members=("full", "rank1", "rank1", "full")),
    "light-late": _light("last level rank1", members=("full", "full", "full", "rank1")),
    "light-lora-4": _light("lora, rank 4", members=("lora",), rank=4),
    "light-lora-8": _light("lora, rank 8", members=("lora",), rank=8),
    "light-late-lora-8": _light("last level lora, rank 8", members=("full", "full", "full", "lora"), rank=8),
    "light-rank1-labels": _light("rank1, random signs, L_I", **_SIGNS, objective=LABELS),
    "light-rank1-distilled": _light("rank1, random signs, L_I + L_HD", **_SIGNS, objective=DISTILLED),
    "light-lora-8-labels": _light("lora, rank 8, L_I", members=("lora",), rank=8, objective=LABELS),
    # further ways to train exits (BoostNet, IMTA), and to weigh their ensemble (AEP)
    "exits-boosted": Row("exits, boosted", {**_EXITS, "boosted": True}),
    "exits-collaboration": Row("exits, collaboration", {**_EXITS, **_COLLABORATION}),
    "exits-one-for-all": Row("exits, one-for-all", {**_EXITS, **_ONE_FOR_ALL}),
    "exits-imta": Row("exits, all three of IMTA", {**_EXITS, **_EQUILIBRIUM, **_COLLABORATION, **_ONE_FOR_ALL}),
    "exits-one-for-all-mean": Row("exits, one-for-all (mean)", {**_EXITS, **_MEAN_OVER_CLASSES}),
    "exits-imta-mean": Row(
        "exits, all three of IMTA (mean)",
        {**_EXITS, **_EQUILIBRIUM, **_COLLABORATION, **_MEAN_OVER_CLASSES},
    ),
    "exits-one-for-all-averaged": Row(
        "exits, one-for-all (mean), averaged teacher",
        {**_EXITS, **_MEAN_OVER_CLASSES, "ema_teacher": True, "ema_decay": 0.998},
    ),
    # as the presets imta-stage1 and imta-stage2: equilibrium first, then new classifiers on the frozen features
    "exits-two-stages": Row("exits, two stages of IMTA", _SECOND_STAGE, start="exits-equilibrium"),
    "msdnet": Row("MSDNet, 5 blocks", _MSDNET),
    "msdnet-imta-mean": Row(
        "MSDNet, all three of IMTA (mean)",
        {**_MSDNET, **_EQUILIBRIUM, **_COLLABORATION, **_MEAN_OVER_CLASSES},
    ),
    "exits-uniform": Row("ensemble of exits, uniform", _weighted("uniform")),
    "exits-linear-rising": Row("ensemble of exits, linear, rising", _weighted("linear_rising")),
    "exits-geometric-rising": Row("ensemble of exits, geometric, rising", _weighted("geometric_rising")),
    "exits-geometric-falling": Row("ensemble of exits, geometric, falling", _weighted("geometric_falling")),
    "exits-hybrid": Row("ensemble of exits, hybrid", _weighted("geometric_rising", **_LEARNED)),
}
"""rows by the name of their folder under docs/results/runs"""


FINE_TUNED: dict[str, Row] = {
    "tree": Row("tree, L_H + L_HD", {"objective": HIERARCHICAL_DISTILLED}),
    "single": Row("backbone alone", {"branching": (1, 1, 1), "objective": LABELS}),
}
"""rows that start from pretrained weights"""


LIGHT = (
    *("light-rank1", "light-early", "light-late", "light-lora-4", "light-rank1-signs", "light-lora-8"),
    *("light-late-lora-8", "light-rank1-labels", "light-rank1-distilled", "light-lora-8-labels"),
)
"""rows of trees whose branches share weights"""

GROUPS: tuple[tuple[str, ...], ...] = (
    ("tree-labels", "tree-distilled", "tree-hierarchical", "tree-both-labelled"),
    tuple(f"single-{width}" for width in SINGLE_WIDTHS),
    ("multi-branch", "tree-plain-distillation"),
    ("exits", "exits-equilibrium", "exits-ensemble", "exits-wide", "tree-with-exits"),
    (
        *("tempered-students-alpha-0.25", "tempered-students", "stepwise-too", "standardised-logits"),
        *("label-smoothing", "averaged-teacher", "all-three-labelled", "stepwise-too-alpha-0.5"),
        *("hierarchical-distilled", "hierarchical-distilled-tempered", "hierarchical-stepwise"),
        *("hierarchical-first-depths", "all-three-tempered", "two-views"),
    ),
    ("independent", "tree-plain-distillation-small-alpha"),
    ("exits-collaboration", "exits-one-for-all", "exits-imta", "exits-one-for-all-mean", "exits-imta-mean"),
    ("exits-boosted", "exits-one-for-all-averaged", "exits-two-stages"),
    ("msdnet", "msdnet-imta-mean"),
    LIGHT,
    ("exits-uniform", "exits-linear-rising", "exits-geometric-rising", "exits-geometric-falling", "exits-hybrid"),
)
"""rows in the order of training: within a group, all rows with the first seed, then with the next"""


@dataclass(frozen=True)
class Study:
    """The comparison on one data set.

    Attributes:
        rows: rows by the name of their folder.
        groups: rows in the order of training: within a group, all rows with the first seed, then with the next.
        single: the row whose networks, one per seed, form the deep ensembles.
        sizes: sizes of the deep ensembles; the largest has all seeds of `single`.
    """

    rows: Mapping[str, Row]
    groups: tuple[tuple[str, ...], ...]
    single: str
    sizes: tuple[int, ...]


def study(data: str) -> Study:
    """The comparison on a data set."""
    if data == "clothing":
        return Study(FINE_TUNED, (("tree", "single"),), "single", (1, 3))
    return Study(ROWS, GROUPS, f"single-{BASE_WIDTH}", (1, 2, 4, 8))


def configured(data: str, row: str, seed: int, data_dir: str, output_dir: str, weights: str = "") -> Run:
    """The configuration of a run: the recipe of the data set with the changes of a row.

    Args:
        data: name of the recipe.
        row: name of the row.
        seed: random seed.
        data_dir: folder of the images.
        output_dir: folder for checkpoints, logs and the model, ROW/SEED in the folder of all runs.
        weights: file of pretrained weights, for recipes that use them; timm's weights by default.
    """
    own = {"seed": seed, "output_dir": output_dir, **({"weights": weights} if weights else {})}
    start = study(data).rows[row].start
    if start:
        own["start"] = str(Path(output_dir).parent.parent / start / f"{seed}" / "model")
    run = changed(RECIPES[data], study(data).rows[row].changes | own)
    if start:
        run = dataclasses.replace(run, teacher=TeacherConfig(teacher=run.model.start, teacher_of_exits=True))
    return dataclasses.replace(run, data=dataclasses.replace(run.data, data_dir=data_dir))


def changed(run: Run, changes: Mapping[str, Any]) -> Run:
    """A configuration with other values of fields of its model and training configuration."""
    of_model = {f.name for f in dataclasses.fields(ModelConfig)} & changes.keys()
    training = {key: value for key, value in changes.items() if key not in of_model}
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, **{key: changes[key] for key in of_model}),
        train=dataclasses.replace(run.train, **training),
    )


def queue(data: str, only: Collection[str] = (), seeds: Collection[int] = ()) -> Iterator[tuple[str, int]]:
    """Rows and seeds of a data set in the order of training: all of them, or the selected ones."""
    compared = study(data)
    for group in compared.groups:
        for seed in ENSEMBLE_SEEDS:
            for row in group:
                if seed in compared.rows[row].seeds and (not only or row in only) and (not seeds or seed in seeds):
                    yield row, seed
