"""Write the value that a function returned, so that it can be compared elsewhere. JSON, with types that JSON lacks as objects."""

from json.encoder import encode_basestring_ascii
from typing import Any

DEEPEST = 200
"""Largest nesting depth of a returned value."""

LARGEST_WHOLE = 2**63

_text = encode_basestring_ascii
_whole, _real, _bits = int.__repr__, float.__repr__, int.__format__
_kinds = (bool, int, float, str, list, tuple, dict, set, frozenset)
_type, _isinstance, _getattr, _callable = type, isinstance, getattr, callable


def encoded(value: Any, depth: int = 0) -> str:
    """Return a value as JSON text in ASCII.

    Plain values and lists are themselves. Everything else is an object with one name: ``int`` (hexadecimal, beyond 64 bits),
    ``float`` (not finite), ``tuple``, ``set``, ``dict`` (pairs), ``array`` (NumPy's), ``object`` (a type without a value here).

    No method of the value is called but ``tolist`` of arrays, so it cannot choose how it is written.

    Raises:
        ValueError: If it is nested too deeply.
    """
    if depth > DEEPEST:
        raise ValueError(f"the result has more than {DEEPEST} levels")
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if _isinstance(value, str):
        return _text(str.__str__(value))
    if _isinstance(value, int):
        return (
            _whole(value)
            if -LARGEST_WHOLE < int.__index__(value) < LARGEST_WHOLE
            else f'{{"int":"{_bits(value, "x")}"}}'
        )
    if _isinstance(value, float):
        written = _real(value)
        return f'{{"float":"{written}"}}' if written in ("nan", "inf", "-inf") else written
    if _isinstance(value, list):
        return f"[{_joined(list.__iter__(value), depth)}]"
    if _isinstance(value, tuple):
        return f'{{"tuple":[{_joined(tuple.__iter__(value), depth)}]}}'
    if _isinstance(value, dict):
        pairs = (f"[{encoded(key, depth + 1)},{encoded(each, depth + 1)}]" for key, each in dict.items(value))
        return f'{{"dict":[{",".join(pairs)}]}}'
    if _isinstance(value, (set, frozenset)):
        return f'{{"set":[{",".join(sorted(encoded(each, depth + 1) for each in value))}]}}'
    if _callable(to_list := _getattr(_type(value), "tolist", None)):  # NumPy
        plain = to_list(value)
        if _type(plain) is list:
            return f'{{"array":{encoded(plain, depth + 1)}}}'
        if _type(plain) in _kinds:
            return encoded(plain, depth + 1)
    return f'{{"object":{_text(_type(value).__name__)}}}'


def _joined(values: Any, depth: int) -> str:
    return ",".join(encoded(each, depth + 1) for each in values)


def failure(error: BaseException, file: str) -> str:
    """Return an exception as JSON text: type, message, and where in the answer's own file it was raised.

    Args:
        error: The exception.
        file: Name of the answer's file in tracebacks; other frames are left out.
    """
    try:
        message = str(error)
    except BaseException:
        message = ""
    places = []
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            places.append(f"[{trace.tb_lineno},{_text(trace.tb_frame.f_code.co_name)}]")
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.filename == file and error.lineno:
        places.append(f'[{error.lineno},"<module>"]')
    shown = ",".join(places[-3:])
    return f'{{"error":{_text(type(error).__name__)},"message":{_text(message[:2000])},"places":[{shown}]}}'
