"""Accelerate keeps the settings of its first Accelerator until the process ends: forget them."""

from accelerate.state import AcceleratorState


def reset_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
