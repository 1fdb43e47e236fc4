"""Feature maps at the ends of a network's stages, as timm's models return them; for detection, segmentation, retrieval.

The stages are the backbone's own, found when it is cut (`hierens.cutting.stages`). Where they cannot be found, the
outputs of the levels are the stages.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from timm.layers import Format, nchw_to
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from hierens.branches.activations import Activations
from hierens.branches.executor import AnyLevel
from hierens.branches.intermediates import Nodes, tapped_block, unmerged
from hierens.branches.level import Level
from hierens.core.adaptive_base import AdaptiveBase
from hierens.core.modes import ordinary_tensors
from hierens.core.timm_info import example_input
from hierens.cutting.block import Block
from hierens.cutting.stages import Stage
from hierens.models.heads import layouts


class FeatureMaps(AdaptiveBase):
    """A network that returns the feature maps of its stages."""

    _pruned = False

    @abstractmethod
    def _forward_stages(self, x: Tensor, leaves: int, nodes: Nodes) -> Iterator[tuple[Activations, list[int]]]:
        """The output of each level, with the values of these nodes as `taps`, and the leaves below each branch."""

    @abstractmethod
    def _drop_heads(self) -> None:
        """Replace heads, classifiers and exits by the identity."""

    def _levels_run(self, leaves: int) -> int:
        """The number of levels that the first leaves need."""
        return len(self.levels)

    def _as_features(self, outputs: Activations) -> Any:
        """The output of the last level as `forward_features` returns it."""
        return outputs.stacked()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages: the backbone's own, or if its maps are not computed in the blocks, the outputs of the levels."""
        if not self._stages:
            self._stages = _levels_as_stages(self)
        return tuple(stage for stage in self._stages if stage.level < len(self.levels))

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Descriptions of the maps, as timm has them: `num_chs`, `reduction` (image pixels per pixel) and `module`."""
        return [dict(stage.info) for stage in self.stages]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NHWC", "NCL", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        *,
        depth: int | None = None,
        leaves: int | None = None,
        reduce: bool = True,
    ) -> Any:
        """Feature maps of the stages: timm's `forward_intermediates`, averaged over the networks of a depth.

        With the backbone's weights in every branch (`init="copy"`), each map equals the backbone's own.

        Args:
            x: images (N, C, H, W).
            indices: maps to return, in the order of the stages: the last ones (an integer), some, or all by default.
            norm: as for the backbone; refused where it would change a map.
            stop_early: do not run levels after the last of these maps.
            output_fmt: order of the dimensions of a map.
            intermediates_only: return only the maps.
            depth: as for `forward`. At an exit only the stages before it are computed and counted.
            leaves: likewise.
            reduce: False returns the map of each network, stacked; networks that share a branch have equal maps.

        Returns:
            The list of maps (N, C, H, W), or (N, networks, C, H, W) if not `reduce`; before it, unless
            `intermediates_only`, the output of the last level that was run, as `forward_features` returns it.

        Raises:
            ValueError: an argument out of range, a norm that belongs to single leaves, or merged layers.
        """
        if output_fmt not in Format.__members__:
            raise ValueError(f"output_fmt must be one of {', '.join(Format.__members__)}, got {output_fmt!r}.")
        count, images = self.leaves_at(depth, leaves), self._prepared(x)
        levels = self._levels_run(count)
        stages = [stage for stage in self.stages if stage.level < levels]
        taken = [stages[index] for index in sorted(set(_taken(len(stages), indices)))]
        if norm and any(stage.normed for stage in taken):
            raise ValueError(
                "norm=True would apply the leaves' last norm to maps of shared branches: call with norm=False, or "
                "forward_features for normalised features of each leaf."
            )
        last = max(stage.level for stage in taken)
        nodes = {level: names for level in range(last + 1) if (names := _nodes_in(level, taken))}
        maps: dict[Stage, Tensor] = {}
        for level, (outputs, below) in zip(range(levels), self._forward_stages(images, count, nodes), strict=False):
            taps = dict(zip(nodes.get(level, ()), outputs.taps, strict=True))
            for stage in taken:
                if stage.level == level:
                    values = taps[stage.node] if stage.node else outputs.listed()
                    own = [nchw_to(stage.to_map(images, value), Format(output_fmt)) for value in values]
                    maps[stage] = _of_networks(own, below, reduce)
            if level == last and (stop_early or self._pruned):
                break
        found = [maps[stage] for stage in taken]
        return found if intermediates_only else (self._as_features(outputs), found)

    @ordinary_tensors
    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove, in place, what the maps of some stages do not need. The model can no longer be saved.

        Args:
            indices: as for `forward_intermediates`.
            prune_norm: not needed, since a last norm that no map needs is always removed.
            prune_head: remove heads, classifiers and exits. The model then returns the features of its last level.

        Returns:
            The indices, counted from 0.
        """
        taken = _taken(len(self.stages), indices)
        kept = [self.stages[index] for index in taken]
        last = max(stage.level for stage in kept)
        for index in range(last, len(self.levels)):
            nodes = _nodes_in(index, kept)
            if index > last or nodes:
                self.levels[index] = _ending_at(self.levels[index], nodes)
        if prune_head:
            self._drop_heads()
            self._count_classes(0)
        self._macs.clear()
        self._pruned = True
        return taken

    def arguments(self) -> dict[str, Any]:
        """See `AdaptiveBase.arguments`.

        Raises:
            ValueError: layers were pruned.
        """
        if self._pruned:
            raise ValueError("a model without all its layers cannot be saved: save it before pruning it to some maps.")
        return super().arguments()


def features_only(model: FeatureMaps, out_indices: int | Sequence[int] | None = None, **kwargs: Any) -> nn.Module:
    """A `FeatureGetterNet` of timm: a module that returns the list of its maps.

    Args:
        model: pruned in place to what the maps need.
        out_indices: the maps, as in timm; by default all, or the last three if all have the same size (as in a ViT).
        kwargs: arguments of `FeatureGetterNet`, such as `output_fmt`.

    Raises:
        ValueError: another `feature_cls`.
    """
    if (kind := kwargs.pop("feature_cls", "getter")) not in ("getter", FeatureGetterNet):
        raise ValueError(f"feature maps are read by timm's FeatureGetterNet: leave out feature_cls={kind!r}.")
    if out_indices is None:
        reductions = [info["reduction"] for info in model.feature_info]
        out_indices = min(3, len(reductions)) if len(set(reductions)) == 1 else len(reductions)
    network = FeatureGetterNet(model, out_indices, **kwargs)
    unneeded = ("num_classes", "classifier", "global_pool")
    network.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in unneeded}
    network.default_cfg, network._traits, network.in_chans = network.pretrained_cfg, model._traits, model.in_chans
    return network


def _taken(total: int, indices: int | Sequence[int] | None) -> list[int]:
    """The indices of stages from 0."""
    try:
        taken: list[int] = feature_take_indices(total, indices)[0]
    except AssertionError:
        raise ValueError(
            f"indices must be a number of last maps up to {total}, or a list from {-total} to {total - 1}, "
            f"got {indices}."
        ) from None
    return taken


def _nodes_in(level: int, stages: Sequence[Stage]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(stage.node for stage in stages if stage.level == level and stage.node))


def _of_networks(maps: list[Tensor], below: list[int], reduce: bool) -> Tensor:
    """The mean over networks, or the map of each, of the maps of branches with so many networks below them."""
    if not reduce:
        return torch.stack([own for own, count in zip(maps, below, strict=True) for _ in range(count)], 1)
    if len(maps) == 1:
        return maps[0]
    return torch.stack([own * (count / sum(below)) for own, count in zip(maps, below, strict=True)]).sum(0)


def _ending_at(part: nn.Module, nodes: tuple[str, ...]) -> nn.Module:
    """A level or block that ends at these nodes; without nodes, one that returns its input."""
    if isinstance(part, Level):
        level = Level(_ending_at(branch, nodes) for branch in part)
        level.executor, level.fallback_reason = part.executor, part.fallback_reason
        return level.train(part.training)
    if not nodes:
        return nn.Identity()
    tapped_block(part, nodes)  # the nodes exist
    assert isinstance(part, Block)
    return part.ending_at(nodes)


def _levels_as_stages(model: AdaptiveBase) -> tuple[Stage, ...]:
    """The outputs of the levels as stages, found by running the first branches; without outputs that are pooled."""
    example = example_input(model, 2)
    blocks = tuple(unmerged(level)[0] if isinstance(level, AnyLevel) else level for level in model.levels)
    stages = []
    for level, (layout, value) in enumerate(layouts(model, blocks)):
        if layout.kind != "NC":
            reduction = round(example.shape[2] / layout.maps(example, value).shape[2])
            info = {"num_chs": layout.channels, "reduction": reduction, "module": f"levels.{level}"}
            stages.append(Stage(info, level, "", layout.maps))
    return tuple(stages)
