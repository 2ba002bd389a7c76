"""The record of a finished run for studies: one small file, ``run.json``, which replaces its log and answers."""

import json
import lzma
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from pgpo_lightning.core.files import write_json, write_text
from pgpo_lightning.core.identity import joint_sha256
from pgpo_lightning.core.settings import Count, Measured, Natural, Seed, check
from pgpo_lightning.core.texts import shown
from pgpo_lightning.monitoring.curves import Scalars, series

FILE = "run.json"

CURVES = (
    "actor/entropy",
    "actor/grad_norm",
    "actor/steps_without_signal",
    "context/answer",
    "context/contradiction",
    "context/first-step",
    "context/numbers",
    "context/other",
    "context/other-feedback",
    "context/template",
    "context/sibling",
    "context/wrong",
    "critic/score/mean",
    "hapo/closed_success",
    "hapo/gate_open",
    "hapo/injected_groups",
    "hapo/teacher_token_share",
    "hapo/threshold",
    "information/mean",
    "information/standard_error",
    "lr/at_bound",
    "lr/batch_weight",
    "lr/batch_weight_std",
    "lr/effective",
    "lr/multiplier",
    "lr/multiplier_std",
    "response_length/clip_ratio",
    "response_length/max",
    "response_length/mean",
    "rollout/neg_log_prob",
    "self_distillation/divergence",
    "self_distillation/divergence_bound",
    "self_distillation/reprompt_sample_fraction",
    "self_distillation/teacher_entropy",
)
"""The curves in the record, in addition to all of ``val/``. Names as in TensorBoard."""


OPTIONAL = {"data", "solution_probabilities"}
"""Fields that records of older versions do not have."""


@dataclass
class RunRecord:
    """One finished run.

    Attributes:
        study: Name of the condition (base setting) that the run belongs to: runs are compared within it.
        arm: Name of what was varied.
        seed: The run's ``seed_everything``.
        steps: Batches trained on.
        samples: k of avg@k.
        seconds: Wall-clock seconds of training and validation.
        cpu_seconds: Of the process, over the same time.
        curves: Tag to ``[steps, values]``; finite values only, five significant digits.
        questions: For each evaluation, its step (as text) to the mean reward of every held-out question, in order of the
            questions' index.
        rho: The multiplier of every optimizer step that was taken; empty without a multiplier.
        data: Hash of the questions of each split in the order of use (:mod:`pgpo_lightning.core.identity`): ``train`` and
            ``validation``. Empty in records of versions without it.
        solution_probabilities: Like `questions`: the exact probability of every held-out question's worked solution, six
            significant digits. Empty without ``evaluation.solution_column``, and in records of versions without it.
    """

    study: str
    arm: str
    seed: Seed
    steps: Natural
    samples: Count
    seconds: Measured
    cpu_seconds: Measured
    curves: dict[str, list[list[Measured]]]
    questions: dict[str, list[Measured]]
    rho: list[Measured] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)
    solution_probabilities: dict[str, list[Measured]] = field(default_factory=dict)

    @property
    def scores(self) -> tuple[list[int], list[float]]:
        """Steps and values of the held-out avg@k, that of the base model first."""
        steps, values = self.curves.get(f"val/avg@{self.samples}", [[], []])
        return [int(step) for step in steps], list(values)

    @property
    def steps_without_signal(self) -> int:
        """Optimizer steps that were left out because no rollout was in the loss."""
        _, values = self.curves.get("actor/steps_without_signal", [[], []])
        return int(values[-1]) if values else 0

    def save(self, path: str | Path) -> None:
        """Write the run as JSON, all at once: a reader never meets half a file."""
        write_json(path, asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def load(cls, path: str | Path) -> "RunRecord":
        """Read a run.

        Args:
            path: The JSON file, or the folder of a run that has one.

        Raises:
            ValueError: If it is not the record of a finished run; names the file and what is wrong.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"Expected the record of a finished run, but there is no {path}.")
        return cls.parse(_read(path), str(path))

    @classmethod
    def parse(cls, text: str, where: str) -> "RunRecord":
        """Read a run from its JSON.

        Args:
            text: The JSON.
            where: Its file (and line), for the message.

        Raises:
            ValueError: As :meth:`load`.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:  # also of integers with more digits than Python reads
            raise ValueError(f"Expected {where} to be JSON, but {error}.") from None
        names = {f.name for f in fields(cls)}
        if not isinstance(content, dict) or set(content) | OPTIONAL != names:
            got = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"Expected {where} to hold the record of a run with {sorted(names)}, but got {got}.")
        hints = get_type_hints(cls, include_extras=True)
        try:
            for name, value in content.items():
                check(name, value, hints[name])
            _check_curves(content["curves"])
            for name in ("questions", "solution_probabilities"):
                _check_steps(name, content.get(name, {}))
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{str(error).removesuffix('.')}, in the record {where}.") from None
        return cls(**content)


def load_runs(paths: list[Path]) -> list[RunRecord]:
    """Read many runs.

    Args:
        paths: Each a folder with finished runs anywhere below it, a ``run.json``, or a ``.jsonl`` file with a run per line, which
            may be compressed (``.jsonl.xz``).

    Returns:
        The runs, ordered by study, arm and seed.

    Raises:
        ValueError: If a path has no run, or a run is there twice; names them.
    """
    runs: dict[tuple[str, str, int], RunRecord] = {}
    for path in map(Path, paths):
        if holds_many(path) and path.is_file():
            lines = enumerate(_read(path).splitlines(), start=1)
            found = [RunRecord.parse(line, f"{path}:{number}") for number, line in lines if line.strip()]
        elif path.is_dir():
            found = [RunRecord.load(file) for file in sorted(path.rglob(FILE))]
        else:
            found = [RunRecord.load(path)]
        if not found:
            raise ValueError(f"Expected finished runs in {path}, but there is none: no {FILE} anywhere below.")
        for run in found:
            key = (run.study, run.arm, run.seed)
            if key in runs:
                raise ValueError(f"Expected each run once, but {path} holds {'/'.join(map(str, key))} again.")
            runs[key] = run
    return [runs[key] for key in sorted(runs)]


def holds_many(path: Path) -> bool:
    """Return whether a file is named as one with a run per line."""
    return path.name.endswith((".jsonl", ".jsonl.xz"))


def write_runs(runs: list[RunRecord], path: str | Path) -> None:
    """Write runs to one file, a line each."""
    lines = [json.dumps(asdict(run), separators=(",", ":"), sort_keys=True) for run in runs]
    write_text(path, "\n".join(lines) + "\n")


def collect(folder: Path, scalars: Scalars, train: str | None = None, **known: Any) -> RunRecord:
    """Make the record of the run in `folder` from its curves and its held-out answers.

    Study and arm are the names of the two folders above; a folder that is not inside a study is an arm of its own.

    Args:
        folder: With ``validation/step=*.jsonl``.
        scalars: Its curves.
        train: Hash of the training questions, if it is known.
        known: The other fields of :class:`RunRecord`.
    """
    kept = [tag for tag in sorted(scalars) if tag in CURVES or tag.startswith("val/")]
    questions, solutions, hashes = {}, {}, set()
    evaluated = scalars.get(f"val/avg@{known.get('samples')}", {})
    for file in sorted((folder / "validation").glob("step=*.jsonl")):
        if int(file.stem.removeprefix("step=")) not in evaluated:
            continue  # of another run in this folder
        with file.open(encoding="utf-8") as lines:
            results = [json.loads(line) for line in lines]
        step = str(int(file.stem.removeprefix("step=")))
        questions[step] = [_short(r["avg"]) for r in results]
        if results and all("solution_probability" in r for r in results):
            solutions[step] = [r["solution_probability"] for r in results]
        hashes.add(joint_sha256(r["sha256"] for r in results) if all("sha256" in r for r in results) else "")
    data = {} if train is None else {"train": train}
    if hashes and "" not in hashes:
        # Evaluations that did not ask the same questions are like those of no other run.
        data["validation"] = hashes.pop() if len(hashes) == 1 else joint_sha256(sorted(hashes))
    place = folder.resolve()
    return RunRecord(
        study=place.parent.parent.name,
        arm=place.parent.name,
        curves={tag: _points(scalars, tag) for tag in kept},
        questions=questions,
        data=data,
        solution_probabilities=solutions,
        **known,
    )


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
        return (lzma.decompress(content) if path.suffix == ".xz" else content).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected {path} to be text in UTF-8, but {error}.") from None
    except lzma.LZMAError as error:
        raise ValueError(f"Expected {path} to be a file of xz, but {error}.") from None


def _check_curves(curves: dict[str, list[list[float]]]) -> None:
    for tag, curve in curves.items():
        if len(curve) != 2 or len(curve[0]) != len(curve[1]):
            raise ValueError(
                f"Expected `curves[{tag!r}]` to be two lists of one length, steps and values, but got {shown(curve)}."
            )
        if any(not float(step).is_integer() or step < 0 for step in curve[0]) or curve[0] != sorted(set(curve[0])):
            raise ValueError(
                f"Expected the steps of `curves[{tag!r}]` to be whole numbers that rise, but got {shown(curve[0])}."
            )


def _check_steps(name: str, values: dict[str, list[float]]) -> None:
    if wrong := [step for step in values if not (step.isascii() and step.isdigit())]:
        raise ValueError(f"Expected the keys of `{name}` to be steps, but got {shown(wrong[0])}.")


def _points(scalars: Scalars, tag: str) -> list[list[float]]:
    steps, values = series(scalars, tag)
    return [list(steps), [_short(value) for value in values]]


def _short(value: float) -> float:
    return float(f"{value:.5g}") if math.isfinite(value) else value
