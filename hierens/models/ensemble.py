"""The hierarchical neural ensemble: a tree of branches whose leaves are the networks of an ensemble."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from hierens.branches.fuse import LayersSeen, attach_activations, fused_levels, refuse, with_separate_activations
from hierens.branches.fused_layers import attached_activations_are_safe, separate_activations
from hierens.branches.fused_level import FusedLevel
from hierens.branches.level import Level
from hierens.core.modes import ordinary_tensors
from hierens.core.predictions import Combination, combine_embeddings
from hierens.core.protocol import Step
from hierens.models.growing import grow
from hierens.models.leaf_order import Reordering, reorder
from hierens.models.level_tree import LevelTree
from hierens.models.symmetry import break_symmetry, symmetric
from hierens.models.tuning import Tuning, tune


class HierarchicalEnsemble(LevelTree):
    """A tree of branches (Ruiz & Verbeek, arXiv 2003.01474): every leaf is a network, and any first leaves can be run.

    `hierensify` creates it. timm's tools can be used with it as with its backbone: data configuration, optimiser
    factories, EMA, classifier resets and feature extraction. Its attributes are those of `LevelTree`.
    """

    architecture = "hne"

    def embed(
        self, x: Tensor, depth: int | None = None, leaves: int | None = None, combine: Combination = "normalized"
    ) -> Tensor:
        """Embeddings of images, by a model without classifier.

        Args:
            x: images (N, C, H, W).
            depth: as for `forward`.
            leaves: likewise.
            combine: `normalized`, the mean of the leaves' embeddings scaled to unit length; `mean`, the output of
                `forward`; or `concat`, which has other dimensions at every depth.

        Returns:
            (N, features), or (N, leaves * features) for `concat`.

        Raises:
            ValueError: the model has a classifier, its outputs are not vectors, or an argument is out of range.
        """
        if self.num_classes:
            raise ValueError(f"the outputs are logits of {self.num_classes} classes: call reset_classifier(0) first.")
        return combine_embeddings(self(x, depth, leaves, reduce=False), combine)

    def grow(self) -> HierarchicalEnsemble:
        """A new model with one more level and equal outputs: see `hierens.models.growing.grow`."""
        return grow(self)

    @ordinary_tensors
    def fuse(self) -> FusedEnsemble:
        """A copy for inference: faster, equal up to rounding.

        In every block with a grouped form, batch norms are folded into the convolutions before them, standardised
        weights are computed once, and activations become part of the convolution's kernel. Feature maps are stored in
        channels-last order. Other blocks are not changed.

        Returns:
            A model in evaluation mode that cannot be trained or saved.

        Raises:
            ValueError: a layer has a hook, which would no longer be called.
        """
        *levels, head, classifier = fused_levels(self.all_levels())
        fused: FusedEnsemble = self.with_levels(self.tree, levels, head, classifier, FusedEnsemble)
        attach_activations(fused)
        fused.watch_layers()
        return fused.eval().requires_grad_(False)

    def fold_norms(self) -> FusedEnsemble:
        """See `fuse`."""
        return self.fuse()

    def tune(
        self,
        example: Tensor,
        depths: Sequence[int] | None = None,
        batch_sizes: Sequence[int] | None = None,
        file: str | Path | None = None,
    ) -> Tuning:
        """Measure the fastest way to run each level on this machine, and use it: see `hierens.models.tuning.tune`."""
        return tune(self, example, depths, batch_sizes, file)

    def drop_leaves(self, count: int) -> Self:
        """A new model without the last `count` leaves: `at_depth(leaves=...)`, counted from the end.

        Raises:
            ValueError: the count is negative, or no leaf would be left.
        """
        if not 0 <= count < self.tree.leaves:
            raise ValueError(f"from 0 to {self.tree.leaves - 1} leaves can be dropped, got {count}.")
        return self.at_depth(leaves=self.tree.leaves - count)

    def reorder(self, loader: Iterable[tuple[Tensor, Tensor]]) -> Reordering:
        """Permute siblings in place for the best accuracy at small depths: see `hierens.models.leaf_order.reorder`."""
        return reorder(self, loader)

    def break_symmetry(self, noise: float = 0.01, seed: int = 0, signs: bool = False) -> None:
        """Make copied siblings differ. Without this, they would get the same gradients in every step of training.

        Gaussian noise is added to every branch that equals an earlier one of its level: `noise` times the standard
        deviation of each of its weights. Biases, norms and buffers are not changed. After `init="copy"`, depth 0 thus
        remains exactly the network that was copied, and after `grow`, every first child equals its parent.

        The scales of `rank1` members are multiplied by 1 + noise * n, with normal n; with `signs` by -1 or 1, as
        BatchEnsemble does, which is for training from scratch: pretrained weights would become useless.
        """
        break_symmetry(self._plain_levels(), noise, seed, signs)

    @property
    def symmetric(self) -> bool:
        """Whether any two leaves have equal weights in all levels, as after `init="copy"` or `grow`.

        Light members have them also if branches of one level have equal factors, as after `init="reinit"`.
        """
        return symmetric(self.tree, self._plain_levels())

    def _plain_levels(self) -> list[Level]:
        """All levels that are not fused."""
        return [level for level in self.all_levels() if isinstance(level, Level)]


class FusedEnsemble(HierarchicalEnsemble):
    """The result of `fuse`: an ensemble for inference on any device, whose sub-trees can be run, and which compiles.

    Its weights may be loaded (also with `assign=True`), written in place, cast and moved at any time, and threads may
    share it. The reordered weights are updated; they take about the memory of the weights once more. Layers whose
    weights have no room run another kernel, so repeated calls are equal up to rounding. Only writes through `.data` are
    not detected, because torch does not record them. Hooks of the model itself and of its levels are called. Gradients
    flow to images, and to weights that require them.

    The layers inside its blocks run without calling their modules. A hook on such a layer, or a layer that was replaced
    (by another one, a quantised one, an adapter, a parametrised one), therefore raises an error at the next call.
    """

    _layers: LayersSeen

    def watch_layers(self) -> None:
        """Record the current layers, with which later calls are compared."""
        self._layers = LayersSeen(level for level in self.all_levels() if isinstance(level, FusedLevel))

    def with_levels(self, *args: Any, **kwargs: Any) -> Any:
        """See `LevelTree.with_levels`."""
        other = super().with_levels(*args, **kwargs)
        if isinstance(other, FusedEnsemble):
            other.watch_layers()
        return other

    def __getstate__(self) -> dict[str, Any]:
        """The state without the record of layers, which is made again."""
        return {name: value for name, value in super().__getstate__().items() if name != "_layers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.watch_layers()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As for every module. Weights that are not finite give the outputs of the unfused model, more slowly."""
        found = super().load_state_dict(*args, **kwargs)
        attach_activations(self)
        return found

    def train(self, mode: bool = True) -> FusedEnsemble:
        """Remain in evaluation mode.

        Raises:
            ValueError: training mode was requested.
        """
        if mode:
            refuse("trained")
        super().train(False)
        return self

    def forward(self, x: Tensor, depth: int | None = None, leaves: int | None = None, reduce: bool = True) -> Tensor:
        """As `LevelTree.forward`. Images that are not finite give the outputs of the unfused model, more slowly."""
        if attached_activations_are_safe(x):
            return super().forward(x, depth, leaves, reduce)
        with separate_activations():
            return super().forward(x, depth, leaves, reduce)

    def forward_features(self, x: Tensor, depth: int | None = None, leaves: int | None = None) -> Tensor:
        """As `LevelTree.forward_features`; for images that are not finite, as `forward`."""
        with contextlib.nullcontext() if attached_activations_are_safe(x) else separate_activations():
            return super().forward_features(x, depth, leaves)

    def anytime(self, x: Tensor) -> Generator[Step, Tensor | None, None]:
        """As `LevelTree.anytime`; for images that are not finite, as `forward`."""
        walk = super().anytime(x)
        return walk if attached_activations_are_safe(x) else with_separate_activations(walk)

    def _prepared(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self._layers.check()
        return super()._prepared(x).contiguous(memory_format=torch.channels_last)

    def fold_norms(self) -> FusedEnsemble:
        """The model itself, which is fused already."""
        return self

    def fuse(self) -> NoReturn:
        """Raise a ValueError."""
        refuse("fused once more")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise a ValueError: save the model that was fused instead."""
        refuse("saved")

    def grow(self) -> NoReturn:
        """Raise a ValueError."""
        refuse("grown")

    def reorder(self, loader: Any) -> NoReturn:
        """Raise a ValueError."""
        refuse("reordered")

    def reset_classifier(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise a ValueError."""
        refuse("given another classifier")

    def break_symmetry(self, noise: float = 0.01, seed: int = 0, signs: bool = False) -> NoReturn:
        """Raise a ValueError."""
        refuse("changed")
