"""Prepares Accelerate and a model for training, as a configuration asks."""

from __future__ import annotations

import torch
from accelerate import Accelerator, DataLoaderConfiguration

from hierens.models.adaptive import Adaptive
from hierens.objectives import Objective
from hierens.training.config import TrainConfig
from hierens.training.sharding import fsdp_requested, shard


def create_accelerator(config: TrainConfig) -> tuple[Accelerator, bool]:
    """Accelerate's object for a run, and whether the weights are to be sharded by FSDP.

    Raises:
        ValueError: the configuration cannot be combined with FSDP.
    """
    with fsdp_requested(config) as sharded:
        accelerator = Accelerator(
            cpu=config.cpu,
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.accumulation,
            log_with=list(config.trackers) or None,
            project_dir=config.output_dir,
            step_scheduler_with_optimizer=False,
            dataloader_config=DataLoaderConfiguration(
                split_batches=True, use_seedable_sampler=True, data_seed=config.seed
            ),
        )
    return accelerator, sharded


def prepare_model(model: Adaptive, config: TrainConfig, sharded: bool, device: torch.device) -> list[torch.nn.Module]:
    """Set a model up for training, in place.

    Returns:
        The parts that are frozen when training starts.

    Raises:
        ValueError: the tree has fewer levels than `freeze_levels`, or FSDP is requested for one process.
    """
    if (config.symmetry_noise or config.symmetry_signs) and model.symmetric:
        model.break_symmetry(config.symmetry_noise, config.seed, config.symmetry_signs)
    if config.channels_last and not sharded:  # FSDP needs contiguous weights
        model.to(memory_format=torch.channels_last)
    model.gradient_equilibrium = config.gradient_equilibrium
    model.set_grad_checkpointing(config.grad_checkpointing)
    frozen = frozen_parts(model, config)
    if sharded:
        shard(model, device)
    return frozen


def frozen_parts(model: Adaptive, config: TrainConfig) -> list[torch.nn.Module]:
    """The parts that are frozen when training starts; those that stay frozen get no gradients at all.

    Raises:
        ValueError: the tree has fewer levels.
    """
    if config.classifiers_only:
        classifiers = model.pretrained_cfg["classifier"]
        trained = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith((*trained, "embeddings.", "weighting.")))
        return [part for name, part in model.named_children() if name not in ("embeddings", "weighting")]
    if config.freeze_levels > len(model.levels):
        raise ValueError(f"freeze_levels is {config.freeze_levels}, but the model has {len(model.levels)} levels.")
    levels: list[torch.nn.Module] = list(model.levels)[: config.freeze_levels]
    if config.unfreeze_epoch is None:
        for level in levels:
            level.requires_grad_(False)
    return levels


def check_objective(model: Adaptive, objective: Objective, sharded: bool) -> None:
    """Check that an objective fits the model's prediction weights.

    Raises:
        ValueError: it does not.
    """
    weights = model.prediction_weights
    learned = weights.leaf_weights is not None and weights.leaf_weights.requires_grad
    if learned and not objective.weighs_leaves:
        raise ValueError(
            f"the objective {objective.name!r} gives the exits' weights no gradient: add 'ensemble' or 'hierarchical'."
        )
    if learned and sharded:
        raise ValueError("FSDP shards weights that the loss needs as a whole: leave out learn_weights, or FSDP.")
    objective.check(weights)
