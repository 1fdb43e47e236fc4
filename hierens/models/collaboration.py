"""Inline subnetwork collaboration of exits (IMTA, arXiv 1908.06294)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hierens.models.heads import BackboneExit

_WIDTH = 128  # features of an embedding, as in the authors' code for CIFAR


class Embedding(nn.Module):
    """The contribution of an exit's logits to the next exit's (inline subnetwork collaboration, arXiv 1908.06294, 3.2).

    The logits are embedded by a linear layer, batch norm and ReLU. The paper concatenates the embedding with the
    features that the next classifier reads. A linear classifier of both is the sum of a classifier of each, and is
    computed as this sum here. Any head can therefore collaborate, also the backbone's own. The classifier of the
    embedding starts at zero, so outputs do not change at first.

    Args:
        num_classes: number of classes.
        width: features of the embedding.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(num_classes, width), nn.BatchNorm1d(width), nn.ReLU())
        self.classifier = nn.Linear(width, num_classes, bias=False)
        nn.init.zeros_(self.classifier.weight)

    def forward(self, logits: Tensor) -> Tensor:
        """The term (N, classes) that is added to an exit's logits, from the logits (N, classes) of the exit before."""
        added: Tensor = self.classifier(self.embed(logits))
        return added


def new_embeddings(exits: Sequence[nn.Module], num_classes: int, like: Tensor) -> nn.ModuleList:
    """An embedding for every exit but the first, on the device and in the data type of a tensor.

    If the exits are the backbone's own, the embedding has the width of the features that the exit's linear layer reads,
    as in the code of IMTA's authors for MSDNet.
    """
    own = isinstance(exits[0], BackboneExit)
    made = [Embedding(num_classes, int(exit.channels) if own else _WIDTH) for exit in exits[1:]]  # type: ignore[arg-type]
    return nn.ModuleList(made).to(like.device, like.dtype)
