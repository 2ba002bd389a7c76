"""From finished runs and the probes made before them to the points of the line, with the errors of both."""

import json
import math
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from pgpo_lightning.monitoring.collapse_rules import collapse_step
from pgpo_lightning.monitoring.run_record import FILE, RunRecord
from pgpo_lightning.probe.contexts import effective
from pgpo_lightning.probe.gaps import question_draws
from pgpo_lightning.probe.line import lines
from pgpo_lightning.studies.measures import answers, evaluations
from pgpo_lightning.teachers.reprompt import RepromptBuilder

PROBE = "probe.json"
Scale = Literal["all", "failed"]
"""Which rollouts get the context: all that can, as SDPO trains, or failed ones only, as in arXiv 2605.30070."""


@dataclass(frozen=True)
class Point:
    """One configuration: its gap before training and what training brought.

    Attributes:
        name: Of the arm, with its study if there are several.
        context: Name of the context in the probe.
        gap: Net gap of each question of the probe, ``(questions,)``.
        gain: Held-out score at the end less that at the start, ``(seeds, held-out questions)``.
        seeds: Of the rows of `gain`.
        steps: Batches that each of them trained on.
        questions_sha256: Of the probe's questions.
        probe: The file of the probe.
        collapsed: Whether a run ended below half of the score that it started from: the line does not speak of stability.
        held_out: Whether the probe asked the questions that the runs were scored on.
    """

    name: str
    context: str
    gap: NDArray[np.float64]
    gain: NDArray[np.float64]
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    questions_sha256: str
    probe: Path
    collapsed: bool
    held_out: bool


def points(paths: list[Path], gaps: Path | None, scale: Scale) -> list[Point]:
    """Find runs and their probes.

    A run belongs to the context whose settings its ``config.yaml`` has; a record without one beside it to the context that its
    arm is named after.

    Args:
        paths: Folders with finished runs anywhere below them, or single records.
        gaps: A probe's folder or file; by default the ``probe.json`` in the run's folder or the nearest one above it.
        scale: Which net gap.

    Raises:
        ValueError: If there is no run, a run has no probe or scores that are no numbers, or the probe has not measured the run's
            context; names the file.
    """
    files: dict[Path, None] = {}
    for path in paths:
        found = sorted(path.rglob(FILE)) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"Expected finished runs in {path}, but there is none: no {FILE} anywhere below.")
        files |= dict.fromkeys(file.resolve() for file in found)
    groups: dict[tuple[str, str, Path, str], list[RunRecord]] = defaultdict(list)
    probes: dict[Path, dict[str, Any]] = {}
    for file in files:
        run = RunRecord.load(file)
        source = _probe_of(file, gaps)
        if source not in probes:
            probes[source] = read_probe(source)
        groups[run.study, run.arm, source, _context_of(run, file, probes[source], source)].append(run)
    several = len({study for study, *_ in groups}) > 1
    return [
        _point(f"{study}/{arm}" if several else arm, context, runs, probes[source], source, scale)
        for (study, arm, source, context), runs in sorted(groups.items())
    ]


def read_probe(path: Path) -> dict[str, Any]:
    """Read what a probe measured.

    Raises:
        ValueError: If it is not there or no probe's.
    """
    if not path.is_file():
        raise ValueError(f"Expected the result of `pgpo probe`, but there is no {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for part, needed in ((content["settings"], _SETTINGS), *((row, _ROW) for row in content["contexts"])):
            if absent := [name for name in needed if name not in part]:
                raise KeyError(*absent)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected {path} to be the result of `pgpo probe`, but reading it failed: {error!r}."
        ) from None
    return content


_SETTINGS = ("module", "split", "questions_sha256")
_ROW = ("name", "control", "settings", "coverage", "net", "net_failed", "by_question", "by_question_failed")


def _probe_of(file: Path, gaps: Path | None) -> Path:
    if gaps is not None:
        return gaps / PROBE if gaps.is_dir() else gaps
    for folder in file.parents:
        if (folder / PROBE).is_file():
            return folder / PROBE
    raise ValueError(f"Expected a {PROBE} in the folder of {file} or above it. Give the probe's folder as `--gaps`.")


def _context_of(run: RunRecord, file: Path, probe: dict[str, Any], source: Path) -> str:
    measured = {row["name"]: row for row in probe["contexts"] if row["control"] is None}
    config = file.parent / "config.yaml"
    if not config.is_file():
        if run.arm not in measured:
            raise ValueError(
                f"Expected the arm of {file} to be named after a context of {source} ({', '.join(measured)}), because it has no "
                f"config.yaml to tell, but got {run.arm}."
            )
        return run.arm
    try:
        settings = dict(yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["init_args"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"Expected {config} to be the configuration of a run, but reading it failed: {type(error).__name__}: {error}"
        ) from None
    if "reprompt" not in settings:
        raise ValueError(
            f"Expected {config} to be of a run with a self-teacher, such as SDPO, but it has no `reprompt`."
        )
    for name in ("model", "verifier"):
        if (mine := _plain(settings.get(name))) != (theirs := _plain(probe["settings"]["module"].get(name))):
            raise ValueError(
                f"Expected `model.init_args.{name}` of {config} to be that of {source}, {theirs}, but got {mine}."
            )
    defaults = {field.name: field.default for field in fields(RepromptBuilder)}
    threshold = {"success_reward_threshold": settings["reward"]["success_threshold"]}
    mine = effective(defaults | settings["reprompt"] | threshold)
    matches = [name for name, row in measured.items() if _same(row["settings"], mine)]
    if not matches:
        nearest = min(measured.values(), key=lambda row: len(_differ(row["settings"], mine)))
        raise ValueError(
            f"Expected {source} to have measured the context of {config}, but none of its {len(measured)} contexts has these "
            f"settings; {nearest['name']} differs in `{'`, `'.join(_differ(nearest['settings'], mine))}`."
        )
    return run.arm if run.arm in matches else matches[0]


def _plain(value: Any) -> Any:
    """Return a class given by its path alone and one with empty arguments as the same thing."""
    if isinstance(value, dict) and not value.get("init_args"):
        return value.get("class_path", value)
    return value


def _differ(theirs: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    return [name for name in sorted({*theirs, *mine} - {"control"}) if theirs.get(name) != mine.get(name)]


def _same(theirs: dict[str, Any], mine: dict[str, Any]) -> bool:
    return not _differ(theirs, mine)


def _point(name: str, context: str, runs: list[RunRecord], probe: dict[str, Any], source: Path, scale: Scale) -> Point:
    runs = sorted(runs, key=lambda run: run.seed)
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"Expected each run of {name} once, but got the seeds {seeds}.")
    gains, collapsed = [], False
    for run in runs:
        steps = evaluations(run)
        if len(steps) < 2 or steps[0] != 0:
            raise ValueError(
                f"Expected {name}/seed={run.seed} to be evaluated before the first step and at the end, but it was at {steps}. "
                "Leave `trainer.num_sanity_val_steps` at -1 and set `trainer.val_check_interval`."
            )
        table = answers(run)
        if not np.isfinite(table[[0, -1]]).all():
            raise ValueError(
                f"Expected the held-out scores of {name}/seed={run.seed} to be numbers, but some are not finite."
            )
        gains.append(table[-1] - table[0])
        collapsed |= collapse_step([0, 1], table[[0, -1]].mean(axis=1)) is not None
    if len({len(gain) for gain in gains}) > 1:
        raise ValueError(f"Expected all runs of {name} to have the same held-out questions, but their numbers differ.")
    known = {sha: run.seed for run in runs if (sha := run.data.get("validation"))}
    if len(known) > 1:
        raise ValueError(
            f"Expected all runs of {name} to have the same held-out questions, but those of "
            f"{' and '.join(f'seed={seed}' for seed in known.values())} differ."
        )
    row = next(row for row in probe["contexts"] if row["name"] == context)
    settings = probe["settings"]
    key = "by_question" if scale == "all" else "by_question_failed"
    gap = np.array(row[key], dtype=float)
    if not np.isfinite(gap).all():
        raise ValueError(f"Expected `{key}` of {context} in {source} to be numbers, but some are not.")
    held_out = settings["split"] == "validation" and len(gap) == len(gains[0])
    if known and "joint_sha256" in settings:  # not of versions that did not keep it
        held_out = settings["joint_sha256"] in known
    steps = tuple(run.steps for run in runs)
    return Point(
        name,
        context,
        gap,
        np.array(gains),
        tuple(seeds),
        steps,
        settings["questions_sha256"],
        source,
        collapsed,
        held_out,
    )


@dataclass(frozen=True)
class Bootstrap:
    """Standard deviations over resampled questions and seeds.

    Attributes:
        gaps: Of each point's gap, ``(n,)``.
        gains: Of each point's gain, ``(n,)``.
        noise: Variance between the points of the errors of their gaps, mean over the draws.
        intercepts: Drawn intercepts, ``(draws,)``; NaN where all drawn gaps are equal.
        slopes: Drawn slopes, likewise.
    """

    gaps: NDArray[np.float64]
    gains: NDArray[np.float64]
    noise: float
    intercepts: NDArray[np.float64]
    slopes: NDArray[np.float64]

    def interval(self, values: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
        """Return the percentile interval of `intercepts` or `slopes`."""
        low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def bootstrap(given: list[Point], draws: int = 2000, seed: int = 0) -> Bootstrap:
    """Draw questions and seeds anew, for all points together where they are the same, and fit each draw.

    With S seeds the spread between seeds comes out too small by sqrt((S - 1) / S): with two, by 0.71.

    Args:
        given: The points.
        draws: Number of resamples.
        seed: Of the resamples.
    """
    kinds = ("questions", "held-out", "seeds")
    drawn: dict[tuple[str, Any], NDArray[np.float64]] = {}

    def draw(kind: str, key: Any, number: int) -> NDArray[np.float64]:
        """Return the draws of some questions or seeds: the same for the same, independent of all others."""
        if (kind, key) not in drawn:
            before = sum(kind == each for each, _ in drawn)
            drawn[kind, key] = question_draws(number, draws, seed + len(kinds) * before + kinds.index(kind))
        return drawn[kind, key]

    gaps, gains = [], []
    for point in given:
        asked = draw("questions", point.questions_sha256, len(point.gap))
        gaps.append(asked @ point.gap / len(point.gap))
        # The held-out questions, where the probe did not ask them, are another sample.
        number = point.gain.shape[1]
        held_out = asked if point.held_out else draw("held-out", number, number)
        of_seeds = draw("seeds", point.seeds, len(point.seeds))
        gains.append(((of_seeds @ point.gain) * held_out).sum(axis=1) / point.gain.size)
    drawn_gaps, drawn_gains = np.array(gaps).T, np.array(gains).T
    errors = drawn_gaps - np.array([point.gap.mean() for point in given])
    noise = float(errors.var(axis=1, ddof=1).mean()) if len(given) > 1 else math.nan
    intercepts, slopes = lines(drawn_gaps, drawn_gains)
    return Bootstrap(drawn_gaps.std(axis=0), drawn_gains.std(axis=0), noise, intercepts, slopes)
