"""Parts of a study's file that are settings of a class: the design, predictions and looks, and those of the classes of a run."""

from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from pgpo_lightning.core.texts import shown
from pgpo_lightning.studies.predictions import Prediction
from pgpo_lightning.studies.sequential import SequentialPlan

Part = TypeVar("Part")

CLASSES = ("model", "data", "multiplier")
"""Settings of ``pgpo fit`` that are a class with settings of its own."""

OF_A_CLASS = ("class_path", "init_args", "dict_kwargs")
"""Keys that a class has in a configuration."""


def below_init_args(settings: dict[Any, Any]) -> dict[Any, Any]:
    """Return settings in which those of a class stand below its ``init_args``, as in a configuration.

    A study's file may thus use the names of the command line.

    Example:
        >>> below_init_args({"multiplier": "ConstantMultiplier", "multiplier.value": 1.05})
        {'multiplier.class_path': 'ConstantMultiplier', 'multiplier.init_args.value': 1.05}

    Args:
        settings: Mappings, or with dots in their keys. Keys that are no names are left to the caller.

    Raises:
        ValueError: If a setting stands in both forms.
    """
    result: dict[Any, Any] = {}
    for key, value in _one_level(settings):
        name, _, inner = key.partition(".") if isinstance(key, str) else (key, "", "")
        if name in CLASSES and inner and inner.partition(".")[0] not in OF_A_CLASS:
            key = f"{name}.init_args.{inner}"
        elif (
            name in CLASSES
            and not inner
            and isinstance(value, str)
            and any(str(k).startswith(f"{name}.") for k in settings)
        ):
            key = f"{name}.class_path"
        if key in result:
            raise ValueError(f"Expected every setting once, but got `{key}` twice.")
        result[key] = value
    return result


def _one_level(settings: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield keys and values, those of a class with a dot."""
    for key, value in settings.items():
        if key in CLASSES and isinstance(value, dict) and value and all(isinstance(inner, str) for inner in value):
            yield from ((f"{key}.{inner}", each) for inner, each in value.items())
        else:
            yield key, value


def built(kind: Callable[..., Part], where: str, value: Any) -> Part:
    """Return an object of a dataclass from the mapping in a file. Lists become tuples.

    Args:
        kind: The class.
        where: Name of the entry, for the message.
        value: The mapping.

    Raises:
        ValueError: If it is not a mapping, has unknown keys or lacks some, or has a value out of range; names the entry.
    """
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(value, dict) or (set(value) - set(known)):
        raise ValueError(
            f"Expected `{where}` to be a mapping with the keys {', '.join(known)}, but got {shown(value)}."
        )
    required = [name for name, field in known.items() if field.default is MISSING]
    if missing := [name for name in required if name not in value]:
        raise ValueError(f"Expected `{where}` to have `{'`, `'.join(missing)}`, but got {shown(value)}.")
    try:
        return kind(**{key: tuple(each) if isinstance(each, list) else each for key, each in value.items()})
    except ValueError as error:
        raise ValueError(f"{str(error).removesuffix('.')}, in `{where}`.") from None


def read_predictions(value: Any) -> tuple[Prediction, ...]:
    """Return the predictions of a study.

    Raises:
        ValueError: As :func:`built`, or if there is no list.
    """
    if not isinstance(value, list):
        raise ValueError(f"Expected `predictions` to be a list, but got {shown(value)}.")
    return tuple(built(Prediction, f"predictions[{i}]", each) for i, each in enumerate(value))


def read_plan(value: Any) -> SequentialPlan | None:
    """Return the looks of a study, or None without any.

    Raises:
        ValueError: As :func:`built`.
    """
    return None if value is None else built(SequentialPlan, "sequential", value)
