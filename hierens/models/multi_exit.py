"""Multi-exit networks: a backbone that also answers at cuts on the way (IMTA, arXiv 1908.06294; AEP, arXiv 2301.12168).

A chain of blocks with an exit behind each: the last is the backbone's own head, the others get small ones. Depth b runs
the network up to exit b. By itself each exit's answer stands alone; with weights, those so far make up an ensemble.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hierens.branches.fuse import fold_where_traced
from hierens.core.adaptive import statistics_once
from hierens.core.equilibrium import scaled
from hierens.core.macs import count_macs
from hierens.core.model_info import ModelInfo
from hierens.core.modes import ordinary_tensors
from hierens.core.predictions import PredictionWeights
from hierens.core.protocol import Step
from hierens.core.values import is_empty, select_samples
from hierens.cutting.cut import cut
from hierens.models.exit_weights import ExitWeights, prior
from hierens.models.heads import Embedding, Exit, HeadKind, OwnExit, early_exits
from hierens.models.pruning import Pruning, WeightedExits, prune

__all__ = ["MultiExit", "multi_exit"]


class MultiExit(WeightedExits):
    """A network with several exits; to policies, metrics, the trainer and the Hub what a hierarchical ensemble is.

    Made by `multi_exit`. Its leaves are its exits: depth b, the first b + 1 exits, 0 being the first.

    Attributes:
        levels: the blocks of the backbone, in sequence.
        exits: the heads, in order; the last is the backbone's own unless it was cut off.
        embeddings: what every exit but the first takes from the one before; empty without collaboration.
        weighting: the weights of the ensemble; None if each exit answers alone.
        positions: the block behind which each exit stands.
        gradient_equilibrium: whether each block gets the mean, not the sum, of the gradients of the exits behind it.
    """

    architecture = "multi_exit"
    unit: ClassVar[str] = "exits"

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        exits: Sequence[Exit],
        info: ModelInfo,
        *,
        embeddings: Sequence[Embedding] = (),
        weighting: ExitWeights | None = None,
    ) -> None:
        """Put together a chain.

        Args:
            blocks: in sequence.
            exits: one per block.
            info: of the backbone or of another model; its `model_args` say how the exits are made again.
            embeddings: one for every exit but the first, for collaboration.
            weighting: the weights of the ensemble of exits.
        """
        super().__init__(info)
        self.positions = tuple(range(len(exits)))
        self.levels, self.exits = nn.ModuleList(blocks), nn.ModuleList(exits)
        self.embeddings, self.weighting = nn.ModuleList(embeddings), weighting
        self._name_classifiers()

    def _name_classifiers(self) -> None:
        """Tell timm which layers depend on the number of classes."""
        names = [
            f"exits.{index}.classifier{'.' + name if name else ''}"
            for index, exit in enumerate(self.exits)
            for name in (exit.names if isinstance(exit, OwnExit) else ("",))
        ]
        names += [
            f"embeddings.{index}.{name}" for index in range(len(self.embeddings)) for name in ("embed.0", "classifier")
        ]
        self.pretrained_cfg["classifier"] = names[0] if len(names) == 1 else tuple(names)

    @property
    def collaborate(self) -> bool:
        """Whether an exit also sees what the one before said."""
        return len(self.embeddings) > 0

    @property
    def weights(self) -> Tensor | None:
        """Weights of the ensemble's exits, (exits,), with a sum of 1; None if each answers alone."""
        return None if self.weighting is None else self.weighting()

    @property
    def prediction_weights(self) -> PredictionWeights:
        """Depth b is exit b alone, or the weighted mean of the logits of exits 0 to b."""
        sizes = tuple(range(1, len(self.exits) + 1))
        return PredictionWeights(sizes, self.weights, num_exits=len(sizes) if self.weighting is None else 0)

    # --- the path of a batch ----------------------------------------------------------------------------------------

    def forward(self, x: Tensor, depth: int | None = None, leaves: int | None = None, reduce: bool = True) -> Tensor:
        """What the network says at an exit; nothing behind it is run.

        Args:
            x: images (N, C, H, W).
            depth: the exit, from 0; the last by default.
            leaves: exits to run, in place of a depth: depth + 1.
            reduce: False returns each exit's logits, what the objectives take.

        Returns:
            (N, classes), or (N, exits, classes) if not `reduce`.

        Raises:
            ValueError: depth or leaves out of range, or images of another shape than the model takes.
        """
        count = self.leaves_at(depth, leaves)
        value: Any = self._prepared(x)
        if is_empty(x):
            return self._no_logits(x, count, reduce)
        answers: list[Tensor] = []
        for index in range(count):
            value, logits = self._next(index, value, answers[-1] if answers else None, count - index)
            answers.append(logits)
        if reduce and self.weighting is None:
            return answers[-1]
        logits = torch.stack(answers, 1)  # (N, exits, classes)
        return self._together(logits) if reduce else logits

    def _next(self, index: int, value: Any, before: Tensor | None, remaining: int = 1) -> tuple[Any, Tensor]:
        """From one exit to the next: what goes on from there, and its logits.

        Args:
            index: the exit.
            value: what the blocks so far handed on.
            before: the logits of the exit before.
            remaining: exits from this one to the last that is run.
        """
        for level in self._blocks_before(index):
            value = self._run(level, value)
        seen = value
        if self.gradient_equilibrium and remaining > 1:
            seen, value = scaled(value, 1 / remaining), scaled(value, (remaining - 1) / remaining)
        logits = self.exits[index](seen)
        if before is not None and self.collaborate:
            logits = logits + self.embeddings[index - 1](before)
        return value, logits

    def _blocks_before(self, index: int) -> nn.ModuleList:
        """The blocks between the exit before and this one."""
        start = self.positions[index - 1] + 1 if index else 0
        return self.levels[start : self.positions[index] + 1]

    def _run(self, level: nn.Module, value: Any) -> Any:
        inputs = value if isinstance(value, tuple) else (value,)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(level, *inputs, use_reentrant=False, context_fn=statistics_once(level))
        return level(*inputs)

    def _together(self, logits: Tensor) -> Tensor:
        """The ensemble's logits (N, classes) from those of the first exits, (N, exits, classes)."""
        return self.prediction_weights.of_first(logits.shape[1])(logits)[:, 0]

    def anytime(self, x: Tensor) -> Generator[Step, Tensor | None, None]:
        """Predictions exit by exit; every block is run once.

        Images that are done can leave on the way: `walk.send(kept)` goes on with those of the last step's rows that are
        named, indices (K,) in ascending order, and returns the next step, of K images.

        Args:
            x: images (N, C, H, W).

        Yields:
            After each exit what `forward(x, leaves=step.leaves)` returns.
        """
        x = self._prepared(x)
        return self._walk(x) if len(x) else self._walk_of_none(x)

    @torch.no_grad()
    def _walk(self, x: Tensor) -> Generator[Step, Tensor | None, None]:
        value: Any = x
        size = tuple(x.shape[1:])
        answers = x.new_empty(len(x), 0, self.num_classes)
        logits = None
        for index in range(self.leaves):
            value, logits = self._next(index, value, logits)
            answers = torch.cat([answers, logits[:, None]], 1)
            kept = yield Step(index + 1, self._together(answers), self.cost(index + 1, size), logits)
            if kept is not None:
                value, logits, answers = select_samples(value, kept, len(answers)), logits[kept], answers[kept]

    # --- fewer exits, more collaboration ----------------------------------------------------------------------------

    def at_depth(self, depth: int | None = None, *, leaves: int | None = None) -> MultiExit:
        """A model of its own that ends at an exit: without the blocks and exits behind it."""
        return self.keep_exits(range(self.leaves_at(depth, leaves)))

    @ordinary_tensors
    def keep_exits(self, exits: Iterable[int]) -> MultiExit:
        """A model of its own with some of the exits, and no blocks behind the last of them; weights keep their ratios.

        Raises:
            ValueError: no exit, one that is not there, or one whose answer another that is kept wants to see.
        """
        kept = sorted(set(exits))
        if not kept or not set(kept) <= set(range(self.leaves)):
            raise ValueError(f"exits must be some of 0 to {self.leaves - 1}, got {kept}.")
        if self.collaborate and kept != list(range(len(kept))):
            raise ValueError("exits that collaborate need all before them: keep the first few, without a gap.")
        other = copy.deepcopy(self)
        other.positions = tuple(self.positions[exit] for exit in kept)
        other.levels = other.levels[: other.positions[-1] + 1]
        other.exits = nn.ModuleList(other.exits[exit] for exit in kept)
        other.embeddings = other.embeddings[: len(kept) - 1]
        if other.weighting is not None:
            other.weighting.keep(kept)
        other._macs = {}
        other._name_classifiers()
        return other

    def prune(
        self, tolerance: float = 0.01, batches: Iterable[tuple[Tensor, Tensor]] | None = None
    ) -> Pruning[MultiExit]:
        """The ensemble without exits that hardly count: see `hierens.models.pruning.prune`."""
        return prune(self, tolerance, batches)

    @ordinary_tensors
    def with_collaboration(self) -> MultiExit:
        """A model of its own whose exits also see what the one before said; exact at first.

        For training in two stages, as the authors do: gradient equilibrium first, collaboration and distillation then.

        Raises:
            ValueError: they do already, or there is a single exit.
        """
        if self.collaborate or self.leaves == 1:
            raise ValueError("collaboration takes two exits or more, and is added once.")
        other = copy.deepcopy(self)
        like = next(self.parameters())
        made = nn.ModuleList(Embedding(self.num_classes) for _ in range(self.leaves - 1))
        other.embeddings = made.to(like.device, like.dtype).train(self.training)
        other._model_args["collaborate"] = True
        other._macs = {}
        other._name_classifiers()
        return other

    def fold_norms(self) -> MultiExit:
        """See `Adaptive.fold_norms`."""
        self.levels = nn.ModuleList(fold_where_traced(level) for level in self.levels)
        return self

    # --- cost -------------------------------------------------------------------------------------------------------

    def exit_macs(self, size: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """MACs from every exit to the next for one image (C, H, W): the blocks between, its head and its embedding."""
        return self._counted(size, lambda size: count_macs(self, size, MultiExit._exit_by_exit))

    def _exit_by_exit(self, value: Any) -> Iterator[Tensor]:
        logits = None
        for index in range(self.leaves):
            value, logits = self._next(index, value, logits)
            yield logits

    def cost(self, leaves: int | None = None, size: tuple[int, ...] | None = None) -> int:
        """Multiply-accumulates up to an exit, with the heads on the way, for one image (C, H, W)."""
        return sum(self.exit_macs(size)[: self.leaves if leaves is None else leaves])

    def parameter_counts(self) -> tuple[int, ...]:
        """Parameters that each depth reads."""
        counts, total = [], 0
        for index, exit in enumerate(self.exits):
            modules = [*self._blocks_before(index), exit, *self.embeddings[index - 1 : index]]
            learned = self.weighting is not None and self.weighting.learn
            total += sum(p.numel() for module in modules for p in module.parameters()) + learned
            counts.append(total)
        return tuple(counts)

    # --- a timm model to timm's tools -------------------------------------------------------------------------------

    def forward_features(self, x: Tensor, depth: int | None = None) -> Any:
        """What the blocks up to an exit hand on; for the last, by default, the backbone's `forward_features`."""
        value: Any = self._prepared(x)
        for level in self.levels[: self.positions[self.leaves_at(depth) - 1] + 1]:
            value = self._run(level, value)
        return value

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """From the last `forward_features` to the last exit's own logits, or with `pre_logits` to pooled features.

        Raises:
            ValueError: that exit was cut off, or answers with others.
        """
        last = self.exits[-1]
        if not isinstance(last, OwnExit) or self.collaborate or self.weighting is not None:
            raise ValueError("forward_head is that of the backbone, and here other exits have a say: call the model.")
        return last.head(x) if pre_logits else last(x)

    def get_classifier(self) -> Any:
        """The last exit's linear layer; a tuple if it has several."""
        last = self.exits[-1]
        if not isinstance(last, OwnExit):
            return last.classifier
        modules = tuple(last.classifier.get_submodule(name) for name in last.names)
        return modules[0] if len(modules) == 1 else modules

    @ordinary_tensors
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifiers for every exit, and new embeddings.

        Raises:
            ValueError: no classes, a change of pooling, or a classifier other than a linear layer.
        """
        if num_classes < 1 or global_pool is not None:
            raise ValueError("exits need a class at least, and their pooling is set when they are made.")
        like = next(self.parameters())
        for exit in self.exits:
            reset: Callable[[int], None] = exit.reset  # type: ignore[assignment]
            reset(num_classes)
        fresh = nn.ModuleList(Embedding(num_classes) for _ in self.embeddings)
        self.embeddings = fresh.to(like.device, like.dtype).train(self.training)
        self._count_classes(num_classes)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the backbone wants spared from weight decay, and the ensemble's weights."""
        names = {name for name, _ in self.named_parameters()}
        spared = {
            name for name in names if name.startswith("levels.") and name.split(".", 2)[2] in self._no_weight_decay
        }
        return spared | (names & {"weighting.logits"})

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Timm's layer groups, for layer-wise learning rates: a group per block, the heads last."""
        return {"stem": r"^levels\.0\.", "blocks": r"^levels\.(\d+)\."}

    # --- saving -----------------------------------------------------------------------------------------------------

    def arguments(self) -> dict[str, Any]:
        """What the entry point `multi_exit` needs to make the model again."""
        return {**super().arguments(), "kept": list(self.positions)}

    def backbone_parts(self) -> Iterator[nn.Module]:
        """The blocks and the backbone's own head."""
        yield from self.levels
        if isinstance(last := self.exits[-1], OwnExit):
            yield from (last.head, last.classifier)


@ordinary_tensors
def multi_exit(
    backbone: nn.Module,
    exits: int = 4,
    *,
    at: Sequence[str] | None = None,
    head: HeadKind = "pool",
    collaborate: bool = False,
    weights: str | Sequence[float] | None = None,
    learn_weights: bool = False,
    num_classes: int | None = None,
) -> MultiExit:
    """Give a timm model exits on the way; the last one is its own head, so the full network answers as before.

    Args:
        backbone: any block-structured timm classification model; it is left as it is.
        exits: how many, after equal shares of the work.
        at: names of modules before which there shall be an exit, in place of `exits`; one more stands at the end.
        head: of the early exits: `pool` (global pooling and a linear layer, for any features) or `conv` (two
            convolutions before that, as MSDNet; for maps).
        collaborate: each exit also sees an embedding of the logits of the one before (IMTA).
        weights: those of an ensemble of the exits so far (AEP), by a name of `hierens.models.exit_weights.prior` or a
            number per exit; by default each exit answers alone.
        learn_weights: train the weights, beginning with `weights`, or with uniform ones.
        num_classes: of new classifiers; by default the backbone's own are kept.

    Raises:
        ValueError: a backbone that cannot be cut as asked (`CutError`), features that a head cannot read, or arguments
            out of range.

    Examples:
        >>> import timm, torch, hierens
        >>> model = hierens.multi_exit(timm.create_model("resnet10t", num_classes=10), exits=3)
        >>> model(torch.randn(1, 3, 64, 64), depth=0).shape
        torch.Size([1, 10])
    """
    backbone = copy.deepcopy(backbone)
    if num_classes is not None and num_classes != backbone.num_classes:
        reset: Callable[[int], None] = backbone.reset_classifier  # type: ignore[assignment]
        reset(num_classes)
    cutting = cut(backbone, exits, at, single=True)
    early = early_exits(head, backbone, cutting.blocks)
    features = int(getattr(backbone, "head_hidden_size", backbone.num_features))  # type: ignore[arg-type]
    own = OwnExit(cutting.head, cutting.classifier, cutting.classifier_names, features)
    heads: list[Exit] = [*early, own]
    if learn_weights and weights is None:
        weights = "uniform"
    own_weights = None if weights is None else list(prior(weights, len(heads)))
    info = ModelInfo.of_backbone(backbone, cutting.at, cutting.classifier_names, "levels.0.")
    info.model_args.update(head=head, collaborate=collaborate, weights=own_weights, learn_weights=learn_weights)
    like = next(backbone.parameters())
    model = MultiExit(
        cutting.blocks,
        heads,
        info,
        embeddings=[Embedding(info.num_classes).to(like.device, like.dtype) for _ in heads[1:]] if collaborate else [],
        weighting=None if own_weights is None else ExitWeights(own_weights, learn_weights).to(like.device, like.dtype),
    )
    return model.train(backbone.training)
