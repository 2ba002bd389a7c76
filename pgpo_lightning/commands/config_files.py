"""Configuration files before they are parsed: aliases that loop or fill the memory, keys that occur twice, a user's own code."""

import os
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import yaml

LARGEST = 2**20
"""Largest size of a configuration, in bytes."""
MOST_VALUES = 100_000
"""Largest number of values in a configuration, with all aliases expanded."""


def check_config_files(words: list[str]) -> None:
    """Check the files that a command line names with ``--config``.

    Args:
        words: Of the command line.

    Raises:
        ValueError: If one is no regular file, too large, no UTF-8, expands without end, or has a key twice.
    """
    for path in _files(words):
        _check(path)


def find_own_code(words: list[str]) -> None:
    """Make the code importable that a configuration names and that lies beside it or in a folder above.

    A configuration of an earlier run, such as ``runs/x/config.yaml``, can then be used from any folder. Only modules are looked
    for that are neither in the working folder nor installed. Python searches the folder last, so that it hides nothing.

    Args:
        words: Of the command line.
    """
    for path in _files(words):
        for name in sorted(set(_MODULE.findall(path.read_text(encoding="utf-8")))):
            if find_spec(name) is None and (folder := _folder_with(name, path.resolve().parent)) is not None:
                sys.path.append(str(folder))


_MODULE = re.compile(r"(?<![\w./-])([A-Za-z_]\w*)(?:\.[A-Za-z_]\w*)+(?![\w/:-])")
"""The first part of what may be an import path."""


def _folder_with(module: str, below: Path) -> Path | None:
    for folder in (below, *below.parents):
        if (folder / f"{module}.py").is_file() or (folder / module / "__init__.py").is_file():
            return folder
    return None


def _files(words: list[str]) -> Iterator[Path]:
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name = following if word in ("--config", "-c") else word.removeprefix("--config=")
        # Not `Path.exists`, which raises for settings given as JSON that are longer than a file name may be.
        if name != word and os.path.exists(name):
            yield Path(name)


def _check(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"Expected a configuration file, but {path} is not a file.")
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"Expected a configuration of at most {LARGEST:,} bytes, but {path} has {size:,}.")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected {path} to be text in UTF-8, but byte {error.start} is not.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"Expected {path} to be YAML, but {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"Expected {path} to be a configuration, but its values are nested without end.") from None
    if root is not None:
        _values(root, path, {})


def _values(node: yaml.Node, path: Path, known: dict[int, int | None]) -> int:
    """Return the number of values of a node with all aliases expanded."""
    if id(node) in known:
        if (count := known[id(node)]) is None:
            raise ValueError(
                f"Expected {path} to end, but the alias at line {node.start_mark.line + 1} contains itself."
            )
        return count
    known[id(node)] = None
    count = 1
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in keys:
                    raise ValueError(
                        f"Expected every key once in {path}, but `{key.value}` at line {key.start_mark.line + 1} is there twice. "
                        "Remove one of them."
                    )
                keys.add(key.value)
            count += _values(value, path, known)
    elif isinstance(node, yaml.SequenceNode):
        count += sum(_values(value, path, known) for value in node.value)
    if count > MOST_VALUES:
        raise ValueError(
            f"Expected {path} to stand for at most {MOST_VALUES:,} values, but its aliases make more of it."
        )
    known[id(node)] = count
    return count
