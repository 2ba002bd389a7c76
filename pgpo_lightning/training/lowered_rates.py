"""A learning rate that is lowered for good, in an optimizer and in its schedule."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def lower_rates(optimizers: list[torch.optim.Optimizer], schedules: list[Any], factor: float) -> None:
    """Multiply the learning rates by a factor, now and for the rest of the schedule.

    A schedule computes its next rate from the last one, or from a base that it or the parameter group keeps; all of them are
    scaled. An absolute floor such as `eta_min` is not.

    Args:
        optimizers: Whose rates.
        schedules: Of these optimizers; those inside others (``SequentialLR``, ``ChainedScheduler``) are found.
        factor: Above 0.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():
                if isinstance(group[name], Tensor):
                    group[name].mul_(factor)
                else:
                    group[name] *= factor
    for schedule in _all(schedules):
        for name in ("base_lrs", "max_lrs", "_last_lr"):
            if hasattr(schedule, name):
                setattr(schedule, name, [rate * factor for rate in getattr(schedule, name)])


def _all(schedules: list[Any]) -> Iterator[Any]:
    for schedule in schedules:
        yield schedule
        yield from _all(getattr(schedule, "_schedulers", []))
