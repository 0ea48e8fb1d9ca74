"""Other processes of the same run, as started by ``torchrun`` or ``accelerate launch``; usually there are none."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState


def processes(device: torch.device) -> PartialState:
    """Who is at work. The main process compresses while the others wait; all take part in training.

    Args:
        device: where this process computes; only its type matters.
    """
    return PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))  # a pass may take that long


def is_main() -> bool:
    """Whether this is the process that writes and speaks; true where there is only one."""
    return bool(PartialState().is_main_process)
