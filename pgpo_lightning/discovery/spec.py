"""The specification of a comparison of methods: which questions, seeds and methods, and how many attempts each run has."""

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from pgpo_lightning.core.settings import Count, Filled, Fraction, Measured, Natural, Seed, Text, check, checked
from pgpo_lightning.core.texts import shown
from pgpo_lightning.discovery.methods import METHODS, Method
from pgpo_lightning.studies.spec import NAME, Settings, allowed, base_files, merged, seed_list
from pgpo_lightning.studies.spec_parts import built

Split = Literal["train", "validation", "test"]


@checked
@dataclass(frozen=True)
class Questions:
    """Which questions are to be solved.

    Attributes:
        split: Split of the data set.
        indices: Their numbers in the split, from 0 on. Null chooses by the base model's measured success rate.
        below: Only questions with a rate below this.
        above: Only questions with a rate above this. 0 leaves out those without any success among the samples.
        samples: Responses per question for the measurement.
        among: Measure the first questions of the split, this many; null for all.
        count: Take the first that qualify, this many; null for all.

    Raises:
        ValueError: If settings contradict each other.
    """

    split: Split = "train"
    indices: Annotated[tuple[Natural, ...], Filled()] | None = None
    below: Fraction | None = None
    above: Fraction | None = None
    samples: Count = 256
    among: Count | None = None
    count: Count | None = None

    def __post_init__(self) -> None:
        measured = [name for name in ("below", "above", "among", "count") if getattr(self, name) is not None]
        if self.indices is not None and measured:
            raise ValueError(
                f"Expected no `questions.{measured[0]}` with `questions.indices`, which name the questions, but got both."
            )
        if self.indices is None and self.below is None:
            raise ValueError(
                "Expected `questions.indices`, or `questions.below` to choose hard questions, but got neither."
            )
        if self.indices is not None and len(set(self.indices)) < len(self.indices):
            raise ValueError(f"Expected every one of `questions.indices` once, but got {list(self.indices)}.")
        if self.below is not None and self.above is not None and self.above >= self.below:
            raise ValueError(
                f"Expected `questions.above` to be less than `questions.below` {self.below}, but got {self.above}."
            )


@checked
@dataclass(frozen=True)
class Prediction:
    """The difference of discovery@k between two methods, as it was predicted before the runs.

    Attributes:
        method: Name.
        against: Name of the other method.
        interval: Lower and upper end of the range in which the difference is expected.
        reason: Why.
        at: k, in generations; null for the budget.
    """

    method: Text
    against: Text
    interval: tuple[Measured, Measured]
    reason: Text
    at: Count | None = None


@checked
@dataclass(frozen=True)
class DiscoverySpec:
    """A comparison: every method on every question with every seed.

    Attributes:
        base: Config files of ``pgpo fit``, or names of `pgpo configs`. Later files override earlier ones.
        folder: Runs go to ``<folder>/runs/<method>/question=<n>/seed=<n>``.
        questions: Which questions, settings of :class:`Questions`.
        methods: Name to ``{like: NAME, settings: {...}}``; a name of :data:`~pgpo_lightning.discovery.methods.METHODS`
            needs neither.
        seeds: Their number, or a list.
        budget: Attempts of a run, a multiple of `num_generations`.
        stop: End a run with its first success. Without it a run uses its whole budget.
        settings: Changes to `base` for every run.
        baseline: The method that the others are compared with.
        conversation_tokens: Longest prompt of the multi-turn methods; null for `reprompt.max_reprompt_len`.
        predictions: What is expected, each with the attributes of :class:`Prediction`.

    Raises:
        ValueError: If a setting is missing, contradicts another or is out of range; names it.
    """

    base: Annotated[tuple[Text, ...], Filled()]
    folder: Path
    questions: Questions
    methods: dict[str, Method]
    seeds: Annotated[tuple[Seed, ...], Filled()]
    budget: Count
    stop: bool = True
    settings: Settings = field(default_factory=dict)
    baseline: Text = "best-of-k"
    conversation_tokens: Count | None = None
    predictions: tuple[Prediction, ...] = ()

    def __post_init__(self) -> None:
        for i, prediction in enumerate(self.predictions):
            for name in (prediction.method, prediction.against):
                if name not in self.methods:
                    raise ValueError(f"Expected `predictions[{i}]` to name two of the methods, but there is no {name}.")

    def narrowed(
        self,
        methods: list[str] | None = None,
        questions: list[int] | None = None,
        seeds: list[int] | None = None,
        budget: int | None = None,
    ) -> "DiscoverySpec":
        """Return the specification with fewer or other methods, questions, seeds and attempts.

        Args:
            methods: Names from `methods`, or of the methods that are always there.
            questions: Indices, in place of `questions`.
            seeds: In place of `seeds`.
            budget: In place of `budget`.

        Raises:
            ValueError: If a name is unknown.
        """
        spec = self
        if methods is not None:
            spec = replace(
                spec,
                methods={name: self.methods.get(name) or _method(name, None) for name in methods},
                predictions=tuple(p for p in self.predictions if {p.method, p.against} <= {*methods}),
            )
        if questions is not None:
            spec = replace(spec, questions=Questions(self.questions.split, tuple(questions)))
        if seeds is not None:
            spec = replace(spec, seeds=seed_list(seeds))
        return spec if budget is None else replace(spec, budget=budget)


def read_discovery(path: str | Path) -> DiscoverySpec:
    """Read the specification of a comparison.

    Args:
        path: YAML with the attributes of :class:`DiscoverySpec`.

    Raises:
        ValueError: If the file or a file it names does not exist, or a setting is invalid; names the key.
    """
    if not Path(path).is_file():
        raise ValueError(f"Expected `config` to be the file of a comparison, but there is no {path}.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        json.dumps(content)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"Expected {path} to be YAML in UTF-8, but {' '.join(str(error).split())}.") from None
    known = [f.name for f in fields(DiscoverySpec)]
    if not isinstance(content, dict) or set(content) - set(known):
        odd = (
            shown(content) if not isinstance(content, dict) else ", ".join(sorted(map(str, set(content) - set(known))))
        )
        raise ValueError(f"Expected {path} to have the keys {', '.join(known)}, but got {odd}.")
    needed = ("base", "folder", "questions", "methods", "seeds", "budget")
    if missing := [key for key in needed if content.get(key) is None]:
        raise ValueError(f"Expected {path} to have `{'`, `'.join(missing)}`.")
    values = {key: value for key, value in content.items() if value is not None}
    check("folder", values["folder"], Text)
    predictions = values.get("predictions", [])
    if not isinstance(predictions, list):
        raise ValueError(f"Expected `predictions` to be a list, but got {shown(predictions)}.")
    return DiscoverySpec(
        **values
        | {
            "base": base_files(values["base"]),
            "folder": Path(values["folder"]),
            "questions": built(Questions, "questions", values["questions"]),
            "methods": _methods(values["methods"]),
            "seeds": seed_list(values["seeds"]),
            "settings": allowed("`settings`", values.get("settings")),
            "predictions": tuple(built(Prediction, f"predictions[{i}]", each) for i, each in enumerate(predictions)),
        }
    )


def _methods(value: Any) -> dict[str, Method]:
    if isinstance(value, list):
        value = dict.fromkeys(value)
    if not isinstance(value, dict) or not value:
        raise ValueError(f"Expected `methods` to map names to settings, but got {shown(value)}.")
    return {name: _method(name, each) for name, each in value.items()}


def _method(name: Any, given: Any) -> Method:
    """Return a method from its entry in the file."""
    entry = {} if given is None else given
    if not isinstance(entry, dict) or set(entry) - {"like", "settings"}:
        raise ValueError(
            f"Expected `methods.{name}` to be a mapping with the keys like, settings, but got {shown(given)}."
        )
    like = entry.get("like", name)
    if like not in METHODS:
        where = f"methods.{name}.like" if "like" in entry else "methods"
        raise ValueError(
            f"Expected `{where}` to be among {', '.join(METHODS)}, but got {shown(like, str)}. A method of your own says by "
            "`like` which of them it changes."
        )
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"Expected the names in `methods` to consist of letters, digits and . = + - _, but got {name!r}."
        )
    method = METHODS[like]
    settings = allowed(f"`methods.{name}.settings`", entry.get("settings"))
    if settings and not method.trains:
        raise ValueError(
            f"Expected no `methods.{name}.settings`, because {like} changes no weights and samples as `settings` says, but got "
            f"{shown(settings)}."
        )
    if name in METHODS and like != name:
        raise ValueError(
            f"Expected `methods.{name}` to be the method of this name, but got like: {like}. Choose another name."
        )
    # Another class of multiplier does not take the arguments of the first.
    kept = {key: value for key, value in method.settings.items() if key != "multiplier" or key not in settings}
    return replace(method, name=name, settings=merged(kept, settings))
