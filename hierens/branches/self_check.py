"""The self-check, which compares the two executors on a block at conversion."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from hierens.branches.activations import Activations
from hierens.branches.executor import Executor
from hierens.branches.level import Level
from hierens.branches.tensors import state_of
from hierens.core.block_values import Value
from hierens.core.errors import first_line
from hierens.core.modes import evaluating, quiet_dropout
from hierens.core.progress import with_progress
from hierens.core.timm_info import example_input

_FLOAT32_FIRST_WEIGHTS = 2_000_000  # in a block with more, float64 is tried only if the executors differ in float32
_FLOAT32_WEIGHTS = 50_000_000  # in a block with more, float64 is not tried: it would need many GB
_COLLECTED_WEIGHTS = 10_000_000  # copies of a block with more are freed at once, which takes a few tenths of a second
_RANDOM_NUMBERS = 65_521  # a prime, so that no two channels get the same values
_CHECK_SIZES = (32, 64, 128)  # pixels: small images suffice, as long as every layer runs


def self_check(block: fx.GraphModule, example: Value, seed: int = 0) -> str:
    """Why the grouped form of a block may not be used; an empty string if it agrees with the loop.

    Three branches with independent weights and inputs run through both executors, in evaluation and in training
    (dropout off), with two batch sizes, with fewer branches than there are and with siblings. Outputs and running
    statistics are compared. As a control, branches must differ from each other. The type is float64, or float32 for
    blocks that require it. Large blocks run in float32, and in float64 only if the executors differ.

    Args:
        block: a block of a cutting; it is not changed.
        example: its input for one image.
        seed: of the random weights and inputs.
    """
    values = example if isinstance(example, tuple) else (example,)
    if not all(isinstance(value, Tensor) and value.ndim > 1 and value.is_floating_point() for value in values):
        return "its inputs include values other than batches of feature maps"
    weights = sum(parameter.numel() for parameter in block.parameters())
    dtypes = (torch.float32, torch.float64) if weights > _FLOAT32_FIRST_WEIGHTS else (torch.float64, torch.float32)
    reason = ""
    for dtype in dtypes[: 1 if weights > _FLOAT32_WEIGHTS else 2]:
        with contextlib.redirect_stderr(io.StringIO()):  # fx prints the code that failed
            found, loop_failed = _disagreement(block, example, dtype, seed)
        if not (loop_failed and reason):
            reason = found
        if weights > _COLLECTED_WEIGHTS:
            gc.collect()  # graphs are reference cycles, which would keep the copies of the block
        if not reason or (dtype is torch.float64 and not loop_failed):
            break
    return reason


def _disagreement(block: fx.GraphModule, example: Value, dtype: torch.dtype, seed: int) -> tuple[str, bool]:
    """How the executors disagree (empty if they agree), and whether the loop itself failed."""
    generator = torch.Generator().manual_seed(seed)
    probe = copy.deepcopy(block)._apply(_with_values).to("cpu", dtype)
    level = Level.of_copies(probe, 3, lambda _: _perturbed(probe, generator))
    statistics = dict(level.named_buffers())
    for training, batch, parents in ((False, 1, (0, 1, 2)), (True, 2, (0, 1)), (False, 2, (0, 0))):
        mode = "training" if training else "evaluation"
        inputs = [_random_like(example, batch, dtype, generator) for _ in range(parents[-1] + 1)]
        nn.ModuleList.train(level, training)
        quiet_dropout(level)
        level.group()
        if level.fallback_reason:
            return level.fallback_reason, False
        before = {name: tensor.clone() for name, tensor in statistics.items()}
        try:
            expected = _run(level, "looped", inputs, parents)
        except Exception as error:
            return f"it fails in {mode}: {first_line(error)}", True
        updated = {name: tensor.clone() for name, tensor in statistics.items()}
        for name, tensor in before.items():
            statistics[name].copy_(tensor)
        try:
            actual = _run(level, "grouped", inputs, parents)
        except Exception as error:
            return f"its grouped form fails in {mode}: {first_line(error)}", False
        if not all(_close(a, b) for a, b in zip(actual, expected, strict=True)):
            return f"its grouped form differs in {mode}", False
        if different := [name for name, tensor in updated.items() if not _close(statistics[name], tensor)]:
            names = dict.fromkeys(name.split(".", 1)[1] for name in different)
            return f"its grouped form computes different statistics in {', '.join(names)}", False
        if len(inputs) > 1 and _same(actual[0], actual[1]):
            return f"branches with different weights and inputs have equal outputs in {mode}: nothing is checked", False
    return "", False


@torch.no_grad()
def _run(level: Level, executor: Executor, inputs: list[Value], parents: Sequence[int]) -> list[Value]:
    level.executor = executor
    with _UnfoldedConvolutions():
        return level(Activations([_copied(value) for value in inputs]), parents).listed()


def _copied(value: Value) -> Value:
    """A copy, which the block may change in place."""
    return value.clone() if isinstance(value, Tensor) else tuple(_copied(part) for part in value)


def _random_like(example: Value, batch: int, dtype: torch.dtype, generator: torch.Generator) -> Value:
    if isinstance(example, tuple):
        return tuple(_random_like(value, batch, dtype, generator) for value in example)
    return torch.randn((batch * example.shape[0], *example.shape[1:]), generator=generator, dtype=dtype, device="cpu")


def _close(a: Value, b: Value) -> bool:
    """Equal up to rounding, relative to the largest value, since the order of sums may differ."""
    if not isinstance(a, Tensor):
        return all(_close(x, y) for x, y in zip(a, b, strict=True))
    if a.shape != b.shape:
        return False
    tolerance = 1e-6 if a.dtype == torch.float64 else 2e-5
    return bool((a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max())


def _same(a: Value, b: Value) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else all(_same(x, y) for x, y in zip(a, b, strict=True))


def _perturbed(block: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Random weights of a branch: none is zero, so that every path of the block has an effect."""
    state, parameters = {}, dict(block.named_parameters())
    normal = torch.randn(_RANDOM_NUMBERS, generator=generator, dtype=torch.float64, device="cpu")
    uniform = torch.rand(_RANDOM_NUMBERS, generator=generator, dtype=torch.float64, device="cpu")
    for name, tensor in state_of(block):
        tensor = tensor.detach().clone()
        if name in parameters:
            tensor.add_(_filled(normal, tensor), alpha=0.1 + 0.5 * tensor.std(correction=0).item())
        elif tensor.is_floating_point():  # running variances stay positive
            noise = _filled(uniform, tensor)
            tensor = tensor * (1 + noise) + 0.1 * noise
        state[name] = tensor
    return state


def _with_values(tensor: Tensor) -> Tensor:
    """The tensor, or one with values for a tensor on the meta device."""
    if not tensor.is_meta:
        return tensor
    if not tensor.is_floating_point():
        return torch.zeros_like(tensor, device="cpu")
    if tensor.ndim < 2:
        return torch.ones_like(tensor, device="cpu")
    return torch.full_like(tensor, 1 / math.sqrt(tensor[0].numel()), device="cpu")


def _filled(drawn: Tensor, like: Tensor) -> Tensor:
    """The random numbers repeated to fill a tensor: drawing all of them would take most of the time."""
    repeats = -(-like.numel() // len(drawn))
    return drawn.to(like.dtype).repeat(repeats)[: like.numel()].view(like.shape)


class _UnfoldedConvolutions(TorchFunctionMode):
    """Computes grouped 2-D convolutions in float64 on unfolded images, since torch runs one group after another.

    A level of a depthwise layer has thousands of groups, which took nine tenths of a conversion's time.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv2d and not kwargs and len(args) == 7 and args[6] > 1:
            x, _, _, _, padding, *_ = args
            if x.dtype is torch.float64 and not isinstance(padding, str):
                return _convolved(*args)
        return func(*args, **(kwargs or {}))


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """The result of `F.conv2d`."""
    kernel = weight.shape[2:]
    rows = F.unfold(x, kernel, dilation, padding, stride).unflatten(1, (groups, -1))  # (N, groups, inputs, positions)
    weight = weight.reshape(groups, -1, rows.shape[2])
    depthwise = weight.shape[1] == 1  # one output per group
    flat = (rows * weight.transpose(1, 2)).sum(2) if depthwise else (weight @ rows).flatten(1, 2)
    size = [
        (x.shape[2 + i] + 2 * _pair(padding)[i] - _pair(dilation)[i] * (kernel[i] - 1) - 1) // _pair(stride)[i] + 1
        for i in (0, 1)
    ]
    out = flat.unflatten(2, size)
    return out if bias is None else out + bias.view(-1, 1, 1)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def reasons_to_loop(
    pieces: Sequence[Any], backbone: nn.Module, branches: Sequence[int] | None = None
) -> dict[str, str]:
    """The pieces whose grouped form may not be used, by index, with the reasons.

    Args:
        pieces: the blocks, the head and the classifier.
        backbone: the network that was cut.
        branches: number for each piece; pieces with one branch are not checked. By default all pieces are checked.
    """
    value: Any = _small_example(backbone)
    found = {}
    for index, piece in with_progress(enumerate(pieces), len(pieces), "checking the executors"):
        if branches is None or branches[index] > 1:
            found[str(index)] = self_check(piece, value)
        with torch.no_grad(), evaluating(piece):
            value = piece(*value) if isinstance(value, tuple) else piece(value)
    return {index: reason for index, reason in found.items() if reason}


def _small_example(backbone: nn.Module) -> Tensor:
    """A small image, or one of the full size if the backbone requires it."""
    full = example_input(backbone)
    for size in _CHECK_SIZES:
        small = full[..., :size, :size]
        with contextlib.suppress(Exception), torch.no_grad(), evaluating(backbone):
            backbone(small)
            return small
    return full
