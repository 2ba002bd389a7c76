"""Parts of a study's file that are settings of a class: the design, predictions and looks."""

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from pgpo_lightning.core.texts import shown
from pgpo_lightning.studies.predictions import Prediction
from pgpo_lightning.studies.sequential import SequentialPlan

Part = TypeVar("Part")


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
