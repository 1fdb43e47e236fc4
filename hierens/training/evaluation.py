"""Validation over any number of processes; each image is counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn

from hierens.core.modes import evaluating
from hierens.evaluation.metrics import LeafMetrics, as_record
from hierens.training.sharding import gather


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    channels_last: bool = False,
    after_batch: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Metrics of every depth and every leaf, from one pass over all leaves.

    Args:
        accelerator: gathers over processes.
        model: the ensemble, wrapped or not.
        loader: prepared by the accelerator; images with the target -1 have no class and are not counted.
        channels_last: memory format of the images.
        after_batch: is called after every batch.

    Returns:
        `val_loss`, the mean cross-entropy of the full ensemble in nats, and the fields of
        `hierens.evaluation.metrics.LeafEvaluation`.
    """
    # Processes may have different numbers of batches, so they communicate only before and after the loop.
    module = accelerator.unwrap_model(model)
    gather(module)
    broadcast(list(module.buffers()))  # running statistics may differ; those of the main process are saved
    metrics = LeafMetrics(module.prediction_weights.cpu())
    with evaluating(module):
        for images, targets in loader:
            if channels_last:
                images = images.to(memory_format=torch.channels_last)
            with accelerator.autocast():
                leaf_logits = module(images, reduce=False)
            metrics.update(leaf_logits, targets)
            if after_batch is not None:
                after_batch()
    evaluation = LeafMetrics.merged(gather_object([metrics])).compute()
    return {"val_loss": evaluation.nll[-1], **as_record(evaluation)}
