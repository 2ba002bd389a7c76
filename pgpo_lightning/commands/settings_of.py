"""The settings of a class as they are written on the command line, and the classes that a setting may name."""

import collections.abc
import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """A setting of a class, or a property of one of its groups, which cannot be set."""

    computed_from: tuple[str, ...] = ()


def settings_of(cls: Any) -> dict[str, Setting]:
    """Return the settings of a class and of its groups, with properties of the groups.

    Args:
        cls: A class whose arguments, those of its base classes included, are its settings.

    Returns:
        By name, such as ``update.micro_batch_tokens``; those of the class itself first.
    """
    found: dict[str, Setting] = {}
    groups: dict[str, Any] = {}
    for each in reversed(cls.__mro__):
        if "__init__" not in vars(each) or each is object:
            continue
        for name, parameter in list(inspect.signature(each.__init__).parameters.items())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            found[name] = Setting()
            hints = _hints(each.__init__)
            if group := next(_dataclasses(hints.get(name)), None):
                groups[name] = group
    for name, group in groups.items():
        fields = [field.name for field in dataclasses.fields(group)]
        found |= {f"{name}.{field}": Setting() for field in fields}
        for each, value in vars(group).items():
            if isinstance(value, property) and value.fget is not None:
                used = tuple(f"{name}.{one}" for one in value.fget.__code__.co_names if one in fields)
                if used:
                    found.setdefault(f"{name}.{each}", Setting(used))
    return found


def subclasses_of(setting: str, message: str = "") -> set[type]:
    """Return the classes that a setting may name.

    Args:
        setting: Its path, such as ``model.engine``.
        message: Of the parser, which may name the base class.
    """
    bases = [base for path in re.findall(r"[A-Za-z_][\w.]*\.[A-Z]\w*", message) if (base := _imported(path))]
    leaf = setting.rpartition(".")[2]
    bases += [base for name, path in _BASES.items() if name == leaf and (base := _imported(path))]
    found: set[type] = set()
    while bases:
        base = bases.pop()
        if base not in found:
            found.add(base)
            bases += type.__subclasses__(base)
    return {one for one in found if not inspect.isabstract(one) and not one.__name__.startswith("_")}


_BASES = {"optimizer": "torch.optim.Optimizer", "scheduler": "torch.optim.lr_scheduler.LRScheduler"}
"""Base classes of settings that take a callable, which the parser does not name."""


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) and path != "typing.Any" else None


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # of a user's class, with names that only a type checker imports
        return {}


def _dataclasses(hint: Any) -> Iterator[Any]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    if typing.get_origin(hint) is collections.abc.Callable:
        return  # what a callable takes and returns is no setting
    for inner in typing.get_args(hint):
        yield from _dataclasses(inner)
