"""Model cards: a model's description, costs and results per depth, and usage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict, Unpack

from huggingface_hub import EvalResult, ModelCardData

from hierens.core.adaptive_base import AdaptiveBase
from hierens.core.labels import label_names
from hierens.evaluation.plotting import plot_accuracy
from hierens.evaluation.profiling import millions, table

ACCURACY, PICTURE = "accuracy (%)", "accuracy.png"
COLUMNS = {"accuracy": ACCURACY, "nll": "NLL", "ece": "ECE"}
"""columns of a card's table, by the fields of an evaluation"""

_KINDS = {  # titles of model cards, and the beginnings of their first sentences
    "hne": (
        "Hierarchical neural ensemble",
        "A tree of {leaves} networks that share their first layers ([Ruiz & Verbeek](https://arxiv.org/abs/2003.01474)),",
    ),
    "hne_exits": (
        "Hierarchical neural ensemble with exits",
        "A tree of networks that share their first layers ([Ruiz & Verbeek](https://arxiv.org/abs/2003.01474)), with "
        "exits on the way to the first ([Li et al.](https://arxiv.org/abs/1908.06294)), {leaves} in all,",
    ),
    "multi_exit": (
        "Multi-exit network",
        "A network with {leaves} exits ([Li et al.](https://arxiv.org/abs/1908.06294)),",
    ),
}


class About(TypedDict, total=False):
    """Information on a model that its author gives.

    Attributes:
        license: such as `apache-2.0`.
        base_model: the repository with the weights that training started from.
        datasets: names on the Hub; the results were measured on the first.
        label_names: of the classes, in order; by default those of the model.
    """

    license: str | None
    base_model: str | None
    datasets: Sequence[str]
    label_names: Sequence[str] | None


def model_card(
    model: AdaptiveBase,
    results: Mapping[str, Sequence[float]] | None = None,
    name: str = "user/name",
    picture: bool = False,
    **about: Unpack[About],
) -> str:
    """The text of a model card, with the metadata that the Hub shows and searches.

    Args:
        model: the model.
        results: further columns of the table, a value per depth; the Hub shows the column `accuracy (%)` beside the
            card if `datasets` is given.
        name: the repository or folder to load it from.
        picture: whether `accuracy.png` is beside the card.
        about: see `About`.

    Raises:
        ValueError: results without a value per depth, or another number of class names than of classes.
    """
    args, size = model.arguments(), tuple(model.pretrained_cfg["input_size"])
    columns, labels = dict(results or {}), list(about.get("label_names") or label_names(model) or [])
    if wrong := [title for title, values in columns.items() if len(values) != model.depths]:
        raise ValueError(f"results need a value per depth ({model.depths}): {', '.join(wrong)} do not have this.")
    if labels and len(labels) != model.num_classes:
        raise ValueError(f"label_names has {len(labels)} names, and the model has {model.num_classes} classes.")
    title, summary = _KINDS[model.architecture]
    megabytes = sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e6
    height_width = "x".join(map(str, size[1:]))
    data = _metadata(model, columns.get(ACCURACY), name, about)
    curve = f"\n![Accuracy against multiply-accumulates, a point per depth]({PICTURE})\n" if picture else ""
    listed = 0 < len(labels) <= 100 and labels != [str(number) for number in range(len(labels))]
    outputs = f"{model.num_classes} classes" if model.num_classes else "No classes: the outputs are embeddings"
    name_of, shown = ("logits", "logits.argmax(-1)") if model.num_classes else ("embeddings", "logits.shape")
    classes = f"\nClasses, in order: {', '.join(labels)}.\n" if listed else ""
    channels = "1 channel" if size[0] == 1 else f"{size[0]} channels"
    return f"""---
{data.to_yaml()}
---

# {title} of {args["backbone"]}

{summary.format(leaves=model.leaves)}
made with hierens from timm's `{args["backbone"]}`. One checkpoint serves every budget below: `depth` selects how many
{model.unit} are evaluated. {outputs}; costs are for images of {channels} and
{height_width} pixels. The weights take {megabytes:.1f} MB in memory.

{_depths(model, size, columns)}
{curve}{classes}
```python
import hierens

model = hierens.from_pretrained("{name}")  # or a directory with this model's files
{name_of} = model(images, depth=1)  # images: (N, {size[0]}, {size[1]}, {size[2]})
for step in model.anytime(images):  # or step by step, for as long as there is time
    print(step.leaves, step.macs, step.{shown})
```
"""


def _depths(model: AdaptiveBase, size: tuple[int, ...], columns: Mapping[str, Sequence[float]]) -> str:
    """The table with a row per depth."""
    costs = zip(model.sizes, model.macs(size), model.parameter_counts(), strict=True)
    rows = [
        (f"{depth}", f"{leaves}", millions(macs), millions(count), *(f"{v[depth]:.2f}" for v in columns.values()))
        for depth, (leaves, macs, count) in enumerate(costs)
    ]
    return table(("depth", model.unit, "MACs", "parameters", *columns), rows)


def draw_accuracy(model: AdaptiveBase, results: Mapping[str, Sequence[float]], directory: Path) -> bool:
    """Draw the accuracies of the depths beside a card, if there are any and matplotlib is installed; whether it did."""
    if ACCURACY not in results:
        return False
    title, _ = _KINDS[model.architecture]
    curves = {title.lower(): (model.macs(), results[ACCURACY])}
    try:
        plot_accuracy(curves, directory / PICTURE)
    except ValueError:
        return False
    return True


def _metadata(model: AdaptiveBase, accuracy: Sequence[float] | None, name: str, about: About) -> ModelCardData:
    datasets = list(about.get("datasets") or [])
    measured = [
        EvalResult(
            task_type="image-classification",
            dataset_type=datasets[0],
            dataset_name=datasets[0],
            metric_type="accuracy",
            metric_name=f"accuracy (%), {model.unit}: {leaves}",
            metric_value=round(float(value), 2),
            metric_args={"depth": depth},
        )
        for depth, (leaves, value) in enumerate(zip(model.sizes, accuracy or (), strict=False))
        if datasets
    ]
    task = "image-classification" if model.num_classes else "image-feature-extraction"
    return ModelCardData(
        library_name="timm",
        tags=[task, "timm", "hierens", "anytime-inference", model.architecture.replace("_", "-")],
        pipeline_tag=task,
        license=about.get("license"),
        base_model=about.get("base_model"),
        datasets=datasets or None,
        model_name=name if measured else None,
        eval_results=measured or None,
    )
