"""The specification of a study: its runs, the settings of each, and the runs that each depends on. Nothing is launched here."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from pgpo_lightning.core.settings import Count, Filled, Seed, Text, check, checked
from pgpo_lightning.core.shipped_configs import find
from pgpo_lightning.core.texts import shown
from pgpo_lightning.studies.design import Design
from pgpo_lightning.studies.predictions import Prediction
from pgpo_lightning.studies.sequential import SequentialPlan
from pgpo_lightning.studies.spec_parts import below_init_args, built, read_plan, read_predictions

Settings = dict[str, Any]
"""Settings of ``pgpo fit`` as nested mappings."""

NAME = re.compile(r"\w[\w.=+-]*")
"""Names of conditions and arms. They are also folder names and occur in placeholders."""

MOST_SEEDS = 10_000
"""A larger number of seeds is taken for a seed that should be in a list."""

PLACEHOLDER = re.compile(r"\{run:(?P<arm>[^:{}]+)(?P<next>:next)?\}|\{seed\}")

OWN = ("seed_everything", "trainer.default_root_dir", "ckpt_path", "checkpoint.dirpath", "config")
"""Settings that the study sets itself."""

BASE_ANSWERS = "base-answers"
"""Folder of the shared answers of the base model, within that of the study."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        condition: Name of the condition. Arms are compared within it.
        arm: Name of the arm.
        seed: Its ``seed_everything``. It determines sampling and the order of the questions, which arms share.
        base: Config files.
        settings: Changes to the config files.
        folder: Output folder.
        needs: Names of the runs whose records it reads.
        base_answers: Folder of its `evaluation.base_answers`, unless its own settings have one.
    """

    condition: str
    arm: str
    seed: int
    base: tuple[str, ...]
    settings: Settings
    folder: Path
    needs: tuple[str, ...] = ()
    base_answers: Path | None = None

    @property
    def name(self) -> str:
        """The run's name within the study."""
        return _name(self.condition, self.arm, self.seed)

    @property
    def log(self) -> Path:
        """The file of its output, beside its folder."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def arguments(self, *more: str) -> list[str]:
        """Return the arguments of ``pgpo`` for this run. They need no file besides the base."""
        evaluation = {} if self.base_answers is None else {"base_answers": str(self.base_answers)}
        shared: Settings = {"model": {"init_args": {"evaluation": evaluation}}} if evaluation else {}
        settings = merged(shared, self.settings)
        configs = [*self.base, *([json.dumps(settings)] if settings else [])]
        options = [word for config in configs for word in ("--config", config)]
        seed, folder = ["--seed_everything", str(self.seed)], ["--trainer.default_root_dir", str(self.folder)]
        return ["fit", *options, *seed, *folder, *more]


@checked
@dataclass(frozen=True)
class StudySpec:
    """A study: every arm under every condition with every seed.

    Attributes:
        base: Config files of ``pgpo fit``, relative to the working folder, or names of `pgpo configs`. Later files override
            earlier ones.
        folder: Runs go to ``<folder>/<condition>/<arm>/seed=<n>``.
        seeds: Their number, or a list.
        arms: Name to settings, as nested mappings or with dots in their keys. In a value, ``{run:ARM}`` is replaced by the folder
            of that arm's run with the same condition and seed, and ``{run:ARM:next}`` by that with the next seed (the first
            follows the last). ``{seed}`` is replaced by the run's seed. A run starts after the runs whose folders it names.
        conditions: Name to settings, likewise.
        only: Name of a condition to the names of the arms that it has, where that is not all of them.
        settings: Of every run, likewise. Conditions and arms override them.
        design: How the study will be judged, settings of :class:`pgpo_lightning.studies.design.Design`.
        predictions: What it is expected to show, each with the attributes of
            :class:`pgpo_lightning.studies.predictions.Prediction`.
        sequential: Numbers of seeds at which it is looked at and may end, settings of
            :class:`pgpo_lightning.studies.sequential.SequentialPlan`.
        processes: Number of runs at the same time.
        keep_checkpoints: Keep the checkpoints of finished runs.
        base_evaluation: ``shared`` evaluates the base model once for all runs that have the same seed, model, prompts and
            sampling (`evaluation.base_answers`). It is the default, because scores, answers and all later steps are bit for bit
            those of ``own``, with which every run evaluates it. Modules without `evaluation` need ``own``.

    Raises:
        ValueError: If a setting is missing, contradicts another or is out of range; names it.
    """

    base: Annotated[tuple[Text, ...], Filled()]
    folder: Path
    seeds: Annotated[tuple[Seed, ...], Filled()]
    arms: dict[str, Settings]
    conditions: dict[str, Settings] = field(default_factory=lambda: {"base": {}})
    only: dict[str, list[str]] = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)
    design: Design = field(default_factory=Design)
    predictions: tuple[Prediction, ...] = ()
    sequential: SequentialPlan | None = None
    processes: Count = 1
    keep_checkpoints: bool = True
    base_evaluation: Literal["shared", "own"] = "shared"

    def __post_init__(self) -> None:
        for condition, names in self.only.items():
            if condition not in self.conditions or not names or set(names) - set(self.arms):
                raise ValueError(
                    "Expected `only` to map conditions to lists of arms, but got "
                    f"{condition}: {shown(names)}; the conditions are {', '.join(self.conditions)}, the arms "
                    f"{', '.join(self.arms)}."
                )
        for condition, changes in self.conditions.items():
            for arm, settings in self.arms_of(condition).items():
                if both := contradiction(changes, settings):
                    raise ValueError(
                        f"Expected condition {condition} and arm {arm} to set different settings, but both set `{both}`."
                    )

        for i, prediction in enumerate(self.predictions):
            arms = self.arms_of(prediction.condition) if prediction.condition in self.conditions else {}
            for name in (prediction.arm, prediction.against):
                if name not in arms:
                    raise ValueError(
                        f"Expected `predictions[{i}]` to name a condition and two of its arms, but there is no "
                        f"{prediction.condition}/{name}."
                    )

    @property
    def has_rules(self) -> bool:
        """Return whether the study says how it will be judged, or what it is expected to show."""
        return bool(self.predictions or self.sequential or self.design != Design())

    def arms_of(self, condition: str) -> dict[str, Settings]:
        """Return the arms of a condition."""
        names = self.only.get(condition, list(self.arms))
        return {name: settings for name, settings in self.arms.items() if name in names}

    def runs(self) -> list[PlannedRun]:
        """Return every run: all arms of the first seed, then of the next. A study can thus be evaluated before it is complete.

        Raises:
            ValueError: If runs depend on one another in a cycle, or a placeholder refers to nothing.
        """
        runs = [
            self._run(condition, arm, seed)
            for seed in self.seeds
            for condition in self.conditions
            for arm in self.arms_of(condition)
        ]
        try:
            TopologicalSorter({run.name: run.needs for run in runs}).prepare()
        except CycleError as error:
            raise ValueError(
                f"Expected an order in which runs can be made, but these depend on one another: {' <- '.join(error.args[1])}."
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
                return seed  # a number, not a string
            return PLACEHOLDER.sub(folder_of, value) if isinstance(value, str) else value

        def folder_of(match: re.Match[str]) -> str:
            if match["arm"] is None:
                return str(seed)
            if match["arm"] not in (known := self.arms_of(condition)):
                raise ValueError(
                    f"Expected `{match[0]}` of {condition}/{arm} to name an arm, but the arms are {', '.join(known)}."
                )
            if match["next"] and len(self.seeds) < 2:
                raise ValueError(f"Expected at least two seeds for `{match[0]}` of {condition}/{arm}, but got one.")
            other = self.seeds[(self.seeds.index(seed) + bool(match["next"])) % len(self.seeds)]
            needs[_name(condition, match["arm"], other)] = None
            return str(self.folder / _name(condition, match["arm"], other))

        settings = filled(merged(self.settings, self.conditions[condition], self.arms[arm]))
        folder = self.folder / _name(condition, arm, seed)
        shared = self.folder / BASE_ANSWERS if self.base_evaluation == "shared" else None
        return PlannedRun(condition, arm, seed, self.base, settings, folder, tuple(needs), shared)


def read_study(path: str | Path) -> StudySpec:
    """Read the specification of a study.

    Args:
        path: YAML with the attributes of :class:`StudySpec`.

    Raises:
        ValueError: If the file or a file it names does not exist, or a setting is invalid; names the key.
    """
    if not Path(path).is_file():
        raise ValueError(f"Expected `config` to be the file of a study, but there is no {path}.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    # ValueError includes text that is not UTF-8 and impossible dates.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"Expected {path} to be YAML in UTF-8, but {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"Expected {path} to hold the settings of a study, but got {shown(content)}.")
    try:
        json.dumps(content)
    # Such as a date, or a mapping that contains itself.
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"Expected {path} to hold texts, numbers, lists and mappings, but {error}.") from None
    known = [f.name for f in fields(StudySpec)]
    if unknown := [str(key) for key in content if key not in known]:
        raise ValueError(f"Expected {path} to have the keys {', '.join(known)}, but got `{'`, `'.join(unknown)}`.")
    if missing := [key for key in ("base", "folder", "seeds", "arms") if content.get(key) is None]:
        raise ValueError(f"Expected {path} to have `{'`, `'.join(missing)}`.")
    values = {key: value for key, value in content.items() if value is not None}
    for key in values.keys() & {"arms", "conditions"}:
        values[key] = named_settings(key, values[key])
    if "settings" in values:
        values["settings"] = allowed("`settings`", values["settings"])
    if "design" in values:
        values["design"] = built(Design, "design", values["design"])
    values["predictions"] = read_predictions(values.get("predictions", []))
    values["sequential"] = read_plan(values.get("sequential"))
    check("folder", values["folder"], Text)
    return StudySpec(
        **values
        | {"base": base_files(values["base"]), "folder": Path(values["folder"]), "seeds": seed_list(values["seeds"])}
    )


def nested(where: str, settings: Any) -> Settings:
    """Return settings without dots in their keys.

    Example:
        >>> nested("arm", {"model.init_args": {"optimizer.class_path": "SGD"}, "multiplier": None})
        {'model': {'init_args': {'optimizer': {'class_path': 'SGD'}}}, 'multiplier': None}

    Args:
        where: Name of the settings, for the message.
        settings: The mapping, or None for no settings.

    Raises:
        ValueError: If `settings` is not a mapping, has a key that is not a string, or sets something twice.
    """
    if not isinstance(settings, dict | None):
        raise ValueError(f"Expected {where} to be a mapping of settings, but got {settings!r}.")
    result: Settings = {}
    for key, value in (settings or {}).items():
        if not isinstance(key, str):
            raise ValueError(f"Expected the keys of {where} to be names of settings, but got {key!r}.")
        if value is None and PLACEHOLDER.fullmatch(f"{{{key}}}"):  # YAML reads {run:ARM} without quotes as a mapping
            raise ValueError(f"Expected quotes around the placeholder `{{{key}}}` in {where}.")
        *outer, last = key.split(".")
        part = {last: nested(where, value) if isinstance(value, dict) else value}
        for name in reversed(outer):
            part = {name: part}
        if twice := contradiction(result, part, same=False):
            raise ValueError(f"Expected {where} to set everything once, but it sets `{twice}` twice.")
        result = merged(result, part)
    return result


def merged(*layers: Settings) -> Settings:
    """Return nested settings in which later layers override earlier ones."""
    result: Settings = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def leaves(settings: Settings, *outer: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every leaf of nested settings."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, *outer, key)
        else:
            yield ".".join((*outer, key)), value


def contradiction(first: Settings, second: Settings, same: bool = True) -> str | None:
    """Return the dotted key of a setting that both set, or None.

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


def named_settings(key: str, values: Any) -> dict[str, Settings]:
    """Return settings by name, from the entry `key` of a file."""
    if not isinstance(values, dict) or not values:
        raise ValueError(f"Expected `{key}` to map names to settings, but got {values!r}.")
    for name in values:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(
                f"Expected the names in `{key}` to consist of letters, digits and . = + - _, in quotes if they look like "
                f"numbers, but got {name!r}."
            )
    return {name: allowed(f"`{key}.{name}`", settings) for name, settings in values.items()}


def allowed(where: str, settings: Any) -> Settings:
    """Return nested settings, none of which a study sets itself."""
    result = nested(where, below_init_args(settings) if isinstance(settings, dict) else settings)
    if taken := [key for key, _ in leaves(result) if f"{key}.".startswith(tuple(f"{own}." for own in OWN))]:
        raise ValueError(f"Expected {where} not to set `{taken[0]}`, which the study sets itself.")
    return result


def base_files(value: Any) -> tuple[str, ...]:
    """Return the files that `base` names."""
    files = [value] if isinstance(value, str) else value
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise ValueError(f"Expected `base` to list config files, but got {value!r}.")
    found = [Path(file) if Path(file).is_file() else find(file) for file in files]
    if None in found:
        raise ValueError(f"Expected the `base` config {files[found.index(None)]} to exist, relative to {Path.cwd()}.")
    return tuple(map(str, found))


def seed_list(value: Any) -> tuple[int, ...]:
    """Return the seeds of a study, which gives their number or a list."""
    if type(value) is int and value > MOST_SEEDS:
        raise ValueError(f"Expected `seeds` to be at most {MOST_SEEDS}, but got {shown(value)}.")
    seeds = list(range(value)) if type(value) is int else value
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise ValueError(f"Expected `seeds` to be their number or a list of numbers from 0 on, but got {value!r}.")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"Expected every one of `seeds` once, but got {value!r}.")
    return tuple(seeds)
