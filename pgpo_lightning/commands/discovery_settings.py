"""The settings of the runs of a comparison: what `pgpo fit` makes of the configuration for each method, and for one question."""

import copy
import json
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from pgpo_lightning.commands.building import ParseCommand
from pgpo_lightning.core.files import write_json
from pgpo_lightning.discovery.methods import Method
from pgpo_lightning.discovery.spec import DiscoverySpec
from pgpo_lightning.probe.measure import differing
from pgpo_lightning.studies.spec import merged
from pgpo_lightning.training.configs import UpdateConfig

Settings = dict[str, Any]

FILE = "comparison.json"
"""The settings of every method, in the folder of the comparison."""

RECORDER = "pgpo_lightning.discovery.recorder.AttemptRecorder"
RESET = "pgpo_lightning.discovery.reset_weights.ResetWeights"
DATA = "pgpo_lightning.discovery.one_question.OneQuestion"

FREE = ("trainer", "checkpoint", "summary", "seed_everything", "ckpt_path", "config")
"""Parts of the settings that runs of one comparison may differ in."""


def words(spec: DiscoverySpec, *layers: Settings) -> list[str]:
    """Return arguments of `pgpo fit` with the base of a comparison and further settings."""
    settings = merged(spec.settings, *layers)
    configs = [*spec.base, *([json.dumps(settings)] if settings else [])]
    return [word for config in configs for word in ("--config", config)]


def settings_of_methods(spec: DiscoverySpec) -> dict[str, Settings]:
    """Return all settings of every method as `pgpo fit` would record them, by name.

    Raises:
        ValueError: If `pgpo fit` does not accept them, a method lacks what it needs, or the budget does not fit.
    """
    command = ParseCommand(["fit", *words(spec)], exit_on_error=False)
    found = {}
    for name, method in spec.methods.items():
        try:
            parsed = command.parser.parse_args(["fit", *words(spec, method.settings)])
        except (jsonargparse.ArgumentError, ValueError) as error:
            raise ValueError(f"Expected method {name} to be accepted by `pgpo fit`, but {error}") from None
        settings = yaml.safe_load(command.parser.dump(parsed, skip_none=False, skip_validation=True))["fit"]
        _check(spec, method, settings)
        found[name] = settings
    return found


def batch_size(method: Method, settings: Settings) -> int:
    """Return the attempts per batch of a method."""
    return 1 if method.kind in ("feedback", "turns") else int(settings["model"]["init_args"]["num_generations"])


def run_settings(
    spec: DiscoverySpec, method: Method, settings: Settings, index: int, seed: int, folder: Path
) -> Settings:
    """Return the settings of `pgpo fit` for a run that trains.

    Args:
        spec: The comparison.
        method: The method.
        settings: All settings of the method.
        index: Number of the question.
        seed: Of the run.
        folder: Of the run.
    """
    own = copy.deepcopy(settings)
    size = batch_size(method, settings)
    data = {"data": own["data"], "index": index, "split": spec.questions.split}
    recorder = {"class_path": RECORDER, "init_args": {"folder": str(folder), "size": size, "stop": spec.stop}}
    given = own["trainer"].get("callbacks") or []
    steps = spec.budget // size * UpdateConfig(**own["model"]["init_args"]["update"]).steps_per_batch
    own["trainer"] |= {
        "callbacks": [
            *(given if isinstance(given, list) else [given]),
            *([{"class_path": RESET}] if method.reset else []),
            recorder,
        ],
        "default_root_dir": str(folder),
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "max_steps": steps,
        "max_epochs": -1,
        "val_check_interval": None,
    }
    return own | {"data": {"class_path": DATA, "init_args": data}, "seed_everything": seed}


def register(spec: DiscoverySpec, found: dict[str, Settings]) -> None:
    """Write settings and predictions into the folder before the first run, and compare with those that are there.

    Args:
        spec: The comparison as its file says.
        found: Settings by method.

    Raises:
        ValueError: If a method was run with other settings, or there were other predictions; names them.
    """
    path = spec.folder / FILE
    content: Settings = {
        "split": spec.questions.split,
        "predictions": [vars(prediction) for prediction in spec.predictions],
        "conversation_tokens": spec.conversation_tokens,
        "methods": {name: _identity(settings) for name, settings in found.items()},
    }
    content = json.loads(json.dumps(content, default=str))
    if path.exists():
        recorded = json.loads(path.read_text(encoding="utf-8"))
        known = recorded["methods"]
        content["methods"] = known | {name: each for name, each in content["methods"].items() if name not in known}
        asked = {name: _identity(settings) for name, settings in found.items() if name in known}
        again = json.loads(json.dumps(content | {"methods": asked}, default=str))
        if differ := differing(recorded | {"methods": {name: known[name] for name in asked}}, again):
            raise ValueError(
                f"Expected {path} to have the settings and predictions of this comparison, but `{'`, `'.join(differ[:5])}` "
                "differ. Choose another `folder`, or delete it."
            )
    write_json(path, content, indent=1)


def _identity(settings: Settings) -> Settings:
    return {key: value for key, value in settings.items() if key not in FREE}


def _check(spec: DiscoverySpec, method: Method, settings: Settings) -> None:
    model = settings["model"]["init_args"]
    if method.multiplied and not settings.get("multiplier"):
        raise ValueError(
            f"Expected a `multiplier` for {method.name}, in the configuration or in `methods.{method.name}.settings`, but "
            "got none."
        )
    if "reprompt" not in model or model["reprompt"] is None:
        raise ValueError(
            f"Expected `model` to be a module with a self-teacher, such as SDPO, for {method.name}, but got "
            f"{settings['model']['class_path']}. Before the first success a reward method has no gradient: it is best-of-k."
        )
    size = batch_size(method, settings)
    if spec.budget % size:
        raise ValueError(
            f"Expected `budget` to be a multiple of `num_generations`, {size} for {method.name}, but got {spec.budget}."
        )
