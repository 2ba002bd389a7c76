"""Checks of settings, all with one form of message: what was expected of which field, and what it got."""

from collections.abc import Sequence


def at_least(bound: float, **settings: float | None) -> None:
    """Raise if a setting is given and smaller than `bound`.

    Raises:
        ValueError: Names the field.
    """
    for name, value in settings.items():
        if value is not None and not value >= bound:
            raise ValueError(f"Expected `{name}` to be at least {bound}, but got {value}.")


def positive(**settings: float | None) -> None:
    """Raise if a setting is given and not above zero.

    Raises:
        ValueError: Names the field.
    """
    for name, value in settings.items():
        if value is not None and not value > 0:
            raise ValueError(f"Expected `{name}` to be above 0, but got {value}.")


def one_of(choices: Sequence[str], **settings: str) -> None:
    """Raise if a setting is not one of the choices.

    Raises:
        ValueError: Names the field.
    """
    for name, value in settings.items():
        if value not in choices:
            raise ValueError(f"Expected `{name}` to be one of {', '.join(choices)}, but got {value!r}.")


def either(first: str, a: float | None, second: str, b: float | None, default: float) -> float:
    """Return the value of a setting that goes by two names.

    Raises:
        ValueError: If both are given and differ.
    """
    if a is not None and b is not None and a != b:
        raise ValueError(f"Expected only one of `{first}` and `{second}`, which mean the same, but got {a} and {b}.")
    return next((value for value in (a, b) if value is not None), default)
