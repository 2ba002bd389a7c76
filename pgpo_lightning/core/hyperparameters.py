"""The arguments of an object in the form of a configuration file, from which it can be built again."""

import dataclasses
import inspect
from functools import partial
from typing import Any

from pgpo_lightning.core.run_settings import ConfigGroup, Plain, Remembers, arguments, describe

INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
"""What Lightning's ``load_from_checkpoint`` builds a module with; it checks every argument against its annotation."""

_LEFT_OUT = object()


def hyperparameters(thing: Any) -> dict[str, Plain]:
    """Return what an object was constructed with, in the form of a configuration file.

    Arguments that have no such form (a model object, a lambda) are left out: whoever builds the object again has to give them.

    Args:
        thing: Of a class that :class:`~pgpo_lightning.core.run_settings.Remembers`.
    """
    plain = {name: _config(value) for name, value in arguments(thing).items()}
    return {"_instantiator": INSTANTIATOR} | {name: value for name, value in plain.items() if value is not _LEFT_OUT}


def _config(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_config(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _config(each) for key, each in value.items()}
    if isinstance(value, ConfigGroup) or dataclasses.is_dataclass(value):
        fields = {field.name: _config(getattr(value, field.name)) for field in dataclasses.fields(value)}  # type: ignore[arg-type]
        return {name: each for name, each in fields.items() if each is not _LEFT_OUT}
    if isinstance(value, partial) and not value.args:
        return {"class_path": _path(value.func), "init_args": _config(value.keywords)}
    if inspect.isroutine(value) or isinstance(value, type):
        path = _path(value)
        return _LEFT_OUT if "<" in path else path
    if isinstance(value, Remembers):
        init = {name: _config(each) for name, each in arguments(value).items()}
        return {"class_path": _path(type(value)), "init_args": init}
    described = describe(value)
    if not isinstance(described, dict) or len(described) < len(inspect.signature(type(value).__init__).parameters):
        return _LEFT_OUT
    return {"class_path": described.pop("class"), "init_args": described}


def _path(thing: Any) -> str:
    return f"{getattr(thing, '__module__', None)}.{getattr(thing, '__qualname__', '')}"
