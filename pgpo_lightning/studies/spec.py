"""A study as data: its runs, what each of them is told, and which others it waits for. Nothing is launched here."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any

import yaml

from pgpo_lightning.core.settings import Count, Filled, Seed, Text, check, checked, shown

Settings = dict[str, Any]
"""Settings of ``pgpo fit`` as nested mappings."""

NAME = re.compile(r"\w[\w.=+-]*")
"""Names of conditions and arms: they are names of folders, and stand in placeholders."""

MOST_SEEDS = 10_000
"""A larger number of seeds is a seed that should stand in a list."""

PLACEHOLDER = re.compile(r"\{run:(?P<arm>[^:{}]+)(?P<next>:next)?\}|\{seed\}")

OWN = ("seed_everything", "trainer.default_root_dir", "ckpt_path", "checkpoint.dirpath", "config")
"""Settings that the study itself decides on."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        condition: What it is compared within.
        arm: What is compared.
        seed: Its ``seed_everything``, which decides on sampling and order of the questions: arms share both.
        base: Config files.
        settings: What it changes of them.
        folder: Where it goes.
        needs: Names of the runs whose record it reads.
    """

    condition: str
    arm: str
    seed: int
    base: tuple[str, ...]
    settings: Settings
    folder: Path
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The run's place in the study."""
        return _name(self.condition, self.arm, self.seed)

    @property
    def log(self) -> Path:
        """Where its output goes: beside its folder."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def arguments(self, *more: str) -> list[str]:
        """Return the arguments of ``pgpo`` that make this run; they need no other file than the base."""
        configs = [*self.base, *([json.dumps(self.settings)] if self.settings else [])]
        given = [word for config in configs for word in ("--config", config)]
        seed, folder = ["--seed_everything", str(self.seed)], ["--trainer.default_root_dir", str(self.folder)]
        return ["fit", *given, *seed, *folder, *more]


@checked
@dataclass(frozen=True)
class StudySpec:
    """A study: every arm under every condition with every seed.

    Attributes:
        base: Config files of ``pgpo fit``, later ones before earlier ones; paths as from the working folder.
        folder: Runs go to ``<folder>/<condition>/<arm>/seed=<n>``.
        seeds: A number, or a list.
        arms: Name to settings, as nested mappings or with dots in their keys. In a value, ``{run:ARM}`` becomes the folder of the
            run of that arm with the same condition and seed, ``{run:ARM:next}`` that with the next seed (the first follows the
            last), and ``{seed}`` the run's seed. A run waits for those whose folders it names.
        conditions: Name to settings, likewise.
        settings: Of every run, likewise; conditions and arms come before them.
        processes: Runs at a time.
        keep_checkpoints: Keep the checkpoints of finished runs.

    Raises:
        ValueError: If a setting is missing, contradicts another or cannot be; names it.
    """

    base: Annotated[tuple[Text, ...], Filled()]
    folder: Path
    seeds: Annotated[tuple[Seed, ...], Filled()]
    arms: dict[str, Settings]
    conditions: dict[str, Settings] = field(default_factory=lambda: {"base": {}})
    settings: Settings = field(default_factory=dict)
    processes: Count = 1
    keep_checkpoints: bool = True

    def __post_init__(self) -> None:
        for condition, given in self.conditions.items():
            for arm, settings in self.arms.items():
                if contrary := contradiction(given, settings):
                    raise ValueError(
                        f"Expected condition {condition} and arm {arm} to set different things, but both set `{contrary}`."
                    )

    def runs(self) -> list[PlannedRun]:
        """Return every run: all arms of the first seed, then of the next, so that a study can be read before it is complete.

        Raises:
            ValueError: If runs wait for one another, or a placeholder leads nowhere.
        """
        runs = [
            self._run(condition, arm, seed) for seed in self.seeds for condition in self.conditions for arm in self.arms
        ]
        try:
            TopologicalSorter({run.name: run.needs for run in runs}).prepare()
        except CycleError as error:
            raise ValueError(
                f"Expected an order in which runs can be made, but these wait for one another: {' <- '.join(error.args[1])}."
            ) from None
        return runs

    def _run(self, condition: str, arm: str, seed: int) -> PlannedRun:
        needs: dict[str, None] = {}

        def filled(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: filled(each) for key, each in value.items()}
            if isinstance(value, list):
                return [filled(each) for each in value]
            if value == "{seed}":
                return seed  # a number, not a text
            return PLACEHOLDER.sub(place, value) if isinstance(value, str) else value

        def place(match: re.Match[str]) -> str:
            if match["arm"] is None:
                return str(seed)
            if match["arm"] not in self.arms:
                raise ValueError(
                    f"Expected `{match[0]}` of {condition}/{arm} to name an arm, but there is only {', '.join(self.arms)}."
                )
            if match["next"] and len(self.seeds) < 2:
                raise ValueError(f"Expected at least two seeds for `{match[0]}` of {condition}/{arm}, but got one.")
            other = self.seeds[(self.seeds.index(seed) + bool(match["next"])) % len(self.seeds)]
            needs[_name(condition, match["arm"], other)] = None
            return str(self.folder / _name(condition, match["arm"], other))

        settings = filled(merged(self.settings, self.conditions[condition], self.arms[arm]))
        folder = self.folder / _name(condition, arm, seed)
        return PlannedRun(condition, arm, seed, self.base, settings, folder, tuple(needs))


def read_study(path: str | Path) -> StudySpec:
    """Read a study.

    Args:
        path: YAML with the attributes of :class:`StudySpec`.

    Raises:
        ValueError: If the file or something it names is not there, or says what cannot be; names the key.
    """
    if not Path(path).is_file():
        raise ValueError(f"Expected `config` to be the file of a study, but there is no {path}.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # among them text that is not UTF-8, dates that are none
        raise ValueError(f"Expected {path} to be YAML in UTF-8, but {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"Expected {path} to hold the settings of a study, but got {shown(content)}.")
    try:
        json.dumps(content)
    except (TypeError, ValueError, RecursionError) as error:  # such as a date, or a mapping that contains itself
        raise ValueError(f"Expected {path} to hold texts, numbers, lists and mappings, but {error}.") from None
    known = [f.name for f in fields(StudySpec)]
    if unknown := [str(key) for key in content if key not in known]:
        raise ValueError(f"Expected {path} to have the keys {', '.join(known)}, but got `{'`, `'.join(unknown)}`.")
    if missing := [key for key in ("base", "folder", "seeds", "arms") if content.get(key) is None]:
        raise ValueError(f"Expected {path} to have `{'`, `'.join(missing)}`.")
    given = {key: value for key, value in content.items() if value is not None}
    for key in given.keys() & {"arms", "conditions"}:
        given[key] = _named(key, given[key])
    if "settings" in given:
        given["settings"] = _allowed("`settings`", given["settings"])
    check("folder", given["folder"], Text)
    return StudySpec(
        **given | {"base": _base(given["base"]), "folder": Path(given["folder"]), "seeds": _seeds(given["seeds"])}
    )


def nested(where: str, settings: Any) -> Settings:
    """Return settings without dots in their keys.

    Example:
        >>> nested("arm", {"model.init_args": {"optimizer.class_path": "SGD"}, "multiplier": None})
        {'model': {'init_args': {'optimizer': {'class_path': 'SGD'}}}, 'multiplier': None}

    Args:
        where: Whose they are, for the message.
        settings: The mapping; null for none.

    Raises:
        ValueError: If it is no mapping, sets something twice, or sets what the study decides on.
    """
    if not isinstance(settings, dict | None):
        raise ValueError(f"Expected {where} to be a mapping of settings, but got {settings!r}.")
    made: Settings = {}
    for key, value in (settings or {}).items():
        if not isinstance(key, str):
            raise ValueError(f"Expected the keys of {where} to be names of settings, but got {key!r}.")
        if value is None and PLACEHOLDER.fullmatch(f"{{{key}}}"):  # what YAML makes of {run:ARM} without quotes
            raise ValueError(f"Expected quotes around the placeholder `{{{key}}}` in {where}.")
        *outer, last = key.split(".")
        part = {last: nested(where, value) if isinstance(value, dict) else value}
        for name in reversed(outer):
            part = {name: part}
        if twice := contradiction(made, part, same=False):
            raise ValueError(f"Expected {where} to set everything once, but it sets `{twice}` twice.")
        made = merged(made, part)
    return made


def merged(*layers: Settings) -> Settings:
    """Return nested settings in which later layers come before earlier ones."""
    made: Settings = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, dict) and isinstance(made.get(key), dict)
            made[key] = merged(made[key], value) if both else value
    return made


def leaves(settings: Settings, *outer: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of everything that nested settings set."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, *outer, key)
        else:
            yield ".".join((*outer, key)), value


def contradiction(first: Settings, second: Settings, same: bool = True) -> str | None:
    """Return the dotted key of something that both set, if there is one.

    Args:
        first: Nested settings.
        second: Nested settings.
        same: Whether both may set it to the same value.
    """
    for key in [key for key in first if key in second]:
        a, b = first[key], second[key]
        if isinstance(a, dict) and isinstance(b, dict) and (a or b):
            if inner := contradiction(a, b, same):
                return f"{key}.{inner}"
        elif not (same and a == b):
            return key
    return None


def _name(condition: str, arm: str, seed: int) -> str:
    return f"{condition}/{arm}/seed={seed}"


def _named(key: str, given: Any) -> dict[str, Settings]:
    if not isinstance(given, dict) or not given:
        raise ValueError(f"Expected `{key}` to map names to settings, but got {given!r}.")
    for name in given:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(
                f"Expected the names in `{key}` to be of letters, digits and . = + - _, in quotes if it looks like a number, "
                f"but got {name!r}."
            )
    return {name: _allowed(f"`{key}.{name}`", settings) for name, settings in given.items()}


def _allowed(where: str, settings: Any) -> Settings:
    made = nested(where, settings)
    if taken := [key for key, _ in leaves(made) if f"{key}.".startswith(tuple(f"{own}." for own in OWN))]:
        raise ValueError(f"Expected {where} to leave `{taken[0]}` to the study.")
    return made


def _base(given: Any) -> tuple[str, ...]:
    files = [given] if isinstance(given, str) else given
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise ValueError(f"Expected `base` to list config files, but got {given!r}.")
    if missing := [file for file in files if not Path(file).is_file()]:
        raise ValueError(f"Expected the `base` config {missing[0]} to exist, as seen from {Path.cwd()}.")
    return tuple(files)


def _seeds(given: Any) -> tuple[int, ...]:
    if type(given) is int and given > MOST_SEEDS:
        raise ValueError(f"Expected `seeds` to be at most {MOST_SEEDS}, but got {shown(given)}.")
    seeds = list(range(given)) if type(given) is int else given
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise ValueError(f"Expected `seeds` to be their number or a list of numbers from 0 on, but got {given!r}.")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"Expected every one of `seeds` once, but got {given!r}.")
    return tuple(seeds)
