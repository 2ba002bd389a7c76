"""Progress of a study, read from the folders of its runs. It is stored nowhere else."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import jsonargparse
import yaml

from pgpo_lightning.commands.building import ParseCommand
from pgpo_lightning.monitoring import run_folder
from pgpo_lightning.monitoring.configurations import configurations
from pgpo_lightning.monitoring.run_folder import State
from pgpo_lightning.studies.spec import PlannedRun, Settings, leaves

FREE = (
    "trainer.default_root_dir",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.logger",
    "ckpt_path",
    "model.init_args.evaluation.base_answers",
)
"""Settings in which a run may differ from the study, in addition to those of `summary` and `checkpoint`."""


def state(run: PlannedRun) -> State:
    """Return the progress of a run, see :func:`pgpo_lightning.monitoring.run_folder.state`."""
    return run_folder.state(run.folder)


def expected_settings(runs: list[PlannedRun]) -> dict[str, Settings]:
    """Return all settings of every run, as the run will write them into its folder.

    Raises:
        ValueError: If `pgpo fit` does not accept them, or a run would not write its record into its folder.
    """
    command = None
    first: dict[tuple[str, str], tuple[PlannedRun, Settings]] = {}
    expected = {}
    for run in runs:
        if (run.condition, run.arm) not in first:
            try:
                command = command or ParseCommand(run.arguments(), exit_on_error=False)
                parsed = command.parser.parse_args(run.arguments())
            except (jsonargparse.ArgumentError, ValueError) as error:
                raise ValueError(
                    f"Expected {run.condition}/{run.arm} to be accepted by `pgpo fit`, but {error}"
                ) from None
            settings = yaml.safe_load(command.parser.dump(parsed, skip_none=False, skip_validation=True))["fit"]
            if (value := _get(settings, "checkpoint.dirpath")) is not None:
                raise ValueError(
                    f"Expected `checkpoint.dirpath` to be null, so that {run.condition}/{run.arm} writes into its folder, but "
                    f"got {value}."
                )
            first[run.condition, run.arm] = run, settings
        # Runs of other seeds differ only in replaced placeholders; parsing each would take a fifth of a second.
        model, settings = first[run.condition, run.arm]
        before = dict(leaves(model.settings))
        settings = copy.deepcopy(settings)
        settings["seed_everything"] = run.seed
        for key, value in leaves(run.settings):
            if value != before[key]:
                _set(settings, key, value)
        expected[run.name] = settings
    return expected


def changed(run: PlannedRun, expected: Settings) -> str | None:
    """Return an error message if a run was made with other settings than expected, else None.

    The settings of a run are in its ``config.yaml`` and in the configurations that it was resumed with. Settings that only one
    side has are ignored, so a setting added by a newer version does not make old runs invalid. The record that a run has read
    may have another seed or path than expected, because a study can be moved and seeds can be added.
    """
    for path in configurations(run.folder):
        try:
            recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            recorded = None
        if not isinstance(recorded, dict):
            return f"Expected {path} to contain the settings of the run, but it cannot be read. Delete the folder."
        for key, old, new in _differences(recorded, expected):
            if key not in FREE and not key.startswith(("summary.", "checkpoint.")):
                old, new = _comparable(old, run.seed), _comparable(new, run.seed)
                if old != new:
                    return (
                        f"Expected the run in {run.folder} to have the settings of the study, but its `{key}` is {old} instead "
                        f"of {new}. Choose another `folder` for the study, or delete that of the run."
                    )
    return None


def _differences(recorded: Settings, expected: Settings, *outer: str) -> Iterator[tuple[str, Any, Any]]:
    for key in [key for key in recorded if key in expected]:
        old, new = recorded[key], expected[key]
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, *outer, key)
        elif old != new:
            yield ".".join((*outer, key)), old, new


def _comparable(value: Any, seed: int) -> Any:
    if isinstance(value, str) and (match := re.fullmatch(r"(?:.*/)?([^/]+/[^/]+)/seed=(\d+)(/.*)?", value)):
        return f"{match[1]} with {'the same' if int(match[2]) == seed else 'another'} seed"
    return value


def _get(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def _set(settings: Settings, key: str, value: Any) -> None:
    *outer, last = key.split(".")
    for part in outer:
        settings = settings.setdefault(part, {})
    settings[last] = value
