"""The settings of a class with their texts, read from its source, so that ``--help`` does not wait for torch."""

import ast
import re
import typing
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from docstring_parser import parse

import pgpo_lightning
from pgpo_lightning.core import settings

ROOT = Path(pgpo_lightning.__file__).parent


class Documented(NamedTuple):
    """A setting as help shows it."""

    name: str  # such as update.micro_batch_tokens
    kind: str
    default: str | None  # None if the setting is required
    text: str


class Source(NamedTuple):
    """A class or a function in its file."""

    node: ast.ClassDef | ast.FunctionDef
    path: Path


def documented(cls: Source, skip: tuple[str, ...] = ()) -> Iterator[Documented]:
    """Yield the settings of a class or a function, those of its groups after each group.

    Args:
        cls: A function, or a class with an ``__init__`` of its own, or a dataclass.
        skip: Names to leave out.
    """
    texts = _texts(cls)
    for name, annotation, default in _fields(cls.node):
        if name in skip:
            continue
        group = _group(annotation, cls.path)
        yield Documented(name, _kind(annotation, group, cls.path), default, texts.get(name, ""))
        if group is not None:
            for one in documented(group):
                yield one._replace(name=f"{name}.{one.name}")
    if (init := _init(cls.node)) is not None and init.args.kwarg is not None:  # the rest are those of the base classes
        own = {name for name, *_ in _fields(cls.node)}
        for base in _bases(cls):
            yield from documented(base, (*skip, *own))


def public_class(name: str) -> Source | None:
    """Return a class of this package by its public name, such as ``SDPO``; None if there is none."""
    home = pgpo_lightning._HOME.get(name.rpartition(".")[2])
    return find(name.rpartition(".")[2], f"pgpo_lightning.{home}") if home else None


@cache
def find(name: str, module: str) -> Source | None:
    """Return a class or a function by its name and a module that defines or imports it.

    Args:
        name: Of the class or function.
        module: Import path.
    """
    if (path := _file(module)) is None:
        return None
    for node in _body(path):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return Source(node, path)
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            return find(name, node.module)
    return None


@cache
def _body(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text(encoding="utf-8")).body


@cache
def _file(module: str) -> Path | None:
    package, _, inner = module.partition(".")
    if package == "pgpo_lightning":
        root = ROOT
    elif package == "lightning" and (spec := find_spec(package)) and spec.origin:  # which imports nothing
        root = Path(spec.origin).parent
    else:
        return None
    below = root / Path(*inner.split(".")) if inner else root
    files = (below.with_suffix(".py"), below / "__init__.py")
    return next((path for path in files if path.is_file()), None)


def _bases(cls: Source) -> Iterator[Source]:
    for base in cls.node.bases if isinstance(cls.node, ast.ClassDef) else ():
        if (found := _imported(ast.unparse(base), cls.path)) is not None:
            yield found


def _texts(cls: Source) -> dict[str, str]:
    """Return what the docstrings of a class and its bases say of its arguments."""
    texts: dict[str, str] = {}
    for base in _bases(cls):
        texts |= _texts(base)
    init = _init(cls.node)
    for node in (cls.node, init):
        if node is not None and (docstring := ast.get_docstring(node)):
            texts |= {one.arg_name: _cleaned(one.description or "") for one in parse(docstring).params}
    return texts


def _cleaned(text: str) -> str:
    """Return a text without the marks of reStructuredText."""
    text = re.sub(r":\w+:`~(?:[\w.]+\.)?(\w+)`", r"`\1`", " ".join(text.split()))
    return re.sub(r":\w+:(`[^`]+`)", r"\1", text).replace("``", "`")


def _init(node: ast.ClassDef | ast.FunctionDef) -> ast.FunctionDef | None:
    if isinstance(node, ast.FunctionDef):
        return node
    return next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)


def _fields(node: ast.ClassDef | ast.FunctionDef) -> Iterator[tuple[str, ast.expr | None, str | None]]:
    """Yield name, annotation and default of the arguments of a class."""
    if (init := _init(node)) is not None:
        plain = init.args.args[init is not node :]  # a method's first is `self`
        defaults = [None] * (len(plain) - len(init.args.defaults)) + list(init.args.defaults)
        for one, value in [
            *zip(plain, defaults, strict=True),
            *zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True),
        ]:
            yield one.arg, one.annotation, None if value is None else _default(value)
        return
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            yield field.target.id, field.annotation, None if field.value is None else _default(field.value)


def _default(value: ast.expr) -> str:
    if not isinstance(value, ast.Constant):
        return "" if isinstance(value, ast.Call) else ast.unparse(value)
    if value.value is None or isinstance(value.value, bool):
        return {None: "null", True: "true", False: "false"}[value.value]
    return text if len(text := str(value.value)) <= 60 else f"{text[:57].rstrip()}..."


def _group(annotation: ast.expr | None, path: Path) -> Source | None:
    """Return the dataclass of this package that an annotation names, which is a group of settings."""
    for node in ast.walk(annotation) if annotation is not None else ():
        found = _imported(node.id, path) if isinstance(node, ast.Name) and node.id not in vars(settings) else None
        if found is not None and any("dataclass" in ast.unparse(one) for one in found.node.decorator_list):
            return found
    return None


def _imported(name: str, path: Path) -> Source | None:
    for node in _body(path):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return Source(node, path)
        if isinstance(node, ast.ImportFrom) and node.module and any(one.name == name for one in node.names):
            return find(name, node.module) if node.module.startswith("pgpo_lightning") else None
    return None


def _alias(name: str, path: Path) -> str | None:
    """Return what a name stands for that a module of this package defines or imports, such as ``Literal["a", "b"]``."""
    for node in _body(path):
        if isinstance(node, ast.Assign) and any(ast.unparse(one) == name for one in node.targets):
            return ast.unparse(node.value)
        if isinstance(node, ast.ImportFrom) and node.module and any(one.name == name for one in node.names):
            file = _file(node.module) if node.module.startswith("pgpo_lightning") else None
            return None if file is None else _alias(name, file)
    return None


def _kind(annotation: ast.expr | None, group: Source | None, path: Path) -> str:
    if annotation is None:
        return ""
    if group is not None:
        return "group, or null" if "None" in ast.unparse(annotation) else "group"
    text = re.sub(r"\b[A-Z]\w+\b", lambda found: _plain_alias(found[0], path), ast.unparse(annotation))
    text = re.sub(r"Annotated\[(\w+), Range\((.*?)\)\]", _range, text)
    text = re.sub(r"\bLiteral\[([^\]]*)\]", lambda found: " | ".join(found[1].split(", ")), text)
    while (simpler := _without_a_bracket(text)) != text:
        text = simpler
    return text.replace("None", "null").replace("'", "")


def _without_a_bracket(text: str) -> str:
    """Write Optional, Union and non-empty lists without their brackets, those within which no others have two of their own."""
    inner = r"((?:[^\[\]]|\[[^\[\]]*\])*)"
    text = re.sub(rf"\bOptional\[{inner}\]", r"\1 | None", text)
    text = re.sub(rf"\bAnnotated\[{inner}, Filled\(\)\]", rf"\1 {settings.Filled()!r}", text)
    return re.sub(rf"\bUnion\[{inner}\]", _union, text)


def _plain_alias(name: str, path: Path) -> str:
    """Return a name of `core.settings` in words, an alias of choices as the choices, and any other name as it is."""
    hint: Any = getattr(settings, name, None)
    if typing.get_origin(hint) is typing.Annotated:
        kind, *rest = typing.get_args(hint)
        return " ".join([getattr(kind, "__name__", str(kind)), *map(repr, rest)])
    meaning = _alias(name, path) if hint is None else None
    return meaning if meaning is not None and meaning.startswith("Literal[") else name


def _union(found: re.Match[str]) -> str:
    parts, depth = [""], 0
    for character in found[1]:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return " | ".join(part.strip() for part in parts)


def _range(found: re.Match[str]) -> str:
    bounds = {one.partition("=")[0].strip(): float(one.partition("=")[2]) for one in found[2].split(",")}
    return f"{found[1]} {settings.Range(**bounds)!r}"
