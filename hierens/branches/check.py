"""The proof that a block's grouped form is right: both ways to run it, compared at conversion."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from hierens.branches.level import Activations, Executor, Level, copies
from hierens.branches.tensors import state_of
from hierens.core.errors import first_line
from hierens.core.modes import evaluating, quiet_dropout
from hierens.core.timm_info import example_input
from hierens.core.values import Value
from hierens.cutting.cut import Cutting

_LARGE = 2_000_000  # weights of a block from which float64 is only tried where float32 differs
_HEAVY = 50_000_000  # and from which it is not, for it would need many GB
_DRAWN = 65_521  # a prime, so that no two channels get the same
_CHECK_SIZES = (32, 64, 128)  # pixels: the self-check needs no more of an image than keeps every layer at work


def self_check(block: fx.GraphModule, example: Value, seed: int = 0) -> str:
    """Why the grouped form of a block may not be used; an empty string if it agrees with the looped one.

    Three branches with independent weights and inputs are run both ways, in evaluation and in training (dropout off),
    with two batch sizes, with fewer branches than there are and with siblings that share their input; outputs and
    running statistics are compared, and the branches, as a control that must differ. They run in float64, or in float32
    if the block needs that or is large: then float64 decides where float32 differs, up to a size.

    Args:
        block: a block of a cutting; it is left as it is.
        example: what enters it, for one image.
        seed: of the random weights and inputs.
    """
    values = example if isinstance(example, tuple) else (example,)
    if not all(isinstance(value, Tensor) and value.ndim > 1 and value.is_floating_point() for value in values):
        return "values other than batches of feature maps cross into it"
    weights = sum(parameter.numel() for parameter in block.parameters())
    dtypes = (torch.float32, torch.float64) if weights > _LARGE else (torch.float64, torch.float32)
    reason = ""
    for dtype in dtypes[: 1 if weights > _HEAVY else 2]:
        with contextlib.redirect_stderr(io.StringIO()):  # fx prints the code that failed
            found, loop_failed = _disagreement(block, example, dtype, seed)
        if not (loop_failed and reason):
            reason = found
        if not reason or (dtype is torch.float64 and not loop_failed):
            break
    return reason


def _disagreement(block: fx.GraphModule, example: Value, dtype: torch.dtype, seed: int) -> tuple[str, bool]:
    """What differs between the two ways to run a level; and whether that is because even the loop fails."""
    generator = torch.Generator().manual_seed(seed)
    probe = copy.deepcopy(block).to("cpu", dtype)
    level = Level(copies(probe, (_perturbed(probe, generator) for _ in range(3))))
    statistics = dict(level.named_buffers())
    for training, batch, parents in ((False, 1, (0, 1, 2)), (True, 2, (0, 1)), (False, 2, (0, 0))):
        mode = "training" if training else "evaluation"
        inputs = [_drawn_like(example, batch, dtype, generator) for _ in range(parents[-1] + 1)]
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
        moved = {name: tensor.clone() for name, tensor in statistics.items()}
        for name, tensor in before.items():
            statistics[name].copy_(tensor)
        try:
            actual = _run(level, "grouped", inputs, parents)
        except Exception as error:
            return f"its grouped form fails in {mode}: {first_line(error)}", False
        if not all(_close(a, b) for a, b in zip(actual, expected, strict=True)):
            return f"its grouped form differs in {mode}", False
        if other := [name for name, tensor in moved.items() if not _close(statistics[name], tensor)]:
            names = dict.fromkeys(name.split(".", 1)[1] for name in other)
            return f"its grouped form leaves other statistics in {', '.join(names)}", False
        if len(inputs) > 1 and _same(actual[0], actual[1]):
            return f"branches of other weights and inputs agree in {mode}, so that nothing can be told", False
    return "", False


@torch.no_grad()
def _run(level: Level, executor: Executor, inputs: list[Value], parents: Sequence[int]) -> list[Value]:
    level.executor = executor
    with _ManyGroups():
        return level(Activations([_copied(value) for value in inputs]), parents).listed()


def _copied(value: Value) -> Value:
    """A value that the block may change in place."""
    return value.clone() if isinstance(value, Tensor) else tuple(_copied(part) for part in value)


def _drawn_like(example: Value, batch: int, dtype: torch.dtype, generator: torch.Generator) -> Value:
    if isinstance(example, tuple):
        return tuple(_drawn_like(value, batch, dtype, generator) for value in example)
    return torch.randn((batch * example.shape[0], *example.shape[1:]), generator=generator, dtype=dtype)


def _close(a: Value, b: Value) -> bool:
    """Equal but for rounding: in relation to the largest value, since sums may run in another order."""
    if not isinstance(a, Tensor):
        return all(_close(x, y) for x, y in zip(a, b, strict=True))
    if a.shape != b.shape:
        return False
    tolerance = 1e-6 if a.dtype == torch.float64 else 2e-5
    return bool((a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max())


def _same(a: Value, b: Value) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else all(_same(x, y) for x, y in zip(a, b, strict=True))


def _perturbed(block: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """A branch's own weights: none zero, so that no path of the block stays untried."""
    state, parameters = {}, dict(block.named_parameters())
    normal = torch.randn(_DRAWN, generator=generator, dtype=torch.float64)
    uniform = torch.rand(_DRAWN, generator=generator, dtype=torch.float64)
    for name, tensor in state_of(block):
        tensor = tensor.detach().clone()
        if name in parameters:
            tensor.add_(_spread(normal, tensor), alpha=0.1 + 0.5 * tensor.std(correction=0).item())
        elif tensor.is_floating_point():  # running variances stay positive
            noise = _spread(uniform, tensor)
            tensor = tensor * (1 + noise) + 0.1 * noise
        state[name] = tensor
    return state


def _spread(drawn: Tensor, like: Tensor) -> Tensor:
    """Random numbers over a tensor, again and again the same: drawing all of them would take longer than all else."""
    repeats = -(-like.numel() // len(drawn))
    return drawn.to(like.dtype).repeat(repeats)[: like.numel()].view(like.shape)


class _ManyGroups(TorchFunctionMode):
    """Computes grouped 2-D convolutions in float64 by unfolded images, where torch runs group after group.

    A level of a depthwise layer has thousands of groups, which made nine tenths of a conversion's time.
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
    """What `F.conv2d` returns."""
    kernel = weight.shape[2:]
    rows = F.unfold(x, kernel, dilation, padding, stride).unflatten(1, (groups, -1))  # (N, groups, inputs, positions)
    weight = weight.reshape(groups, -1, rows.shape[2])
    alone = weight.shape[1] == 1  # one output in each group
    flat = (rows * weight.transpose(1, 2)).sum(2) if alone else (weight @ rows).flatten(1, 2)
    size = [
        (x.shape[2 + i] + 2 * _pair(padding)[i] - _pair(dilation)[i] * (kernel[i] - 1) - 1) // _pair(stride)[i] + 1
        for i in (0, 1)
    ]
    out = flat.unflatten(2, size)
    return out if bias is None else out + bias.view(-1, 1, 1)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def reasons_to_loop(cutting: Cutting, backbone: nn.Module, branches: Sequence[int] | None = None) -> dict[str, str]:
    """The pieces whose grouped form may not be used, by index, and why.

    Args:
        cutting: the blocks, the head and the classifier.
        backbone: the network that was cut.
        branches: of each piece; one that has a single branch is not checked. All are by default.
    """
    pieces = (*cutting.blocks, cutting.head, cutting.classifier)
    value: Any = _small_example(backbone)
    found = {}
    for index, piece in enumerate(pieces):
        if branches is None or branches[index] > 1:
            found[str(index)] = self_check(piece, value)
        with torch.no_grad(), evaluating(piece):
            value = piece(*value) if isinstance(value, tuple) else piece(value)
    return {index: reason for index, reason in found.items() if reason}


def _small_example(backbone: nn.Module) -> Tensor:
    """An image of few pixels, or of the full size if the backbone insists on that."""
    full = example_input(backbone)
    for size in _CHECK_SIZES:
        small = full[..., :size, :size]
        with contextlib.suppress(Exception), torch.no_grad(), evaluating(backbone):
            backbone(small)
            return small
    return full
