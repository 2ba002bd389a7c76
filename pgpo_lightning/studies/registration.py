"""Pre-registration: what a study predicts and how it will be judged, fixed before its first run.

`pgpo ablate` writes `registration.json` into the folder of the study: predictions, design and looks, their SHA-256 and the time.
Once a run exists the file is not overwritten, and a study whose rules differ from it is refused. A report reads it, so it
judges by the rules that were fixed, and says what was changed.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from pgpo_lightning.core.files import write_json
from pgpo_lightning.studies.comparisons import Condition
from pgpo_lightning.studies.design import Design
from pgpo_lightning.studies.predictions import Prediction, seen
from pgpo_lightning.studies.sequential import SequentialPlan
from pgpo_lightning.studies.spec import StudySpec
from pgpo_lightning.studies.spec_parts import built, read_plan, read_predictions

FILE = "registration.json"


@dataclass(frozen=True)
class Registration:
    """What was fixed, and when.

    Attributes:
        predictions: The predictions.
        design: What is compared, and the criterion of an answer.
        sequential: The looks, if there are any.
        sha256: Of these three, when they were written.
        time: In UTC, ISO 8601.
        runs_before: Runs that had begun before; 0 for a prediction in the strict sense.
        intact: Whether the file holds what was written at first: the hash fits.
    """

    predictions: tuple[Prediction, ...]
    design: Design
    sequential: SequentialPlan | None
    sha256: str
    time: str
    runs_before: int
    intact: bool


def rules(predictions: Sequence[Prediction], design: Design, sequential: SequentialPlan | None) -> dict[str, Any]:
    """Return what is registered, as JSON has it."""
    content = {
        "predictions": [asdict(one) for one in predictions],
        "design": asdict(design),
        "sequential": asdict(sequential) if sequential else None,
    }
    return json.loads(json.dumps(content))


def digest(content: dict[str, Any]) -> str:
    """Return the SHA-256 of registered rules, which does not depend on the order of their keys."""
    return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def register(study: StudySpec, begun: int) -> None:
    """Fix the rules of a study before its first run.

    Args:
        study: The study.
        begun: Number of its runs that have begun.

    Raises:
        ValueError: If other rules were registered and a run has begun since.
    """
    path = study.folder / FILE
    content = rules(study.predictions, study.design, study.sequential)
    if path.is_file():
        (recorded,) = read(path)
        registered = rules(recorded.predictions, recorded.design, recorded.sequential)
        changed = [name for name in content if content[name] != registered[name]]
        if not changed:
            return
        if begun:
            raise ValueError(
                f"Expected `{'`, `'.join(changed)}` of the study to be as registered in {path} on {recorded.time}, before its "
                "first run, but got others. Restore them, or choose another `folder` and make the runs again."
            )
    time = datetime.now(UTC).isoformat(timespec="seconds")
    write_registrations([{"sha256": digest(content), "time": time, "runs_before": begun} | content], path)


def write_registrations(content: list[dict[str, Any]], path: Path) -> None:
    """Write the file."""
    write_json(path, content, indent=1)


def read(path: Path) -> list[Registration]:
    """Read the file.

    Raises:
        ValueError: If it does not hold registrations.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [
            Registration(
                read_predictions(one["predictions"]),
                built(Design, "design", one["design"]),
                read_plan(one["sequential"]),
                str(one["sha256"]),
                str(one["time"]),
                int(one["runs_before"]),
                one["sha256"] == digest({name: one[name] for name in ("predictions", "design", "sequential")}),
            )
            for one in content
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"Expected {path} to hold the registration of a study, but {error}.") from None


def registrations(paths: Sequence[Path]) -> list[Registration]:
    """Return the registrations that belong to folders of runs, and to `.jsonl` files with runs: those beside them."""
    files = dict.fromkeys((path if path.is_dir() else path.parent).resolve() / FILE for path in paths)
    return [one for file in files if file.is_file() for one in read(file)]


def as_json(registration: Registration) -> dict[str, Any]:
    """Return the content of the file for one registration.

    A file that was changed stays one that was changed: its hash is copied, not computed.
    """
    head = {name: getattr(registration, name) for name in ("sha256", "time", "runs_before")}
    return head | rules(registration.predictions, registration.design, registration.sequential)


def judged_by(found: list[Registration], **explicit: Any) -> tuple[Design, SequentialPlan | None]:
    """Return the design and the looks by which a report judges: those that were registered, unless others are asked for.

    Args:
        found: All registrations.
        explicit: Attributes of the design that were asked for.

    Raises:
        ValueError: If the registrations contradict one another, or a setting is out of range.
    """
    plans = {one.sequential for one in found}
    settings: dict[str, Any] = {}
    for field in fields(Design):
        values = {getattr(one.design, field.name) for one in found}
        if field.name in explicit:
            settings[field.name] = explicit[field.name]
        elif len(values) > 1:
            raise ValueError(
                f"Expected studies that are reported together to have one registered `{field.name}`, but got "
                f"{' and '.join(sorted(map(str, values)))}. Report them one at a time, or set it for all."
            )
        elif values:
            settings[field.name] = values.pop()
    if len(plans) > 1:
        raise ValueError(
            "Expected studies that are reported together to have the same looks. Report them one at a time."
        )
    return Design(**settings), plans.pop() if plans else None


def outcome(registration: Registration, groups: list[Condition], design: Design) -> dict[str, Any]:
    """Return what a report says of a registration.

    Returns:
        `sha256`, `time`, `runs_before`, `intact`; `changed`, the attributes of the design that are not those by which the report
        judges; `predictions`, each with `seen`, see :func:`pgpo_lightning.studies.predictions.seen`.
    """
    names = ("sha256", "time", "runs_before", "intact")
    own, used = asdict(registration.design), asdict(design)
    return {name: getattr(registration, name) for name in names} | {
        "changed": [name for name in used if used[name] != own[name]],
        "predictions": [
            asdict(one) | {"predicted": one.value, "seen": seen(one, groups)} for one in registration.predictions
        ],
    }
