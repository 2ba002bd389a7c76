"""The harness of ``livecodebench``: the rules of the benchmark's own runner, written anew.

Its runner puts a program into a function, with its imports and many others before it, and calls that with stand-ins for the
standard streams. Differences that a program can see, such as ``for line in sys.stdin`` failing, are kept. Comparison is not done
here, and every test has a fresh process: its runner keeps the globals of a solution from test to test.
"""

import ast
import builtins
import importlib
import io
import sys
import types
from typing import Any
from unittest import mock

from .strict import FILE
from .values import encoded, failure

STARRED = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys "
    "json builtins typing"
)
"""Modules whose names every answer has, later ones in place of earlier ones."""

NAMED = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json"
)
RECURSION_LIMIT = 50_000
ENTRY = "_program"


def run(job: dict[str, Any], channel: Any) -> None:
    """Run one test. The captured output of a program is written to the standard output when it has ended."""
    try:
        if job["kind"] == "stdin":
            _run_program(job["code"])
            return
        module = _module(job["code"])
        owner: Any = module.Solution() if "class Solution" in job["code"] else module
        value = getattr(owner, job["function"])(*channel.payload())
        report = f'{{"value":{encoded(value)}}}'
    except BaseException as error:
        channel.report(failure(error, FILE))
        raise
    channel.report(report)


def _module(code: str) -> types.ModuleType:
    module = types.ModuleType("tmp_sol")
    for name in STARRED.split():
        found = importlib.import_module(name)
        public = getattr(found, "__all__", [each for each in vars(found) if not each.startswith("_")])
        module.__dict__.update({each: getattr(found, each) for each in public})
    module.__dict__.update({name: importlib.import_module(name) for name in NAMED.split()})
    sys.setrecursionlimit(RECURSION_LIMIT)
    exec(compile(code, FILE, "exec", dont_inherit=True), module.__dict__)
    return module


def _run_program(code: str) -> None:
    module = _module(as_function(code))
    program = getattr(module, ENTRY)
    given = sys.stdin.read()
    real, sys.stdout = sys.stdout, io.StringIO()
    captured = sys.stdout
    try:
        with (
            mock.patch.object(builtins, "open", mock.mock_open(read_data=given)),
            mock.patch.object(sys, "stdin", _Stdin(given)),
        ):
            program()
    except SystemExit:
        pass
    finally:
        sys.stdout = real
        real.write(captured.getvalue())


def as_function(code: str) -> str:
    """Return a program as a module of its imports and one function of all the rest; as it is if it cannot be parsed."""
    try:
        body = ast.parse(code).body
        if body and isinstance(last := body[-1], ast.If) and ast.unparse(last.test) == "__name__ == '__main__'":
            body = [*body[:-1], *last.body]
        imports = [each for each in body if isinstance(each, (ast.Import, ast.ImportFrom))]
        rest = [each for each in body if each not in imports]
        function = ast.parse(f"def {ENTRY}(): pass").body[0]
        assert isinstance(function, ast.FunctionDef)  # noqa: S101
        function.body = rest or function.body
        return ast.unparse(ast.fix_missing_locations(ast.Module([*imports, function], [])))
    except (SyntaxError, ValueError, RecursionError):
        return code


class _Stdin:
    """Stands in for the standard input: the methods that the benchmark's own stand-in has, and no iteration."""

    def __init__(self, text: str) -> None:
        self._text, self._stream = text, io.StringIO(text)
        self.buffer = _Buffer(text)

    def read(self, *_: Any) -> str:
        return self._text

    def readlines(self, *_: Any) -> list[str]:
        return self._text.split("\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Buffer:
    def __init__(self, text: str) -> None:
        self._bytes = text.encode()

    def read(self, *_: Any) -> bytes:
        return self._bytes

    def readline(self, *_: Any) -> bytes:
        return self._bytes.split(b"\n")[0] + b"\n"
