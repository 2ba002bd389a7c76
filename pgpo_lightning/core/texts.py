"""Texts and values that come from outside: can they be encoded, shown in a message, written into a file?"""

import json
import math
from base64 import b64encode
from collections.abc import Callable, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any


def is_text(text: str) -> bool:
    """Whether a text can be encoded: Python's may hold halves of characters (lone surrogates), which UTF-8 has not."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any, text: Callable[[Any], str] = repr, longest: int = 500) -> str:
    """Return a value as text for a message, whatever its own methods do and however long it is."""
    try:
        told = text(value)
    except BaseException as error:
        return f"a value of type {type(value).__name__} (its text raised {type(error).__name__})"
    told = told.encode("utf-8", "backslashreplace").decode()
    return told if len(told) <= longest else f"{told[:longest]}... ({len(told)} characters)"


def json_line(value: Any) -> str:
    """Return any value as one line of strict JSON, for answers that people and programs read later.

    What JSON does not know is written as text: numbers that are not finite and decimals as Python writes them, dates and times in
    ISO 8601, durations in seconds, bytes in Base64, what else there is as Python shows it. Arrays become lists.
    """
    plain = _plain(value)
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
    return text if is_text(text) else json.dumps(plain, allow_nan=False)  # half of a character is kept as its escape


def _plain(value: Any) -> Any:
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
            key if isinstance(key, str) and is_text(key) else shown(key, str): _plain(each)
            for key, each in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(each) for each in value), key=repr)
    if callable(to_list := getattr(value, "tolist", None)):  # NumPy and torch
        return _plain(to_list())
    return shown(value)
