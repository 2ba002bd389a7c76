"""Permanent reduction of the learning rate in an optimizer and its schedule."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def lower_rates(optimizers: list[torch.optim.Optimizer], schedules: list[Any], factor: float) -> None:
    """Multiply the learning rates by a factor, now and for the rest of the schedule.

    A schedule computes its next rate from the last rate, or from a base rate that it or the parameter group stores. All of these
    are scaled. An absolute minimum such as `eta_min` is not.

    Args:
        optimizers: The optimizers.
        schedules: Their schedules, including nested ones (``SequentialLR``, ``ChainedScheduler``).
        factor: Above 0.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():
                if isinstance(group[name], Tensor):
                    group[name].mul_(factor)
                else:
                    group[name] *= factor
    for schedule in _with_nested(schedules):
        for name in ("base_lrs", "max_lrs", "_last_lr"):
            if hasattr(schedule, name):
                setattr(schedule, name, [rate * factor for rate in getattr(schedule, name)])


def _with_nested(schedules: list[Any]) -> Iterator[Any]:
    for schedule in schedules:
        yield schedule
        yield from _with_nested(getattr(schedule, "_schedulers", []))
