"""A run that goes on from a checkpoint: its settings are compared, and those that may change take effect."""

from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from pgpo_lightning.checkpoints.checkpoint_io import peek_checkpoint
from pgpo_lightning.core.errors import about
from pgpo_lightning.core.identity import training_sha256
from pgpo_lightning.core.run_settings import Plain, Remembers, check_settings, settings, tokenizer_identity
from pgpo_lightning.modules.evaluation import Evaluation
from pgpo_lightning.training.resumed_optimizer import check_optimizer, describe_optimizer, take_effect


class Resuming(Remembers, Evaluation):
    """Keeps the run's settings in its checkpoints."""

    model: nn.Module
    make_optimizer: OptimizerCallable
    make_scheduler: LRSchedulerCallable | None
    settings: dict[str, Plain] | None = None
    """Of the run, by parts; ``None`` before the training of the module has been set up."""
    _before: dict[str, Plain] | None = None
    _changed: tuple[str, ...] = ()

    def collect_settings(self) -> None:
        """Note what this run is set to, before it changes anything."""
        data = getattr(self.trainer, "datamodule", None)
        multiplier = next((callback for callback in self.trainer.callbacks if isinstance(callback, Remembers)), None)
        self.settings = {
            "model": settings(self) | {"tokenizer": tokenizer_identity(self.tokenizer)},
            "data": None if data is None else _of_data(data),
            "multiplier": None if multiplier is None else settings(multiplier),
            "trainer": {"class": "Trainer", "precision": self.trainer.precision},
        }
        self._before, self._changed = None, ()

    def compare_early(self, path: Path) -> None:
        """Compare this run's settings with those in a file, before weights are loaded.

        Raises:
            MisconfigurationException: If a setting differs that must not.
        """
        mine = peek_checkpoint(path).get("pgpo_lightning")
        if mine is not None and mine["module"] == type(self).__name__:  # else it is refused when it is loaded
            self.compare(mine)

    def compare(self, mine: dict[str, Any]) -> None:
        """Compare this run's settings with those of the checkpoint that it goes on from; once.

        Args:
            mine: What this module left in the checkpoint.

        Raises:
            MisconfigurationException: If a setting differs that must not.
        """
        if self._before is not None or self.settings is None:
            return
        self._before = mine.get("settings")
        where = self.trainer.ckpt_path
        if self._before is None:
            rank_zero_warn(
                f"{where} does not say which settings its run had, because an older version wrote it: whether they are still the "
                "same is not checked, and another `optimizer` or `scheduler` setting has no effect."
            )
            return
        data = self.trainer.datamodule
        multiplier = next((callback for callback in self.trainer.callbacks if isinstance(callback, Remembers)), None)
        parts = {"model": self, "data": data, "multiplier": multiplier}
        free = {name: getattr(part, "may_change_on_resume", frozenset()) for name, part in parts.items()}
        before, now = ({name: each.get(name) for name in ("model", "trainer", "data", "multiplier")}
                       for each in (self._before, self.settings))  # fmt: skip
        self._changed = tuple(check_settings(before, now, free, str(where)))

    def describe_optimizer(self, optimizer: Optimizer) -> Any:
        """Make the schedule, note both in the settings, and compare them with the checkpoint's.

        Raises:
            MisconfigurationException: If the checkpoint's state is not for this optimizer or schedule.
        """
        scheduler, described = describe_optimizer(optimizer, self.make_scheduler)
        if self.settings is not None:
            self.settings["optimizer"] = described
            if self._before is not None:
                self._changed += tuple(check_optimizer(self._before["optimizer"], described))
        return scheduler

    def on_train_start(self) -> None:
        """Let changed settings of optimizer and schedule take effect, over what was restored."""
        if self._before is not None and self.settings is not None:
            schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
            take_effect(
                self.trainer.optimizers[0],
                schedulers[0] if schedulers else None,
                self._before["optimizer"],
                self.settings["optimizer"],
                self._make_both,
            )
        if self._changed:
            rank_zero_info(f"Resumed at step {self.steps} with other settings: {', '.join(self._changed)}.")

    def _make_both(self) -> tuple[Optimizer, Any]:
        with about("`optimizer` and `scheduler`"):
            optimizer = self.make_optimizer([p for p in self.model.parameters() if p.requires_grad])
            return optimizer, None if self.make_scheduler is None else self.make_scheduler(optimizer)


def check_start(saved: str | None, found: str | None) -> None:
    """Compare the weights that a teacher began with, where it keeps them outside of checkpoints.

    Args:
        saved: Their fingerprint in the checkpoint.
        found: Of the model that this run was given.

    Raises:
        MisconfigurationException: If they differ.
    """
    if saved is not None and found is not None and saved != found:
        raise MisconfigurationException(
            "Expected `model` to be the one that the run began with, because the teacher is made of its weights, but got others "
            f"(fingerprint {found}, and it was {saved}). Give the model of the run."
        )


def _of_data(data: Any) -> Plain:
    kept = (
        settings(data)
        if isinstance(data, Remembers)
        else {"class": f"{type(data).__module__}.{type(data).__qualname__}"}
    )
    questions = getattr(data, "questions", {})
    if isinstance(questions, dict) and questions.get("train"):
        kept["questions"] = training_sha256(questions["train"])
    return kept
