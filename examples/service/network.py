"""The model of a replica, and its inputs."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import timm.data
import torch

import hierens
from hierens.evaluation.uncertainty import mutual_information
from hierens.inference.policies import FixedDepth, LatencyObjective, Load, Policy, load_policy
from hierens.models.loading import load_with_policy
from hierens.training.preprocessing import label_names
from service.settings import Settings
from service.uploads import read_image


@dataclass(frozen=True)
class Inputs:
    """Inputs and classes of a model, without its weights."""

    data: dict[str, Any]
    labels: tuple[str, ...]

    @property
    def mode(self) -> Literal["L", "RGB"]:
        """Mode of the model's input images."""
        return "L" if self.data["input_size"][0] == 1 else "RGB"

    @classmethod
    def of(cls, model: Any) -> Inputs:
        """The inputs and classes of a model."""
        names = label_names(model) or range(model.num_classes)
        return cls(timm.data.resolve_model_data_config(model), tuple(str(name) for name in names))

    def prepare(self, files: list[bytes], max_pixels: int) -> np.ndarray:
        """Decode and resize files to bytes (N, C, H, W), a quarter of the size of floats in transfers."""
        images = [self.transform(read_image(file, self.mode, max_pixels)) for file in files]
        return np.stack([np.asarray(image).reshape(self.data["input_size"]) for image in images])

    @cached_property
    def transform(self) -> Any:
        """timm's transform without normalisation."""
        return timm.data.create_transform(**self.data, is_training=False, use_prefetcher=True)

    def normalise(self, images: np.ndarray) -> torch.Tensor:
        """Normalise images (N, C, H, W) in bytes."""
        mean, std = (torch.tensor(self.data[name]).view(-1, 1, 1) for name in ("mean", "std"))
        return (torch.from_numpy(images).float().div(255) - mean) / std


class Network:
    """The model: predicts in batches, at the depth that its policy chooses.

    Raises:
        ValueError: settings do not fit the model, or the model cannot be loaded.
    """

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self.top = settings.top
        model, self.policy = load(settings)
        self.inputs = Inputs.of(model)
        with contextlib.suppress(ValueError):  # a model that cannot be fused runs unfused
            model = model.fuse()
        self.model = model
        for leaves in model.sizes:
            model(torch.zeros(1, *self.inputs.data["input_size"]), leaves=leaves)
        self.images_per_request, self.waiting = 1.0, 0
        if isinstance(self.policy, LatencyObjective):
            logging.basicConfig(format="%(asctime)s %(message)s")
            logging.getLogger("hierens.inference").setLevel(logging.INFO)
            self.policy.learn(model, torch.zeros(1, *self.inputs.data["input_size"]))

    def answer(
        self, requests: list[np.ndarray], observed: list[tuple[int, float | None]], oldest_ms: float
    ) -> list[list[dict[str, Any]]] | list[Exception]:
        """Predict the images (N, C, H, W) of each request in one batch.

        Args:
            requests: images in bytes.
            observed: lengths of the queue, and latencies in milliseconds, since the previous batch.
            oldest_ms: time since the arrival of the oldest request.
        """
        self.images_per_request = sum(map(len, requests)) / len(requests)
        self.waiting = round(observed[-1][0] * self.images_per_request)
        if isinstance(self.policy, Load):
            for queue, latency_ms in observed:
                self.policy.observe(queue, latency_ms)
        elif isinstance(self.policy, LatencyObjective):
            self.policy.observe([latency_ms for _, latency_ms in observed if latency_ms is not None])
            self.policy.batch_size(self.waiting + sum(map(len, requests)), oldest_ms)
        try:
            found = iter(self.run(np.concatenate(requests)))
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return [RuntimeError("the model failed")] * len(requests)
        return [list(itertools.islice(found, len(images))) for images in requests]

    def advice(self) -> tuple[int | None, dict[str, float]]:
        """How many requests the next batch should have at most, if the policy chooses it, and the policy's metrics."""
        if not isinstance(self.policy, LatencyObjective):
            return None, {}
        numbers = self.policy.metrics()
        return max(1, int(numbers["batch"] / self.images_per_request)), numbers

    def shadow(self) -> bool:
        """Compare some earlier images with full depth, if the policy does so and there is time; whether it did."""
        return isinstance(self.policy, LatencyObjective) and self.policy.shadow(self.model, self.waiting) > 0

    @torch.inference_mode()
    def run(self, images: np.ndarray) -> list[dict[str, Any]]:
        """Predict images (N, C, H, W)."""
        x = self.inputs.normalise(images)
        if isinstance(self.policy, Load | FixedDepth):
            fixed = self.policy if isinstance(self.policy, FixedDepth) else FixedDepth(self.policy.depth)
            leaves = self.model.leaves_at(fixed.depth, fixed.leaves)
            leaf_logits = self.model(x, leaves=leaves, reduce=False)
            logits = self.model.prediction_weights.of_first(leaves)(leaf_logits)[:, 0]
            networks, macs = [leaves] * len(x), [self.model.cost(leaves, tuple(x.shape[1:]))] * len(x)
        else:  # other policies return no logits of single networks
            found = self.policy(self.model, x)
            logits, networks, macs = found.logits, found.leaves.tolist(), found.macs.tolist()
            leaf_logits = logits[:, None]
        probability, index = logits.softmax(-1).topk(min(self.top, len(self.inputs.labels)))
        entropy = torch.special.entr(leaf_logits.softmax(-1).mean(1)).sum(-1)
        mutual, sizes = mutual_information(leaf_logits), self.model.sizes
        return [
            {
                "classes": [
                    {"index": i, "name": self.inputs.labels[i], "probability": p}
                    for i, p in zip(index[n].tolist(), probability[n].tolist(), strict=True)
                ],
                "depth": sizes.index(networks[n]) if networks[n] in sizes else None,
                "networks": networks[n],
                "macs": macs[n],
                "uncertainty": {
                    "entropy": entropy[n].item(),
                    "mutual_information": mutual[n].item() if leaf_logits.shape[1] > 1 else None,
                },
            }
            for n in range(len(x))
        ]


def load(settings: Settings) -> tuple[Any, Policy]:
    """The model and the policy of the settings.

    Raises:
        ValueError: the model does not have the depth, or there is no policy.json.
    """
    if settings.policy == "saved":
        model, saved = load_with_policy(settings.model)  # both from the same save
        return model, saved or load_policy(settings.model)
    model = hierens.from_pretrained(settings.model)
    leaves = model.leaves_at(settings.depth)
    if settings.policy == "fixed":
        return model, FixedDepth(leaves=leaves)
    return model, Load(model.sizes.index(leaves), settings.target_ms, queue_high=settings.queue_high)
