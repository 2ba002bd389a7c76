"""A mistake on the command line or in a configuration as one short message, in place of a parser's usage and its attempts.

jsonargparse reports everything that it tried, as text. This text is read here, from the outside in: the path of the setting, the
class that was to be built, and the innermost reason. What a reader of the message does not need (types of Python, the forms in
which the parser holds a value) is left out.
"""

import os
import re
import sys
from difflib import SequenceMatcher, get_close_matches
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from pgpo_lightning.commands.settings_of import Setting, settings_of, subclasses_of
from pgpo_lightning.core.errors import MOST_LINES, USER_ERROR
from pgpo_lightning.core.shipped_configs import names

_KEY = re.compile(r'^( *)(?:- )?Parser key "([^"]+)":')
_CLASS = re.compile(r"class_path[ =]'([\w.]+)'")
_REFUSED = (
    re.compile(r"Subcommand '\w+' does not accept option '(?P<name>[\w.]+)'"),
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<name>[\w.]+)'"),
    re.compile(r"[Oo]ption '(?P<name>[\w.]+)' is not accepted"),
    re.compile(r"unrecognized arguments:.*? ?--(?P<name>[\w.+-]+)"),
)
_NOISE = re.compile(
    r"^(Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but|"
    r"Problem with given class_path|Parser key)|^$"
)
_PLAIN = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "list": "a list",
    "dict": "settings by name",
}


class _Mistake(NamedTuple):
    """What the parser's text says of the innermost setting."""

    path: str  # of the setting, such as model.engine
    classes: list[str]  # import paths, the outermost first
    reason: list[str]  # lines of the innermost part


def brief(parser: Any, words: list[str], known: Any = None) -> Any:
    """Make a parser end the program with a short message when the arguments are wrong.

    Args:
        parser: A jsonargparse parser, which is changed.
        words: The command line, without the program's name.
        known: Returns the parser that has the options, if it is not this one.

    Returns:
        The parser.
    """
    refuse = parser.error

    def error(message: str, ex: Exception | None = None) -> NoReturn:
        has_options = getattr(ex, "subcommand_parser", None) or (known() if known else None) or parser
        said = explained(str(message), words, list(has_options._option_string_actions))
        if not parser.exit_on_error or os.environ.get("PGPO_TRACEBACK"):
            refuse(said, ex)
        print(f"error: {said}", file=sys.stderr)
        sys.exit(USER_ERROR)

    parser.error = error
    return parser


def explained(message: str, words: list[str], options: list[str]) -> str:
    """Return what a parser says as a message of at most `MOST_LINES` lines.

    Args:
        message: Of jsonargparse or argparse.
        words: The command line, whose configuration files are searched for the line of the mistake.
        options: Option strings of the parser, such as ``--trainer.max_steps``.
    """
    own = re.search(r"^ *(?:- )?(Expected .*`.*)$", message, re.MULTILINE)
    mistake = _read(message)
    text = own[1] if own else _unknown_setting(message, mistake, words, options) or _wrong_value(mistake, words)
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join([*lines[: MOST_LINES - 1], "..."] if len(lines) > MOST_LINES else lines)


def _read(message: str) -> _Mistake:
    lines = message.splitlines()
    path: list[str] = []
    start, depth = 0, -1
    for number, line in enumerate(lines):
        if (found := _KEY.match(line)) and len(found[1]) > depth:
            depth, start = len(found[1]), number
            path.append(found[2])
    inner = [lines[start].split('":', 1)[-1].strip() if path else lines[start]] if lines else []
    for line in lines[start + 1 :]:
        if line.strip() and len(line) - len(line.lstrip()) <= depth:
            break
        inner.append(line.strip().removeprefix("- "))
    return _Mistake(".".join(path), _CLASS.findall(message), [line for line in inner if line])


def _unknown_setting(message: str, mistake: _Mistake, words: list[str], options: list[str]) -> str | None:
    found = next((match for pattern in _REFUSED if (match := pattern.search(message))), None)
    if found is None:
        return None
    name = ".".join(part for part in (found.groupdict().get("group"), found["name"].rstrip("+")) if part)
    path = f"{mistake.path}.{name}" if mistake.path else name
    of_class = _class(mistake.classes[-1]) if mistake.classes else None
    if of_class is None:
        return _unknown_option(path, words, options)
    from pgpo_lightning.modules.moved import MOVED  # not at the top, because it imports torch

    known = settings_of(of_class)
    if mistake.path == "model" and MOVED.get(name) in known:
        return f"Expected `model.{MOVED[name]}`, where `{name}` stands now. Write it there."
    first = f"Expected a setting of {of_class.__name__}, but got `{path}`{_place(words, path)}"
    return f"{first}{_advice(name, mistake.path, known)}\n{_listing(mistake, options)}"


def _advice(name: str, head: str, known: dict[str, Setting]) -> str:
    """Return the rest of a sentence: what was meant."""
    leaf = name.rpartition(".")[2]
    same = [each for each in known if each.rpartition(".")[2] == leaf]
    for each in same:
        if computed := known[each].computed_from:
            return f", which is computed from {_listed(f'{head}.{one}' for one in computed)}. Set these."
    settable = [each for each in known if not known[each].computed_from]
    return _meant(f"{head}.{one}" for one in same or _close(name, settable))


def _listing(mistake: _Mistake, options: list[str]) -> str:
    """Return which command lists the settings: that of the class itself, if the parser has it, else of the outermost one."""
    exact = f"--{mistake.path}.help" in options
    head = mistake.path if exact else mistake.path.partition(".")[0]
    name = mistake.classes[-1 if exact else 0].rpartition(".")[2]
    return f"`pgpo fit --{head}.help {name}` lists all of them."


def _unknown_option(name: str, words: list[str], options: list[str]) -> str:
    known = [option.lstrip("-") for option in options if option.startswith("--")]
    inside = []
    for part in ("model", "data", "multiplier"):
        for word, following in zip(words, [*words[1:], ""], strict=False):
            if word == f"--{part}" and (named := _by_name(following)) is not None:
                inside += [f"{part}.{one}" for one in settings_of(named)]
    if "model" in known and not any(one.startswith("model.") for one in inside):
        inside += [f"model.{one}" for one in settings_of(_class("pgpo_lightning.SDPO"))]
    leaf = name.rpartition(".")[2]
    same = [one for one in [*known, *inside] if one.rpartition(".")[2] == leaf]
    meant = _meant(same[:3] or _close(name, [*known, *inside]))
    listing = f"`{' '.join(['pgpo', *words[:1]])} --help` lists all of them."
    return f"Expected a setting, but got `{name}`{_place(words, name)}{meant}\n{listing}"


def _wrong_value(mistake: _Mistake, words: list[str]) -> str:
    text = "\n".join(mistake.reason)
    setting = f"`{mistake.path}`" if mistake.path else "the command line"
    place = _place(words, mistake.path)
    if found := re.search(r"No module named '([\w.]+)'", text):
        modules = [path.stem for path in Path.cwd().glob("*.py")]
        modules += [path.parent.name for path in Path.cwd().glob("*/__init__.py")]
        fault = f"there is no module `{found[1]}`, which is neither in {Path.cwd()} nor installed"
        return f"Expected {setting} to name code, but {fault}{place}{_meant(_close(found[1], modules))}"
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        public = [name for name in vars(import_module(found[1])) if not name.startswith("_")]
        fault = f"module `{found[1]}` has no `{found[2]}`"
        return f"Expected {setting} to name code, but {fault}{place}{_meant(_close(found[2], public))}"
    if found := re.search(r"Expected a dot import path string: (.+)", text):
        known = {one.__name__ for one in subclasses_of(mistake.path, text)}
        meant = _meant(_close(found[1], sorted(known)))
        rest = meant if meant != "." else f". Known: {', '.join(sorted(known))}." if known else "."
        return f"Expected {setting} to be a class or its import path, but got {found[1]}{place}{rest}"
    if found := re.search(r"File does not exist: '?([^']+)'?", text):
        shipped = _meant(_close(Path(found[1]).name.removesuffix(".yaml"), names()))
        return (
            f"Expected {setting} to be a file or a name that `pgpo configs` lists, but got {_short(found[1])}{shipped}"
        )
    value = re.search(r"^(?:.*Got value|Given value): ?(.+)$", text, re.MULTILINE)
    kinds = list(dict.fromkeys(_kinds(text)))
    if value and kinds:
        expected = kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:-1])} or {kinds[-1]}"
        return f"Expected {setting} to be {expected}, but got {_value(value[1])}{place}."
    kept = [_shorter(line) for line in mistake.reason if not _NOISE.match(line)] or [_shorter(text)]
    if re.match(r"argument --\S+: expected", text):
        ends = [word for word, after in zip(words, [*words[1:], "--"], strict=False) if after.startswith("--")]
        alone = [f"`{word}`" for word in ends if word.startswith("--") and "=" not in word]
        return f"Expected a value after {alone[0]}, but there is none." if alone else text
    if found := re.match(r"unrecognized arguments: (.+)", text):
        return f"Expected settings as `--name value`, but got {_short(found[1])}."
    return f"Expected {setting} to be valid, but: {kept[0]}{place}\n" + "\n".join(kept[1:]) if mistake.path else text


def _kinds(text: str) -> list[str]:
    """Return the forms that a value may have, in words."""
    found = []
    for kind in re.findall(r"Expected an? (<class '[\w.]+'>|typing\.Literal\[.*?\])", text):
        if kind.startswith("typing"):
            found += [one.strip(" '\"") for one in kind.removeprefix("typing.Literal[").rstrip("]").split(",")]
        else:
            name = kind[8:-2].rpartition(".")[2]
            found.append(_PLAIN.get(name, name))
    return found


def _value(text: str) -> str:
    nested = re.match(r"NestedArg\(key=.*?, val='?(.*?)'?\)$", text)
    return _short(nested[1] if nested else text)


def _shorter(line: str) -> str:
    line = re.sub(r"NestedArg\(key='([^']*)', val=(.*)\)", r"\1: \2", line)
    line = re.sub(r"Type \S*Callable\[.*\] expects a function or a callable class: ", "", line)
    return _short(re.sub(r"<class '([\w.]+)'>", r"\1", line).replace("Namespace", ""), 300)


def _short(text: str, most: int = 100) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _close(name: str, known: list[str]) -> list[str]:
    """Return up to three names that may have been meant: those of the same group that are alike, or any with a like last part."""
    group, _, leaf = name.rpartition(".")
    inside = [one for one in known if group and one.rpartition(".")[0] == group]
    leaves: dict[str, list[str]] = {}
    for one in inside or known:
        leaves.setdefault(one.rpartition(".")[2], []).append(one)
    folded = [one for one in known if one.lower() == name.lower()]
    alike = [one for cutoff in (0.9, 0.7) for one in get_close_matches(leaf, list(leaves), n=3, cutoff=cutoff)]
    if alike and SequenceMatcher(None, leaf, alike[0]).ratio() >= 0.9:
        alike = alike[:1]  # a slip of the hand: what else is alike was not meant
    whole = [] if inside or alike else get_close_matches(name, known, n=2, cutoff=0.75)
    containing = [one for one in leaves if len(leaf) >= 4 and leaf in one and not alike]
    parts = [one for close in [*alike, *containing] for one in leaves[close]]
    return list(dict.fromkeys([*folded, *parts, *whole]))[:3]


def _meant(found: Any) -> str:
    found = list(found)
    return f". Did you mean {_listed(found, 'or')}?" if found else "."


def _listed(found: Any, last: str = "and") -> str:
    *others, end = [f"`{one}`" for one in found]
    return f"{', '.join(others)} {last} {end}" if others else end


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name, None)
    return found if isinstance(found, type) else None


def _by_name(word: str) -> Any:
    import pgpo_lightning

    found = getattr(pgpo_lightning, word, None) if word in pgpo_lightning.__all__ else None
    return found if isinstance(found, type) else None


def _place(words: list[str], path: str) -> str:
    """Return the file and line in which a setting stands, if it stands in a configuration file."""
    if any(word.partition("=")[0].lstrip("-").rstrip("+") == path for word in words):
        return ""
    files = [following for word, following in pairwise(words) if word in ("--config", "-c")]
    files += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    for file in reversed(files):
        try:
            node: Any = yaml.compose(Path(file).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if (line := _line(node, path.split("."))) is not None:
            return f" ({file}, line {line})"
    return ""


def _line(node: Any, path: list[str]) -> int | None:
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if key.value == "init_args":
            if (line := _line(value, path)) is not None:
                return line
        elif key.value == path[0]:
            return key.start_mark.line + 1 if len(path) == 1 else _line(value, path[1:])
    return None
