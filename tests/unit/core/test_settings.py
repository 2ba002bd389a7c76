"""The checks that every annotated setting gets."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from pgpo_lightning.core.settings import (
    Count,
    Decay,
    Filled,
    Fraction,
    Natural,
    Positive,
    Range,
    Seed,
    Text,
    check,
    checked,
)

GOOD = [
    (1, Count),
    (np.int64(3), Count),
    (0, Natural),
    (2**32 - 1, Seed),
    (1, float),
    (np.float32(0.5), Fraction),
    (0, Decay),
    (None, Count | None),
    ("x", Literal["x", "y"]),
    (4, Literal[4, 8]),
    (["a"], Text | Annotated[list[Text], Filled()]),
    ({"a": 1}, dict[str, int]),
    ((0.1, 0.2), tuple[float, ...]),
    ([], list[Count]),
    (print, Callable[[int], int]),
    (object(), Any),
    (Path("x"), Text),
    (0.0, float),
]


@pytest.mark.parametrize(("value", "hint"), GOOD)
def test_what_an_annotation_allows_passes(value, hint):
    check("field", value, hint)


BAD = [
    (0, Count, "to be at least 1, but got 0"),
    (True, Count, "to be a whole number, but got True"),
    (1.0, Count, "to be a whole number, but got 1.0"),
    ("1e-3", Positive, "to be a number, but got '1e-3'"),
    (math.nan, float, "to be finite, but got nan"),
    (math.inf, Positive, "to be above 0 and finite, but got inf"),
    (-math.inf, Fraction, "to lie in [0, 1], but got -inf"),
    (1e-30, Positive, "to be 0 or 1e-12 to 1e+12 in size, but got 1e-30"),
    (1e300, float, "to be 0 or 1e-12 to 1e+12 in size, but got 1e+300"),
    (10**5000, Count, "to be at most 2147483647 in size, but got an integer of about 5001 digits"),
    (2**31, Count, "to be at most 2147483647 in size, but got 2147483648"),
    (2**32, Seed, "to lie in [0, 4294967295], but got 4294967296"),
    (10**5000, float, "to be at most 1e+12 in size, but got an integer"),
    (1, Decay, "to lie in [0, 1), but got 1"),
    (None, Count, "to be a whole number, but got null"),
    (0, Count | None, "to be at least 1, but got 0"),
    ("a", Count | None, "to be a whole number or null, but got 'a'"),
    ("z", Literal["x", "y"], "to be one of x, y, but got 'z'"),
    (True, Literal[1, 2], "to be one of 1, 2, but got True"),
    (1, bool, "to be true or false, but got 1"),
    (" ", Text, "not to be empty, but got ' '"),
    ([], Annotated[list[Count], Filled()], "not to be empty, but got []"),
    ("ab", Sequence[str], "to be a list, but got 'ab'"),
    ({1: 2}, dict[str, int], "`field[1]` to be a text, but got 1"),
    ({"a": "b"}, Mapping[str, int], "`field['a']` to be a whole number, but got 'b'"),
    ([1, 0], list[Count], "`field[1]` to be at least 1, but got 0"),
    ([[1], [math.nan]], list[list[float]], "`field[1][0]` to be finite, but got nan"),
    ((1.0,), tuple[float, float], "to have 2 entries, but got (1.0,)"),
    (["a", 1], Text | list[Text], "`field[1]` to be a text, but got 1"),
    (3, Callable[[int], int], "to be a callable, but got 3"),
    ({}, Path | None, "to be of the class Path or null, but got {}"),
]


@pytest.mark.parametrize(("value", "hint", "message"), BAD, ids=range(len(BAD)))
def test_everything_else_is_refused_with_its_name(value, hint, message):
    with pytest.raises(ValueError, match=r"^Expected `field") as caught:
        check("field", value, hint)
    assert message in str(caught.value)


def test_a_class_checks_what_it_is_given_from_the_outside_in():
    seen = []

    @checked
    class Parent:
        def __init__(self, width: Count = 1, **rest: Any) -> None:
            seen.append(width)

    @checked
    class Child(Parent):
        def __init__(self, *args: Any, share: Fraction | None = None, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    Child(2, share=0.5)
    assert seen == [2]
    for arguments in ({"share": 2.0}, {"width": 0}, {"width": 0, "share": 2.0}):
        name = "share" if "share" in arguments else "width"
        with pytest.raises(ValueError, match=f"Expected `{name}`"):
            Child(**arguments)
    with pytest.raises(TypeError, match="multiple values for argument 'width'"):
        Child(3, width=4)
    assert seen == [2]  # no body ran


def test_a_dataclass_checks_before_its_own_checks_and_when_it_is_replaced():
    @checked
    @dataclass(frozen=True)
    class Settings:
        low: Positive = 1.0
        high: Positive = 2.0

        def __post_init__(self) -> None:
            if self.low > self.high:  # which "a" would not survive
                raise ValueError("order")

    with pytest.raises(ValueError, match="Expected `low` to be a number, but got 'a'"):
        Settings("a")
    with pytest.raises(ValueError, match="order"):
        Settings(3.0)
    with pytest.raises(ValueError, match="Expected `high` to be above 0"):
        replace(Settings(), high=0.0)


def test_help_shows_the_range():
    assert str(Annotated[float, Range(above=0, most=1)]) == "typing.Annotated[float, in (0, 1]]"
