"""Loggers of the command line: they write into the folder of the run, and only once nothing refuses the run any more."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.utilities import _log_hyperparams

from pgpo_lightning.callbacks import RunSummary
from pgpo_lightning.core.settings import Text, checked
from pgpo_lightning.modules import OnPolicyModule

PACKAGES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow", "CometLogger": "comet_ml", "NeptuneLogger": "neptune"}
"""What Lightning's loggers need that this package does not."""

NAMED = {"WandbLogger": "name", "MLFlowLogger": "run_name"}
"""Arguments for the name under which a run is listed."""


def in_folder(loggers: Any, folder: Path) -> None:
    """Let loggers that name no folder write into that of the run, and name the run after it. Changes the settings.

    Args:
        loggers: The setting `trainer.logger`, not yet built: one, several, true, false or null. A `save_dir` that is empty or
            ``.``, which is the default of ``WandbLogger``, names no folder.
        folder: Of the run.

    Raises:
        ValueError: If the package of a logger is not installed.
    """
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        settings = getattr(logger, "init_args", None)
        if settings is None:
            continue
        kind = logger.class_path.rpartition(".")[2]
        package = PACKAGES.get(kind)
        if package is not None and find_spec(package) is None:
            raise ValueError(
                f"Expected the package {package} for `trainer.logger` {kind}, but it is not installed. Run `pip install "
                f"{package}`, or choose another logger."
            )
        if kind == "MLFlowLogger" and settings.get("tracking_uri") is None:
            settings["tracking_uri"] = (
                "sqlite:///mlflow.db"  # MLflow's default; it refuses Lightning's, a folder of files
            )
        if settings.get("save_dir") in ("", "."):
            settings["save_dir"] = str(folder)
        name = NAMED.get(kind)
        if name is not None and settings.get(name) is None:
            settings[name] = folder.resolve().name


def without_logs_of_training(loggers: Any, folder: Path) -> list[Logger] | bool:
    """Return the loggers of an evaluation: those whose files do not lie among the files of training.

    Args:
        loggers: The setting `trainer.logger`, built.
        folder: Of the run.
    """
    several = loggers if isinstance(loggers, list) else [loggers]
    found = [logger for logger in several if isinstance(logger, Logger)]
    return [logger for logger in found if not _writes_below(logger, folder)] or False


def _writes_below(logger: Logger, folder: Path) -> bool:
    files = isinstance(logger, (TensorBoardLogger, CSVLogger))
    return files and Path(logger.log_dir or "").resolve().is_relative_to(folder.resolve())


class _Waiting(Logger):
    """Stands for loggers that have not started."""

    name = version = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    def log_metrics(self, *_: Any, **__: Any) -> None:
        """Nothing is logged before the first evaluation."""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Logged when the loggers start."""


@checked
class LateLoggers(L.Callback):
    """Starts the loggers when all checks at start-up have passed, so that a refused run is in no tracker.

    Lightning starts them before its first hook, `setup`, where settings are checked.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Text) -> None:
        self.folder = Path(folder)
        self._held: list[Logger] = []

    def hold(self, trainer: L.Trainer) -> None:
        """Put the loggers of a Trainer aside."""
        if trainer.loggers and not trainer.fast_dev_run:  # whose loggers do nothing
            self._held, trainer.loggers = trainer.loggers, [_Waiting(self.folder)]

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Start the loggers."""
        self._start(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Start the loggers, where no evaluation came before."""
        self._start(trainer, pl_module)

    def _start(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        if not self._held:
            return
        trainer.loggers, self._held = self._held, []
        # As Lightning does it: W&B before TensorBoard, which it may copy.
        for logger in sorted(trainer.loggers, key=lambda logger: "Wandb" not in type(logger).__name__):
            _ = getattr(logger, "experiment", None)
        for summary in _summaries(trainer):
            summary.introduce(trainer, pl_module)
        _log_hyperparams(trainer)


def _summaries(trainer: L.Trainer) -> Iterator[RunSummary]:
    return (callback for callback in trainer.callbacks if isinstance(callback, RunSummary))
