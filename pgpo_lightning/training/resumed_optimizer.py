"""Changed settings of optimizer and schedule in a resumed run.

The restored state would silently override the user's settings. Here the new settings take effect, as if the schedule had had them
from the first step. Changes that need other state than the checkpoint holds are rejected.
"""

import warnings
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from pgpo_lightning.core.run_settings import Plain, describe
from pgpo_lightning.training.lowered_rates import lower_rates

MAY_CHANGE = {"lr", "initial_lr", "weight_decay", "betas", "eps", "momentum", "dampening", "foreach"}
"""Settings of a parameter group that may change. Others, such as `amsgrad`, decide which state exists, or the step's sign."""

_RUNNING = {"base_lrs", "_last_lr", "lr_lambdas", "_schedulers"}


def describe_optimizer(optimizer: Optimizer, make_scheduler: Callable[[Optimizer], Any] | None) -> tuple[Any, Plain]:
    """Construct the schedule, and return it with a description of optimizer and schedule before the first step."""
    groups = [
        {name: describe(value) for name, value in group.items() if name not in ("params", "param_names")}
        | {"parameters": len(group["params"])}
        for group in optimizer.param_groups
    ]
    scheduler = None if make_scheduler is None else make_scheduler(optimizer)
    for group, described in zip(optimizer.param_groups, groups, strict=True):
        described["initial_lr"] = describe(group.get("initial_lr", group["lr"]))
    return scheduler, {
        "class": _name(optimizer),
        "groups": groups,
        "scheduler": None if scheduler is None else _describe_scheduler(scheduler),
    }


def _describe_scheduler(scheduler: Any) -> Plain:
    kept = {name: describe(value) for name, value in scheduler.state_dict().items() if name not in _RUNNING}
    inner = [_describe_scheduler(each) for each in getattr(scheduler, "_schedulers", [])]
    functions = describe(getattr(scheduler, "lr_lambdas", []))
    return {"class": _name(scheduler), **kept, "functions": functions, "schedulers": inner}


def check_optimizer(before: Plain, now: Plain) -> list[str]:
    """Compare optimizer and schedule of a resumed run with those of its checkpoint.

    Args:
        before: Description from the checkpoint, see :func:`describe_optimizer`.
        now: Description of this run.

    Returns:
        A message for each permitted change.

    Raises:
        MisconfigurationException: If another setting changed; names it.
    """
    if before["class"] != now["class"]:
        _refuse("optimizer", before["class"], now["class"], "its state is of the former")
    old, new = ([group["parameters"] for group in each["groups"]] for each in (before, now))
    if old != new:
        _refuse("optimizer", f"for groups of {old} parameters", f"for groups of {new}", "its state is of the former")
    classes = [each["scheduler"] and each["scheduler"]["class"] for each in (before, now)]
    if classes[0] != classes[1]:
        _refuse("scheduler", classes[0], classes[1], "its position is in the former")
    messages = []
    for number, (old, new) in enumerate(zip(before["groups"], now["groups"], strict=True)):
        for name in sorted(old.keys() & new.keys() - {"initial_lr"}):
            if old[name] == new[name]:
                continue
            where = f"optimizer.{name}" + (f" of group {number}" if len(before["groups"]) > 1 else "")
            if name not in MAY_CHANGE:
                _refuse(
                    where,
                    old[name],
                    new[name],
                    "it determines which state the checkpoint holds, or it affects all steps",
                )
            messages.append(f"`model.{where}` is {new[name]!r} and was {old[name]!r}")
    if before["scheduler"] != now["scheduler"]:
        names = [name for name in now["scheduler"] if before["scheduler"].get(name) != now["scheduler"][name]]
        messages += [
            f"`model.scheduler.{name}` is {now['scheduler'][name]!r} and was {before['scheduler'].get(name)!r}"
            for name in names
        ]
    return messages


def _refuse(what: str, old: Any, new: Any, why: str) -> None:
    raise MisconfigurationException(
        f"Expected the `{what}` that the run began with, {old}, but got {new}: {why}. Resume with the former, or start a new run "
        "from the checkpoint's weights (`pgpo export`)."
    )


def take_effect(
    optimizer: Optimizer,
    scheduler: Any,
    before: Plain,
    now: Plain,
    make: Callable[[], tuple[Optimizer, Any]],
) -> None:
    """Apply the settings that differ from the checkpoint's to a restored optimizer and schedule.

    The learning rate becomes that of the new schedule at this step, times the factor by which a
    :class:`~pgpo_lightning.callbacks.CollapseGuard` has lowered the old rate.

    Args:
        optimizer: The restored optimizer.
        scheduler: The restored schedule, or ``None``.
        before: Description of both in the checkpoint.
        now: Description of both in this run.
        make: Returns a new optimizer and schedule of this run, before their first step.
    """
    if before == now:
        return
    kept = "initial_lr" if scheduler is not None else "lr"
    lowered = [
        float(group[kept]) / old["initial_lr"] if old["initial_lr"] else 1.0
        for group, old in zip(optimizer.param_groups, before["groups"], strict=True)
    ]
    fresh, schedule = make()
    if schedule is not None:
        with warnings.catch_warnings():
            # No optimizer step happens in between, of which torch would warn.
            warnings.filterwarnings("ignore", "(?s).*lr_scheduler.step.*")
            for _ in range(scheduler.last_epoch):
                schedule.step()
        scheduler.load_state_dict(schedule.state_dict())
    for group, other in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        for name in other.keys() & MAY_CHANGE | other.keys() & {"max_lr", "min_lr", "max_momentum", "base_momentum"}:
            if isinstance(group.get(name), Tensor):
                group[name].fill_(float(other[name]))
            else:
                group[name] = other[name]
    if lowered[0] != 1.0:
        lower_rates([optimizer], [scheduler] if scheduler is not None else [], lowered[0])


def _name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
