"""Points of the calibration line from finished runs and the probes made before them, with the errors of both."""

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
from pgpo_lightning.monitoring.run_record import FILE, RunRecord, holds_many, load_runs
from pgpo_lightning.probe.contexts import effective
from pgpo_lightning.probe.gaps import question_draws
from pgpo_lightning.probe.line import lines
from pgpo_lightning.probe.measure import QUESTIONS_HASH, with_present_names
from pgpo_lightning.studies.measures import answers, evaluations
from pgpo_lightning.teachers.reprompt import RepromptBuilder

PROBE = "probe.json"
Scale = Literal["all", "failed"]
"""Which rollouts get the context: all for which it is available, as in SDPO, or failed ones only, as in arXiv 2605.30070."""


@dataclass(frozen=True)
class Point:
    """One configuration: its gap before training and its gain from training.

    Attributes:
        name: Name of the arm, with its study if there are several.
        context: Name of the context in the probe.
        gap: Net gap of each question of the probe, ``(questions,)``.
        gain: Held-out score at the end minus that at the start, ``(seeds, held-out questions)``.
        seeds: Seeds of the rows of `gain`.
        steps: Number of training batches of each run.
        questions_sha256: Hash of the probe's questions.
        probe: The file of the probe.
        collapsed: Whether a run ended below half of its first score. The line does not predict stability.
        held_out: Whether the probe has the same questions as the runs' held-out evaluations.
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

    The context of a run is the one with the settings in its ``config.yaml``. Without that file it is the context with the name
    of its arm.

    Args:
        paths: Folders that contain finished runs at any depth, single records, or files with a record per line, as `pgpo report`
            writes them (``.jsonl``, ``.jsonl.xz``).
        gaps: Folder or file of a probe; by default the ``probe.json`` in the run's folder or the nearest folder above it.
        scale: Scale of the net gap.

    Raises:
        ValueError: If there is no run, a run has no probe or a score that is not finite, or the probe does not have the run's
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
        runs = load_runs([file])
        source = _probe_of(file, gaps)
        if source not in probes:
            probes[source] = read_probe(source)
        for run in runs:
            groups[run.study, run.arm, source, _context_of(run, file, probes[source], source)].append(run)
    several = len({study for study, *_ in groups}) > 1
    return [
        _point(f"{study}/{arm}" if several else arm, context, runs, probes[source], source, scale)
        for (study, arm, source, context), runs in sorted(groups.items())
    ]


def read_probe(path: Path) -> dict[str, Any]:
    """Read the result of a probe.

    Raises:
        ValueError: If the file does not exist or is not the result of a probe.
    """
    if not path.is_file():
        raise ValueError(f"Expected the result of `pgpo probe`, but there is no {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["settings"] = with_present_names(content["settings"])
        for part, needed in ((content["settings"], _SETTINGS), *((row, _ROW) for row in content["contexts"])):
            if absent := [name for name in needed if name not in part]:
                raise KeyError(*absent)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Expected {path} to be the result of `pgpo probe`, but reading it failed: {error!r}."
        ) from None
    return content


_SETTINGS = ("module", "split", QUESTIONS_HASH)
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
    if holds_many(file) or not config.is_file():
        if run.arm not in measured:
            raise ValueError(
                f"Expected the arm of {file} to be named after a context of {source} ({', '.join(measured)}), because it has no "
                f"config.yaml, but got {run.arm}."
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
        if (own := _plain(settings.get(name))) != (probed := _plain(probe["settings"]["module"].get(name))):
            raise ValueError(
                f"Expected `model.init_args.{name}` of {config} to be that of {source}, {probed}, but got {own}."
            )
    defaults = {field.name: field.default for field in fields(RepromptBuilder)}
    threshold = {"success_reward_threshold": arguments(settings["reward"])["success_threshold"]}
    effects = effective(defaults | arguments(settings["reprompt"]) | threshold)
    matches = [name for name, row in measured.items() if not _differ(row["settings"], effects)]
    if not matches:
        nearest = min(measured.values(), key=lambda row: len(_differ(row["settings"], effects)))
        raise ValueError(
            f"Expected {source} to have measured the context of {config}, but none of its {len(measured)} contexts has these "
            f"settings; {nearest['name']} differs in `{'`, `'.join(_differ(nearest['settings'], effects))}`."
        )
    return run.arm if run.arm in matches else matches[0]


def arguments(group: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a config group, which a configuration gives directly or as ``class_path`` and ``init_args``.

    Example:
        >>> arguments({"class_path": "RewardConfig", "init_args": {"success_threshold": 0.5}})
        {'success_threshold': 0.5}
    """
    return group.get("init_args", {}) if "class_path" in group else group


def _plain(value: Any) -> Any:
    """Return a class without arguments as its path, whether or not it has an empty ``init_args``."""
    if isinstance(value, dict) and not value.get("init_args"):
        return value.get("class_path", value)
    return value


def _differ(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    return [name for name in sorted({*first, *second} - {"control"}) if first.get(name) != second.get(name)]


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
    if known and "joint_sha256" in settings:  # probes of older versions do not have it
        held_out = settings["joint_sha256"] in known
    trained = tuple(run.steps for run in runs)
    return Point(
        name,
        context,
        gap,
        np.array(gains),
        tuple(seeds),
        trained,
        settings[QUESTIONS_HASH],
        source,
        collapsed,
        held_out,
    )


@dataclass(frozen=True)
class Bootstrap:
    """Results of resampling questions and seeds.

    Attributes:
        gaps: Standard error of each point's gap, ``(n,)``.
        gains: Standard error of each point's gain, ``(n,)``.
        noise: Variance between points of the errors of their gaps, mean over the draws.
        intercepts: Intercept of each draw, ``(draws,)``; NaN where all gaps of the draw are equal.
        slopes: Slope of each draw, likewise.
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


def bootstrap(points: list[Point], draws: int = 2000, seed: int = 0) -> Bootstrap:
    """Resample questions and seeds, jointly for all points that share them, and fit a line to each draw.

    With S seeds the standard deviation over seeds is too small by a factor of sqrt((S - 1) / S), 0.71 for two seeds.

    Args:
        points: The points.
        draws: Number of resamples.
        seed: Of the resamples.
    """
    kinds = ("questions", "held-out", "seeds")
    drawn: dict[tuple[str, Any], NDArray[np.float64]] = {}

    def draw(kind: str, key: Any, number: int) -> NDArray[np.float64]:
        """Return the draws of some questions or seeds. Equal keys get the same draws, other keys independent ones."""
        if (kind, key) not in drawn:
            earlier = sum(kind == each for each, _ in drawn)
            drawn[kind, key] = question_draws(number, draws, seed + len(kinds) * earlier + kinds.index(kind))
        return drawn[kind, key]

    gaps, gains = [], []
    for point in points:
        question_counts = draw("questions", point.questions_sha256, len(point.gap))
        gaps.append(question_counts @ point.gap / len(point.gap))
        # Held-out questions that the probe does not have are a sample of their own.
        number = point.gain.shape[1]
        held_out = question_counts if point.held_out else draw("held-out", number, number)
        seed_counts = draw("seeds", point.seeds, len(point.seeds))
        gains.append(((seed_counts @ point.gain) * held_out).sum(axis=1) / point.gain.size)
    drawn_gaps, drawn_gains = np.array(gaps).T, np.array(gains).T
    errors = drawn_gaps - np.array([point.gap.mean() for point in points])
    noise = float(errors.var(axis=1, ddof=1).mean()) if len(points) > 1 else math.nan
    intercepts, slopes = lines(drawn_gaps, drawn_gains)
    return Bootstrap(drawn_gaps.std(axis=0), drawn_gains.std(axis=0), noise, intercepts, slopes)
