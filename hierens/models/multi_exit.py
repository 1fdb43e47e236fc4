"""`MultiExit`: a chain of blocks with a classifier after each (IMTA, arXiv 1908.06294; AEP, arXiv 2301.12168).

The last exit is the backbone's own head, the others are small heads. Depth b runs the network up to exit b. Its
prediction is that of exit b alone, or with weights that of the ensemble of all exits so far.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hierens.branches.fuse import fold_where_traced
from hierens.core.adaptive_base import linear_names, mean_of_heads
from hierens.core.block_values import is_empty, select_samples
from hierens.core.equilibrium import scaled
from hierens.core.macs import count_macs
from hierens.core.model_info import ModelInfo
from hierens.core.modes import ordinary_tensors
from hierens.core.predictions import PredictionWeights
from hierens.core.protocol import Step
from hierens.models.block_chain import BlockChain
from hierens.models.collaboration import new_embeddings
from hierens.models.exit_weights import ExitWeights
from hierens.models.heads import Exit, OwnExit
from hierens.models.pruning import Pruning, prune


class MultiExit(BlockChain):
    """A network with several exits. Policies, metrics, the trainer and the Hub use it like a hierarchical ensemble.

    `multi_exit` creates it. Its leaves are its exits: depth b evaluates exits 0 to b.

    Attributes:
        levels: the blocks of the backbone, in order.
        exits: the heads, in order; the last is the backbone's own, unless it was removed.
        embeddings: for every exit but the first, the embedding of the logits of the exit before; empty without
            collaboration.
        weighting: the weights of the ensemble of exits; None if the exits are not combined.
        gradient_equilibrium: whether each block gets the mean, not the sum, of the gradients of the exits after it.
        boosted: whether the logits of the exit before are added to those of each exit, without a gradient to them.
    """

    architecture = "multi_exit"
    unit: ClassVar[str] = "exits"

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        exits: Sequence[Exit],
        info: ModelInfo,
        *,
        embeddings: Iterable[nn.Module] = (),
        weighting: ExitWeights | None = None,
        boosted: bool = False,
    ) -> None:
        """Create a network.

        Args:
            blocks: in order.
            exits: one per block.
            info: the record of the backbone or of another model; its `model_args` describe the exits.
            embeddings: one for every exit but the first, for collaboration.
            weighting: the weights of the ensemble of exits.
            boosted: see above.
        """
        super().__init__(info)
        self.positions = tuple(range(len(exits)))
        self.levels, self.exits = nn.ModuleList(blocks), nn.ModuleList(exits)
        self.embeddings, self.weighting, self.boosted = nn.ModuleList(embeddings), weighting, boosted
        self._name_classifiers()

    def _name_classifiers(self) -> None:
        """Record for timm which layers depend on the number of classes."""
        names = [
            f"exits.{index}.classifier{'.' + name if name else ''}"
            for index, exit in enumerate(self.exits)
            for name in linear_names(exit.classifier, exit.names)  # type: ignore[arg-type]
        ]
        names += [
            f"embeddings.{index}.{name}" for index in range(len(self.embeddings)) for name in ("embed.0", "classifier")
        ]
        self.pretrained_cfg["classifier"] = names[0] if len(names) == 1 else tuple(names)

    @property
    def collaborate(self) -> bool:
        """Whether each exit also reads the logits of the exit before."""
        return len(self.embeddings) > 0

    @property
    def weights(self) -> Tensor | None:
        """Weights of the exits, (exits,), with a sum of 1; None if the exits are not combined."""
        return None if self.weighting is None else self.weighting()

    @property
    def prediction_weights(self) -> PredictionWeights:
        """The logits of depth b are those of exit b alone, or the weighted mean of those of exits 0 to b."""
        sizes = tuple(range(1, len(self.exits) + 1))
        if self.weighting is None:
            return PredictionWeights(sizes, num_exits=len(sizes))
        return PredictionWeights(sizes, self.weighting(), average=self.weighting.average)

    # --- forward pass -----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, depth: int | None = None, leaves: int | None = None, reduce: bool = True) -> Tensor:
        """Logits at an exit; nothing after it is run.

        Args:
            x: images (N, C, H, W).
            depth: the exit, from 0; the last by default.
            leaves: number of exits, instead of a depth: depth + 1.
            reduce: False returns the logits of each exit, the input of the objectives.

        Returns:
            (N, classes), or (N, exits, classes) if not `reduce`.

        Raises:
            ValueError: depth or leaves out of range, or images of another shape than the model takes.
        """
        count = self.leaves_at(depth, leaves)
        value: Any = self._prepared(x)
        if is_empty(x):
            return self._no_logits(x, count, reduce)
        outputs: list[Tensor] = []
        for index in range(count):
            value, logits = self._next(index, value, outputs[-1] if outputs else None, count - index)
            outputs.append(logits)
        if reduce and self.weighting is None:
            return outputs[-1]
        logits = torch.stack(outputs, 1)  # (N, exits, classes)
        return self._combined(logits) if reduce else logits

    def _next(self, index: int, value: Any, before: Tensor | None, remaining: int = 1) -> tuple[Any, Tensor]:
        """Run the blocks up to an exit and the exit; returns the input of the next block and the logits.

        Args:
            index: the exit.
            value: the output of the last block that was run.
            before: the logits of the exit before.
            remaining: number of exits that are evaluated from this one on.
        """
        for level in self._blocks_before(index):
            value = self._run_block(level, value)
        features = value
        if self.gradient_equilibrium and remaining > 1:
            features = self._scaled(index, value, 1 / remaining)
            value = self._scaled(index, value, (remaining - 1) / remaining)
        logits = self.exits[index](features)
        if before is not None and self.collaborate:
            logits = logits + self.embeddings[index - 1](before)
        if before is not None and self.boosted:
            logits = logits + before.detach()
        return value, logits

    def _scaled(self, index: int, value: Any, factor: float) -> Any:
        """The output of a block, with scaled gradients of what the exit after it reads, or of all that crosses."""
        part = getattr(self.exits[index], "part", None)
        if self.gradient_equilibrium == "all" or part is None or not isinstance(value, tuple):
            return scaled(value, factor)
        read = part % len(value)
        return tuple(scaled(own, factor) if place == read else own for place, own in enumerate(value))

    def _combined(self, logits: Tensor) -> Tensor:
        """The prediction (N, classes) from the logits of the first exits, (N, exits, classes)."""
        return self.prediction_weights.of_first(logits.shape[1])(logits)[:, 0]

    def anytime(self, x: Tensor) -> Generator[Step, Tensor | None, None]:
        """Predictions exit by exit; every block is run once.

        Images can leave on the way: `walk.send(kept)` continues with the rows of the last step whose indices (K,) are
        given in ascending order, and returns the next step, for K images.

        Args:
            x: images (N, C, H, W).

        Yields:
            After each exit a prediction equal to `forward(x, leaves=step.leaves)`.
        """
        x = self._prepared(x)
        return self._walk_of_none(x) if is_empty(x) else self._walk(x)

    @torch.no_grad()
    def _walk(self, x: Tensor) -> Generator[Step, Tensor | None, None]:
        value: Any = x
        size = tuple(x.shape[1:])
        outputs = x.new_empty(x.shape[0], 0, self.num_classes)  # len(x) would fix the batch size of an exported graph
        logits = None
        for index in range(self.leaves):
            value, logits = self._next(index, value, logits)
            outputs = torch.cat([outputs, logits[:, None]], 1)
            kept = yield Step(index + 1, self._combined(outputs), self.cost(index + 1, size), logits)
            if kept is not None:
                value, logits, outputs = select_samples(value, kept, len(outputs)), logits[kept], outputs[kept]

    # --- fewer exits, collaboration ---------------------------------------------------------------------------------

    def at_depth(self, depth: int | None = None, *, leaves: int | None = None) -> MultiExit:
        """A new model that ends at an exit, without the blocks and exits after it."""
        return self.keep_exits(range(self.leaves_at(depth, leaves)))

    @ordinary_tensors
    def keep_exits(self, exits: Iterable[int]) -> MultiExit:
        """A new model with some of the exits, and without blocks after the last of them. Weights keep their ratios.

        Raises:
            ValueError: no exit, an unknown exit, or a gap between exits that are kept and read the exit before.
        """
        kept = sorted(set(exits))
        if not kept or not set(kept) <= set(range(self.leaves)):
            raise ValueError(f"exits must be some of 0 to {self.leaves - 1}, got {kept}.")
        if (self.collaborate or self.boosted) and kept != list(range(len(kept))):
            kind = "collaborate" if self.collaborate else "are boosted"
            raise ValueError(f"exits that {kind} need all exits before them: keep the first ones, without a gap.")
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
        """The ensemble without exits of small weight: see `hierens.models.pruning.prune`."""
        return prune(self, tolerance, batches)

    @ordinary_tensors
    def with_collaboration(self) -> MultiExit:
        """A new model in which each exit also reads the logits of the exit before; at first, its outputs are equal.

        For training in two stages, as by IMTA's authors: first gradient equilibrium, then collaboration and
        distillation.

        Raises:
            ValueError: the exits collaborate already, or there is only one exit.
        """
        if self.collaborate or self.leaves == 1:
            raise ValueError("collaboration needs two exits or more, and can be added once.")
        other = copy.deepcopy(self)
        like = next(self.parameters())
        other.embeddings = new_embeddings(list(self.exits), self.num_classes, like).train(self.training)
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
        """MACs of each exit for one image (C, H, W): the blocks since the exit before, its head and its embedding."""
        return self._counted(size, lambda size: count_macs(self, size, MultiExit._exit_by_exit))

    def _exit_by_exit(self, value: Any) -> Iterator[Tensor]:
        logits = None
        for index in range(self.leaves):
            value, logits = self._next(index, value, logits)
            yield logits

    def cost(self, leaves: int | None = None, size: tuple[int, ...] | None = None) -> int:
        """Multiply-accumulates up to an exit, including all heads so far, for one image (C, H, W)."""
        return sum(self.exit_macs(size)[: self.leaves if leaves is None else leaves])

    def parameter_counts(self) -> tuple[int, ...]:
        """Number of parameters of each depth."""
        counts, total = [], 0
        for index, exit in enumerate(self.exits):
            modules = [*self._blocks_before(index), exit, *self.embeddings[index - 1 : index]]
            learned = self.weighting is not None and self.weighting.learn
            total += sum(p.numel() for module in modules for p in module.parameters()) + learned
            counts.append(total)
        return tuple(counts)

    # --- timm's interface -------------------------------------------------------------------------------------------

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the last exit from its `forward_features`, or with `pre_logits` pooled features.

        Raises:
            ValueError: that exit was removed, or is combined with others.
        """
        last = self.exits[-1]
        if not isinstance(last, OwnExit) or self.collaborate or self.boosted or self.weighting is not None:
            raise ValueError("forward_head is the backbone's, and here other exits contribute: call the model instead.")
        return mean_of_heads(last.head(x)) if pre_logits else last(x)

    def get_classifier(self) -> Any:
        """The last exit's linear layer; a tuple if it has several."""
        last: Any = self.exits[-1]
        modules = tuple(last.classifier.get_submodule(name) for name in last.names)
        return modules[0] if len(modules) == 1 else modules

    @ordinary_tensors
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifiers of all exits and the embeddings by new ones.

        Raises:
            ValueError: no classes, a change of pooling, or a classifier other than a linear layer.
        """
        if num_classes < 1 or global_pool is not None:
            raise ValueError("exits need one class or more, and their pooling is fixed: call multi_exit again.")
        like = next(self.parameters())
        for exit in self.exits:
            reset: Callable[[int], None] = exit.reset  # type: ignore[assignment]
            reset(num_classes)
        if self.collaborate:
            self.embeddings = new_embeddings(list(self.exits), num_classes, like).train(self.training)
        self._count_classes(num_classes)

    def _drop_heads(self) -> None:
        self.exits, self.embeddings = nn.ModuleList(nn.Identity() for _ in self.exits), nn.ModuleList()
        self.weighting = None

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: those that the backbone names, and the exits' weights."""
        names = {name for name, _ in self.named_parameters()}
        undecayed = {
            name for name in names if name.startswith("levels.") and name.split(".", 2)[2] in self._no_weight_decay
        }
        return undecayed | (names & {"weighting.logits"})

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Timm's layer groups, for layer-wise learning rates: a group per block, the heads last."""
        return {"stem": r"^levels\.0\.", "blocks": r"^levels\.(\d+)\."}

    # --- saving -----------------------------------------------------------------------------------------------------

    def arguments(self) -> dict[str, Any]:
        """The arguments with which the entry point `multi_exit` rebuilds the model."""
        return {**super().arguments(), "kept": list(self.positions)}

    def backbone_parts(self) -> Iterator[nn.Module]:
        """The blocks and the backbone's own head."""
        yield from self.levels
        if isinstance(last := self.exits[-1], OwnExit):
            yield from (last.head, last.classifier)
