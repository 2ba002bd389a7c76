"""The harness of ``strict``: programs run as ``python Solution.py`` runs them, functions are called, tests are executed."""

import __future__

import builtins
import importlib
import sys
import types
from typing import Any

from .values import encoded, failure

FILE = "Solution.py"

MODULES = (
    "bisect collections copy datetime decimal fractions functools heapq io itertools json math operator random re "
    "statistics string sys time typing"
)
"""Known without an import where a function is asked for, as on the sites that the questions come from."""

STARRED = ("math", "functools", "itertools", "bisect", "heapq", "collections", "typing")
"""So are the names in these, except where they would hide a builtin."""

RECURSION_LIMIT = 50_000
"""Where a function is asked for, which cannot set it before it is defined. Programs have Python's own limit."""


def run(job: dict[str, Any], channel: Any) -> None:
    """Run one test. What it returns or raises goes to the channel; of a program that ends well, the exit status says all."""
    builtins.exit = builtins.quit = _exit  # type: ignore[assignment]
    kind = job["kind"]
    try:
        namespace = _loaded(job["code"], kind, job["context"])
        if kind == "stdin":
            return
        payload = channel.payload()
        if kind == "functional":
            value = call(_function(namespace, job["function"]), payload)
        else:
            namespace["__name__"] = "__main__"
            exec(compile(payload, "Tests.py", "exec"), namespace)
            value = None
        report = f'{{"value":{encoded(value)}}}'
    except SystemExit as end:
        if kind != "stdin" or end.code not in (None, 0):
            channel.report(failure(end, FILE))
        raise
    except BaseException as error:
        channel.report(failure(error, FILE))
        raise
    channel.report(report)


def call(function: Any, payload: Any) -> Any:
    """Call a function with a list of arguments, or with an object of named ones."""
    return function(**payload) if isinstance(payload, dict) else function(*payload)


def _exit(code: Any = None) -> None:
    raise SystemExit(code)


def _loaded(code: str, kind: str, context: str) -> dict[str, Any]:
    module = types.ModuleType("__main__" if kind == "stdin" else "solution")
    sys.modules[module.__name__] = module  # where `dataclass` and `pickle` look for a class
    namespace = module.__dict__
    flags = 0
    if kind == "functional":
        flags = __future__.annotations.compiler_flag  # which may name classes of the site, such as TreeNode
        namespace.update(_prelude())
        sys.setrecursionlimit(RECURSION_LIMIT)
    if context:
        exec(compile(context, "Context.py", "exec"), namespace)
    exec(compile(code, FILE, "exec", flags=flags, dont_inherit=True), namespace)
    return namespace


def _prelude() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for name in STARRED:
        module = importlib.import_module(name)
        public = getattr(module, "__all__", [each for each in vars(module) if not each.startswith("_")])
        names.update({each: getattr(module, each) for each in public if not hasattr(builtins, each)})
    return names | {name: importlib.import_module(name) for name in MODULES.split()}


def _function(namespace: dict[str, Any], name: str) -> Any:
    """Return the function that a question asks for: of the module, or a method of its class ``Solution``."""
    if callable(function := namespace.get(name)):
        return function
    solution = namespace.get("Solution")
    if isinstance(solution, type) and hasattr(solution, name):
        return getattr(solution(), name)
    raise NameError(f"the function {name!r} is not defined")
