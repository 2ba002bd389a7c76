"""Checks of settings: every argument of a decorated class or function against its own annotation.

An annotation states the valid values: ``Count``, ``Fraction | None``, ``Literal["warn", "stop"]``, ``list[Positive]``. The
decorator :func:`checked` checks them before the body runs, for the command line and for Python alike. Types and ranges are
therefore stated once, and ``--help`` shows them. Only dependences between settings are checked by hand.

Whether the annotation says so or not, every number must be finite and of a plausible size (:data:`SMALLEST`, :data:`LARGEST`),
and a boolean is not a number.
"""

import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import numpy as np

from pgpo_lightning.core.texts import shown

SMALLEST, LARGEST = 1e-12, 1e12
"""Bounds of the absolute value of every number that is not 0. float32 has 7 digits: a setting far beyond is a typing error."""

LARGEST_WHOLE = 2**31 - 1
"""Bound of the absolute value of every whole number without another upper bound."""


@dataclass(frozen=True, repr=False)
class Range:
    """The range of a number.

    Args:
        least: Lower bound, included.
        most: Upper bound, included.
        above: Lower bound, excluded.
        below: Upper bound, excluded.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __repr__(self) -> str:
        """Return it as ``--help`` shows it.

        Example:
            >>> Range(least=1), Range(above=0, most=1)
            (at least 1, in (0, 1])
        """
        return self.text.removeprefix("to be ").removeprefix("to lie ")

    @property
    def text(self) -> str:
        """The expectation, as in a message."""
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if low is not None and high is not None:
            opening, closing = "[" if self.above is None else "(", "]" if self.below is None else ")"
            return f"to lie in {opening}{low:.12g}, {high:.12g}{closing}"
        if low is not None:
            return f"to be {'at least' if self.above is None else 'above'} {low:.12g}"
        return f"to be {'at most' if self.below is None else 'below'} {high:.12g}"

    def holds(self, value: Any) -> bool:
        """Return whether the number is within."""
        return bool(
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


@dataclass(frozen=True, repr=False)
class Filled:
    """A text with more than white space in it, or a collection that is not empty."""

    def __repr__(self) -> str:
        """Return it as ``--help`` shows it."""
        return "not empty"


@dataclass(frozen=True, repr=False)
class Unlimited:
    """A measured number: of any size, finite or not."""

    def __repr__(self) -> str:
        """Return it as ``--help`` shows it."""
        return "any"


Count = Annotated[int, Range(least=1)]
Natural = Annotated[int, Range(least=0)]
Seed = Annotated[int, Range(least=0, most=2**32 - 1)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(least=0)]
Fraction = Annotated[float, Range(least=0, most=1)]
PositiveFraction = Annotated[float, Range(above=0, most=1)]
Decay = Annotated[float, Range(least=0, below=1)]
AtLeastOne = Annotated[float, Range(least=1)]
Text = Annotated[str, Filled()]
Measured = Annotated[float, Unlimited()]

Temperature = Annotated[float, Range(least=1e-4, most=100)]
"""Below, float32 does not resolve the log-probabilities; above, the distribution is uniform."""

Nucleus = Annotated[float, Range(least=1e-3, most=1)]
"""A smaller nucleus is always a single token."""

Multiplier = Annotated[float, Range(least=1e-3, most=1e3)]
"""Factor of a step's learning rate. For a larger factor, change the rate itself."""

LowerBound = Annotated[float, Range(least=0, most=1e3)]
"""Lower bound of a multiplier; 0 for none."""

UpperBound = Annotated[float, Range(least=1, most=1e3)]
"""Upper bound of a multiplier that can be 1."""


class _Fault(NamedTuple):
    """What is wrong with a value, or with a value inside of it."""

    where: str  # suffix of the field's name, such as [2]
    expected: str
    value: Any
    kind: bool  # whether its type is wrong, not only its range


Target = TypeVar("Target", bound=Callable[..., Any])


def checked(target: Target, prefix: str = "") -> Target:
    """Check every argument of a class or function against its annotation, before it runs.

    Args:
        target: A class with its own ``__init__`` (a dataclass has one), which is changed, or a function. Arguments in ``*args``
            and ``**kwargs`` are not checked here.
        prefix: Prefix of the names of its fields in messages, such as ``lora.``.

    Returns:
        The class, or the function that checks.

    Raises:
        ValueError: When called: names the field, the expectation and the value.

    Example:
        >>> @checked
        ... def draw(count: Count, temperature: Positive | None = None):
        ...     return count
        >>> draw(3)
        3
        >>> draw(3, temperature=float("nan"))
        Traceback (most recent call last):
        ValueError: Expected `temperature` to be above 0 and finite, but got nan.
    """
    is_class = isinstance(target, type)
    function: Any = vars(target)["__init__"] if is_class else target
    signature = inspect.signature(function)
    skipped = {name for name, p in signature.parameters.items() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    hints: dict[str, Any] = {}

    @functools.wraps(function)
    def checking(*args: Any, **kwargs: Any) -> Any:
        args = tuple(map(_python_number, args))
        kwargs = {name: _python_number(value) for name, value in kwargs.items()}
        if not hints:
            hints.update(typing.get_type_hints(function, include_extras=True))
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            given = {}  # the call itself raises Python's own message
        for name, value in given.items():
            if name in hints and name not in skipped:
                check(f"{prefix}{name}", value, hints[name])
        return function(*args, **kwargs)

    if not is_class:
        return typing.cast(Target, checking)
    setattr(target, "__init__", checking)  # noqa: B010  (mypy does not want a method to be assigned)
    return target


def _python_number(value: Any) -> Any:
    """Return a number of NumPy as one of Python, because seeds and checkpoints depend on how a setting is written."""
    return value.item() if isinstance(value, np.generic) else value


def check(name: str, value: Any, hint: Any) -> None:
    """Raise if a value does not match an annotation.

    Args:
        name: Of the field.
        value: Of the field.
        hint: The annotation. Parts that a value does not show, such as the result of a callable, are not checked.

    Raises:
        ValueError: Names the field, the expectation and the value.
    """
    fault = _fault(value, hint)
    if fault is not None:
        got = "null" if fault.value is None else shown(fault.value, longest=100)
        raise ValueError(f"Expected `{name}{fault.where}` {fault.expected}, but got {got}.")


def one_of(choices: Sequence[str], **settings: str) -> None:
    """Raise if a setting is not one of the choices.

    Raises:
        ValueError: Names the field.
    """
    for name, value in settings.items():
        check(name, value, Literal[*choices])


def either(first: str, a: float | None, second: str, b: float | None, default: float) -> float:
    """Return the value of a setting with two names.

    Raises:
        ValueError: If both are given and differ.
    """
    if a is not None and b is not None and a != b:
        raise ValueError(f"Expected only one of `{first}` and `{second}`, which mean the same, but got {a} and {b}.")
    return next((value for value in (a, b) if value is not None), default)


def _fault(value: Any, hint: Any, limits: tuple[Any, ...] = ()) -> _Fault | None:
    """Return what is wrong with a value, or none."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _fault(value, hint.__origin__, limits + hint.__metadata__)
    if origin in (Union, UnionType):
        return _fault_of_union(value, get_args(hint))
    if origin is Literal:
        found = any(type(value) is type(choice) and value == choice for choice in get_args(hint))
        return None if found else _Fault("", _expected(hint), value, True)
    if hint is int or hint is float:
        return _fault_of_number(value, hint, limits)
    if not _is_of_kind(value, hint):
        return _Fault("", _expected(hint), value, True)
    if any(isinstance(limit, Filled) for limit in limits) and not (value.strip() if isinstance(value, str) else value):
        return _Fault("", "not to be empty", value, False)
    return _fault_inside(value, origin, get_args(hint))


def _fault_of_union(value: Any, members: tuple[Any, ...]) -> _Fault | None:
    faults = []
    for member in members:
        fault = _fault(value, member)
        if fault is None:
            return None
        faults.append(fault)
    # A fault of the range, or further inside, is more informative than the list of all types.
    near = next((fault for fault in faults if not fault.kind or fault.where), None)
    expectations = [fault.expected.removeprefix("to be ") for fault in faults]
    return near or _Fault("", f"to be {' or '.join(dict.fromkeys(expectations))}", value, True)


def _fault_of_number(value: Any, kind: type, limits: tuple[Any, ...]) -> _Fault | None:
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        return _Fault("", _expected(kind), value, True)
    if any(isinstance(limit, Unlimited) for limit in limits):
        return None
    ranges = [limit for limit in limits if isinstance(limit, Range)]
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return _Fault("", f"to be at most {LARGEST_WHOLE if kind is int else LARGEST:.12g} in size", value, False)
    outside = next((limit for limit in ranges if not limit.holds(value)), None)
    if not finite:
        text = next((limit.text for limit in ranges), "")
        text = text if text.startswith("to lie") else f"{text} and finite" if text else "to be finite"
        return _Fault("", text, value, False)
    if outside is not None:
        return _Fault("", outside.text, value, False)
    size: Any = abs(value)
    if kind is int and size > LARGEST_WHOLE and not any(limit.most for limit in ranges):
        return _Fault("", f"to be at most {LARGEST_WHOLE} in size", value, False)
    if kind is float and size != 0 and not SMALLEST <= size <= LARGEST:
        return _Fault("", f"to be 0 or {SMALLEST:g} to {LARGEST:g} in size", value, False)
    return None


def _fault_inside(value: Any, origin: Any, inner: tuple[Any, ...]) -> _Fault | None:
    """Look into lists, tuples and mappings."""
    pairs: list[tuple[str, Any, Any]] = []
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        if len(value) != len(inner):
            return _Fault("", f"to have {len(inner)} entries", value, False)
        pairs = [(f"[{i}]", each, kind) for i, (each, kind) in enumerate(zip(value, inner, strict=True))]
    elif inner and isinstance(value, Mapping):
        pairs = [(f"[{key!r}]", key, inner[0]) for key in value] + [(f"[{k!r}]", v, inner[1]) for k, v in value.items()]
    elif inner and isinstance(value, (list, tuple)):
        pairs = [(f"[{i}]", each, inner[0]) for i, each in enumerate(value)]
    for where, each, kind in pairs:
        fault = _fault(each, kind)
        if fault is not None:
            return fault._replace(where=where + fault.where)
    return None


def _is_of_kind(value: Any, hint: Any) -> bool:
    kind = get_origin(hint) or hint
    if kind is None:
        kind = NoneType
    if kind is Callable or kind is typing.Callable:
        return callable(value)
    if kind is Sequence and isinstance(value, str):
        return False
    if kind is str:
        return isinstance(value, (str, PathLike))  # from Python a file is a Path as well
    if kind is Any or not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    return isinstance(value, kind)


_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    NoneType: "null",
    None: "null",
}


def _expected(hint: Any) -> str:
    """Return what a value is expected to be."""
    if get_origin(hint) is Literal:
        return f"to be one of {', '.join(map(str, get_args(hint)))}"
    kind = get_origin(hint) or hint
    if kind is list or kind is Sequence or kind is tuple:
        return "to be a list"
    if kind is dict or kind is Mapping:
        return "to be a mapping"
    if kind in _KINDS:
        return f"to be {_KINDS[kind]}"
    if kind is Callable:
        return "to be a callable"
    return f"to be of the class {kind.__name__}"
