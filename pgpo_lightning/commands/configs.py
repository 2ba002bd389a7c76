"""The command `pgpo configs`: which configurations come with the package, and a copy of one."""

import argparse
import shutil
from pathlib import Path

from pgpo_lightning.core.shipped_configs import find, names


def resolved(words: list[str]) -> list[str]:
    """Return a command line with the files of shipped configurations in place of their names. A file of that name comes first.

    Args:
        words: Of the command line.
    """
    result = []
    for before, word in zip(["", *words], words, strict=False):
        option, name = ("", word) if before in ("--config", "-c") else word.partition("=")[::2]
        known = option in ("", "--config") and (before in ("--config", "-c") or option == "--config")
        # Settings given as JSON are longer than a file name may be.
        file = find(name) if known and len(name) < 200 and not Path(name).exists() else None
        result.append(word if file is None else f"{option}={file}" if option else str(file))
    return result


def summary(name: str) -> str:
    """Return the first sentence of what a configuration says of itself."""
    comment = []
    for line in _file(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment).split(". ")[0].rstrip(".")


def copy(name: str, folder: str) -> Path:
    """Copy a shipped configuration.

    Args:
        name: See :func:`find`.
        folder: Where to; made if there is none.

    Returns:
        The copy.

    Raises:
        ValueError: If there is no such configuration, or a file where the copy would go.
    """
    path = _file(name)
    target = Path(folder) / path.name
    if target.exists():
        raise ValueError(
            f"Expected no file {target}, so that nothing is overwritten. Remove it, or choose another folder."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    return target


def _file(name: str) -> Path:
    if (path := find(name)) is None:
        raise ValueError(f"Expected the name of a shipped configuration, but got {name}. `pgpo configs` lists them.")
    return path


def main(args: list[str]) -> None:
    """Run the command: ``pgpo configs``, or ``pgpo configs copy NAME FOLDER``.

    Args:
        args: Without the program's name.
    """
    parser = argparse.ArgumentParser(
        "pgpo configs",
        description="List the configurations that come with the package. Each is a name for --config.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command")
    copying = commands.add_parser("copy", help="copy one, to change it")
    copying.add_argument("name", help="as listed")
    copying.add_argument("folder", help="where to")
    given = parser.parse_args(args)
    if given.command == "copy":
        print(copy(given.name, given.folder))
        return
    width = max(map(len, names()))
    for name in names():
        print(f"{name:{width}}  {summary(name)}")
