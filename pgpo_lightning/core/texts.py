"""Texts and values of unknown origin: check that they can be encoded, show them in messages, write them as JSON."""

import json
import math
from base64 import b64encode
from collections.abc import Callable, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any


def is_text(text: str) -> bool:
    """Return whether a text can be encoded: Python's strings may hold lone surrogates, which UTF-8 does not have."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any, text: Callable[[Any], str] = repr, longest: int = 500) -> str:
    """Return a value as text for a message, whatever its own methods do and however long it is.

    Args:
        value: Anything.
        text: Turns it into text.
        longest: Characters to show; the rest is counted.

    Example:
        >>> shown("a"), shown([1, 2, 3], longest=4), shown(10**5000)
        ("'a'", '[1, ... (9 characters)', 'an integer of about 5001 digits')
    """
    if isinstance(value, int) and abs(value) >= 10**1000:  # Python does not write out more than 4300 digits
        return f"an integer of about {int(value.bit_length() * math.log10(2)) + 1} digits"
    try:
        shown_text = text(value)
    except BaseException as error:
        return f"a value of type {type(value).__name__} (its text raised {type(error).__name__})"
    shown_text = shown_text.encode("utf-8", "backslashreplace").decode()
    return shown_text if len(shown_text) <= longest else f"{shown_text[:longest]}... ({len(shown_text)} characters)"


def counted(number: int, one: str, several: str | None = None) -> str:
    """Return a number of things in words.

    Args:
        number: How many.
        one: Name of one.
        several: Name of several; by default with an `s`.

    Example:
        >>> counted(1, "step"), counted(2, "step"), counted(2, "batch", "batches")
        ('1 step', '2 steps', '2 batches')
    """
    return f"{number} {one if number == 1 else several or f'{one}s'}"


def json_line(value: Any) -> str:
    """Return any value as one line of strict JSON, for answers that people and programs read later.

    Values that JSON does not have are written as text: numbers that are not finite and decimals as Python writes them, dates and
    times in ISO 8601, durations in seconds, bytes in Base64, everything else as Python shows it. Arrays become lists.
    """
    content = _json_value(value)
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    return text if is_text(text) else json.dumps(content, allow_nan=False)  # a lone surrogate is kept as its escape


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return value if abs(value) < 10**1000 else hex(value)  # Python neither writes nor reads very long decimals
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (Decimal, Fraction)):
        return str(value)
    if isinstance(value, (date, time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return b64encode(value).decode()
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, str) and is_text(key) else shown(key, str): _json_value(each)
            for key, each in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_json_value(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_json_value(each) for each in value), key=repr)
    if callable(to_list := getattr(value, "tolist", None)):  # NumPy and torch
        return _json_value(to_list())
    return shown(value)
