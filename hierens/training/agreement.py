"""Agreement between the processes of a run: all of them raise the same error, or continue with the same value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

_Result = TypeVar("_Result")


def agreed(accelerator: Accelerator, work: Callable[[], _Result]) -> _Result:
    """The result of the main process, in every process. If `work` raises a ValueError there, every process does."""
    result: list[Any] = [None, ""]
    if accelerator.is_main_process:
        try:
            result[0] = work()
        except ValueError as error:
            result[1] = str(error)
    broadcast_object_list(result)
    if result[1]:
        raise ValueError(result[1])
    return result[0]


def first_problem(problems: list[str]) -> str:
    """The first problem that any process reports; empty if there is none. Every process must call it."""
    return next(filter(None, gather_object(problems or [""])), "")


def largest(accelerator: Accelerator, number: int) -> int:
    """The largest of all processes' numbers. Every process must call it."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
