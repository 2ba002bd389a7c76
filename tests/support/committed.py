"""Committed records of studies, and the figures that can be computed from them."""

import re
from functools import cache
from itertools import permutations
from pathlib import Path

from pgpo_lightning.monitoring.run_record import RunRecord, load_runs
from pgpo_lightning.studies.comparisons import Arm, Condition, common, conditions
from pgpo_lightning.studies.decisions import differences, estimate
from pgpo_lightning.studies.inference import Mean
from pgpo_lightning.studies.measures import MEASURES
from pgpo_lightning.studies.spec import StudySpec, read_study
from tests.support import CONFIGS, ROOT

INTERVAL = re.compile(r"[+-]?\d\.\d{2,3} \[[+-]?\d\.\d{2,3}, [+-]?\d\.\d{2,3}\]")
"""A figure with its interval."""


def page(name: str) -> str:
    """A page of docs/ as one line."""
    return " ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split())


@cache
def study(name: str) -> StudySpec:
    """A shipped study; its base is given relative to the root."""
    text = (CONFIGS / "studies" / f"{name}.yaml").read_text(encoding="utf-8")
    assert "base: configs/" in text
    return read_study(CONFIGS / "studies" / f"{name}.yaml")


@cache
def records(file: str) -> list[RunRecord]:
    """The runs of a file below docs/."""
    return load_runs([ROOT / "docs" / file])


def groups(file: str, spec: StudySpec) -> dict[str, Condition]:
    """The conditions of a study."""
    return {group.name: group for group in conditions(records(file), spec.design)}


def shown(mean: Mean, digits: int = 3, sign: str = "+") -> str:
    """A figure with its interval as pages write it."""
    low, high = mean.interval()
    return f"{mean.value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def difference(first: Arm, second: Arm, measure: str = "final", digits: int = 3) -> str:
    """One arm minus another."""
    return shown(estimate(differences(first, second, (measure,))[measure]), digits)


def known(found: dict[str, Condition]) -> set[str]:
    """Every mean and difference of a study with its interval, as a page may quote it."""
    quoted = set()
    for group in found.values():
        for arm in group.arms.values():
            for measure in MEASURES:
                mean = estimate(arm.tables[measure])
                quoted |= {shown(mean, digits, "") for digits in (2, 3)}
        for first, second in permutations(group.arms.values(), 2):
            if len(common(first, second)) > 1:
                quoted |= {difference(first, second, measure, digits) for measure in MEASURES for digits in (2, 3)}
    return quoted


def unknown(text: str, quoted: set[str]) -> list[str]:
    """The figures with intervals of a text that are not among those; minus zero is zero."""
    plain = lambda figure: re.sub(r"-(0\.0+)\b", r"+\1", figure)  # noqa: E731
    known_figures = {plain(figure) for figure in quoted}
    return [figure for figure in INTERVAL.findall(text) if plain(figure) not in known_figures]


def of_report(folder: str) -> set[str]:
    """The figures of a committed report, for what is computed over several conditions."""
    return set(INTERVAL.findall((ROOT / "docs" / Path(folder) / "report.md").read_text(encoding="utf-8")))
