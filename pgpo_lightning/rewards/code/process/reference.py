"""The harness of ``reference``: the rules of the SDPO repository's grader, its faults included, written anew.

The answer's program has few builtins and may import few modules, the comparison is done here, in its own process, with functions
that it can replace. What differs is around it: every test has the limits of this package, where the original's deadline is one
of wall clock for all tests of an answer at once.
"""

import __future__

import ast
import builtins
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import traceback
import typing
import warnings
from typing import Any

from .strict import FILE

BUILTINS = (
    "abs all any bool bytes callable chr dict enumerate filter float format frozenset hash hex int isinstance "
    "issubclass iter len list map max min next object ord pow print range repr reversed round set slice sorted "
    "str sum tuple zip input __build_class__"
)
MODULES = (
    "math cmath itertools functools operator statistics random collections heapq bisect array string re typing "
    "json io fractions decimal dataclasses datetime time sys sortedcontainers numpy"
)
TYPING = (
    "Any Optional Union List Dict Set Tuple Callable Iterable Iterator Sequence Mapping MutableMapping "
    "MutableSequence MutableSet DefaultDict Deque FrozenSet Type TypeVar Generic Literal TypedDict NoReturn "
    "overload"
)
GONE = (
    "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames truncate replace "
    "unlink fchmod fchown chmod chown chroot lchflags lchmod lchown getcwd chdir"
)
HIDDEN = "ipdb joblib resource psutil tkinter inspect ctypes threading multiprocessing socket ssl urllib requests"
DEBUG = ("debug_print", "__debug_buffer__")
"""Names that an answer cannot assign to: a second output, shown in the feedback."""

ERROR = "Error: "
"""How a text begins that is shown as a runtime error."""

UNBOUND = "ERROR: UnboundLocalError: cannot access local variable 'e' where it is not associated with a value"
"""What the original reports of a result that cannot be sent, because its own message about that fails."""


def run(job: dict[str, Any], channel: Any) -> None:
    """Run one test, and report whether it has passed, what came out, and what was printed for debugging."""
    end, encode, dumps = os._exit, json.JSONEncoder().encode, pickle.dumps
    namespace = _namespace()
    if job["context"].strip():
        _execute(job["context"], namespace, "Context.py")
    test = channel.payload()
    _disable()
    sys.stderr = namespace[DEBUG[1]]
    try:
        passed, actual = _KINDS[job["kind"]](job, test, namespace)
    except BaseException as error:
        passed, actual = False, ERROR + _trace(error)
    try:
        dumps(actual)
        record = {"passed": bool(passed), "actual": str(actual), "text": isinstance(actual, str)}
    except Exception:
        record = {"passed": False, "actual": UNBOUND, "text": True}
    record["debug"] = namespace[DEBUG[1]].getvalue()
    channel.report(encode({"record": record}))
    end(0)


def _namespace() -> dict[str, Any]:
    allowed = {name: getattr(builtins, name) for name in BUILTINS.split()}
    real_import = builtins.__import__

    def limited_import(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] not in MODULES.split():
            raise ImportError(f"Import of module '{name}' is not allowed")
        return real_import(name, *args, **kwargs)

    buffer = io.StringIO()

    def debug_print(*values: Any, sep: str = " ", end: str = "\n") -> None:
        buffer.write(sep.join(map(str, values)) + end)

    namespace: dict[str, Any] = {"__builtins__": allowed | {"open": None, "__import__": limited_import}}
    namespace |= {name: getattr(typing, name) for name in TYPING.split()}
    return namespace | {"__name__": "__not_main__", DEBUG[0]: debug_print, DEBUG[1]: buffer}


class _Guarded:
    """Local names of a program: its global ones, of which two cannot be changed."""

    def __init__(self, names: dict[str, Any]) -> None:
        self._names = names

    def __getitem__(self, name: str) -> Any:
        return self._names[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in DEBUG:
            self._names[name] = value

    def __delitem__(self, name: str) -> None:
        if name not in DEBUG:
            del self._names[name]

    def keys(self) -> Any:
        return self._names.keys()


def _disable() -> None:
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    for name in ("exit", "quit", "open"):
        setattr(builtins, name, None)
    for name in GONE.split():
        setattr(os, name, None)
    for name in ("rmtree", "move", "chown"):
        setattr(shutil, name, None)
    subprocess.Popen = None  # type: ignore[misc, assignment]
    for name in HIDDEN.split():
        sys.modules[name] = None  # type: ignore[assignment]
    sys._getframe = None  # type: ignore[assignment]


def _execute(code: str, namespace: dict[str, Any], file: str = FILE, flags: int = 0) -> None:
    local_names: Any = _Guarded(namespace)
    exec(compile(code, file, "exec", flags=flags, dont_inherit=True), namespace, local_names)


def _program(job: dict[str, Any], test: Any, namespace: dict[str, Any]) -> tuple[bool, Any]:
    expected = test["expected"].strip()
    if expected.endswith("-"):
        expected = expected[:-1].rstrip()
    output, sys.stdin = io.StringIO(), io.StringIO(test["input"])
    real, sys.stdout = sys.stdout, output
    try:
        _execute('__name__ = "__main__"\n' + job["code"], namespace)
        return _one_line(output.getvalue()) == _one_line(expected), output.getvalue().strip()
    except BaseException as error:
        return False, ERROR + _trace(error)
    finally:
        sys.stdout = real


def _one_line(text: str) -> str:
    return text.strip().replace("\n", " ").replace("\r", "")


def _call(job: dict[str, Any], test: Any, namespace: dict[str, Any]) -> tuple[bool, Any]:
    _execute(job["code"], namespace, flags=__future__.annotations.compiler_flag)
    name = _name(job, namespace)
    given = test["input"]
    real, sys.stdout = sys.stdout, io.StringIO()
    try:
        if isinstance(given, dict):
            result = namespace[name](**given)
        else:
            result = namespace[name](*[json.loads(each) for each in given.split()])
        try:
            both = [_plain(result), _plain(json.loads(test["expected"]))]
            texts = [json.dumps(each, sort_keys=True, separators=(",", ":")) for each in both]
        except Exception as error:
            return False, f"{ERROR}{error}"
        return texts[0] == texts[1], result
    except BaseException as error:
        return False, ERROR + _trace(error)
    finally:
        sys.stdout = real


def _name(job: dict[str, Any], namespace: dict[str, Any]) -> str:
    """Return the name of the function to call; if it is not there, of the first one, or a word of the program's first lines."""
    wanted = job["function"]
    if wanted and callable(namespace.get(wanted)):
        return wanted
    defined = [each.name for each in ast.parse(job["code"]).body if isinstance(each, ast.FunctionDef)]
    found = wanted if wanted in defined else defined[0] if defined else None
    return found if found and callable(namespace.get(found)) else job["code"].split("(")[0].split()[-1]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    raise TypeError(f"Non-serializable result type: {type(value).__name__}")


def _tests(job: dict[str, Any], test: Any, namespace: dict[str, Any]) -> tuple[bool, Any]:
    namespace["__name__"] = "__main__"
    _execute(job["code"], namespace)
    try:
        _execute(test["input"], namespace, "Tests.py")
    except BaseException as error:
        return False, ERROR + _trace(error)
    return True, "All tests pass"


_KINDS = {"stdin": _program, "functional": _call, "code": _tests}


def _trace(error: BaseException) -> str:
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == FILE][-3:]
    return "\n".join(
        [f"{type(error).__name__}: {error}", *(f"Line {each.lineno} in {each.name} ({FILE})" for each in places)]
    )
