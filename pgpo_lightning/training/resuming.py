"""A run that goes on from a checkpoint: its settings are compared, and those that may change take effect."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from pgpo_lightning.checkpoints.checkpoint_io import peek_checkpoint
from pgpo_lightning.core.errors import as_user_error
from pgpo_lightning.core.identity import training_sha256
from pgpo_lightning.core.run_settings import Plain, Remembers, check_settings, settings, tokenizer_identity
from pgpo_lightning.training.resumed_optimizer import check_optimizer, describe_optimizer, take_effect

Make = Callable[[Any], Any]


class ResumedSettings:
    """The settings of a run, and those of the checkpoint that it goes on from.

    Args:
        module: Keeps the arguments that it was constructed with.
        trainer: Trainer of the run.
        checkpoint: The file that it goes on from; its settings are compared before weights are loaded. Null if there is none, or
            its settings cannot be read beforehand.

    Raises:
        MisconfigurationException: If a setting differs that must not.
    """

    def __init__(self, module: Any, trainer: L.Trainer, checkpoint: Path | None = None) -> None:
        self.module = module
        self.trainer = trainer
        data, multiplier = self._data(), self._multiplier()
        self.settings: dict[str, Plain] = {
            "model": settings(module) | {"tokenizer": tokenizer_identity(module.tokenizer)},
            "data": None if data is None else _of_data(data),
            "multiplier": None if multiplier is None else settings(multiplier),
            "trainer": {"class": "Trainer", "precision": trainer.precision},
        }
        """Of this run, by parts, noted before it changes anything."""
        self._before: dict[str, Plain] | None = None
        self._changed: tuple[str, ...] = ()
        if checkpoint is not None:
            saved = peek_checkpoint(checkpoint).get("pgpo_lightning")
            if saved is not None and saved["module"] == type(module).__name__:  # else it is refused when it is loaded
                self.compare(saved)

    @property
    def questions_sha256(self) -> str | None:
        """Hash of the training questions, null without any; see :func:`~pgpo_lightning.core.identity.training_sha256`."""
        data: Any = self.settings["data"]
        return None if data is None else data.get("questions")

    def _data(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    def _multiplier(self) -> Any:
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]  # set outside of Lightning's Trainer class
        return next((callback for callback in callbacks if isinstance(callback, Remembers)), None)

    def compare(self, saved: dict[str, Any]) -> None:
        """Compare this run's settings with those of the checkpoint that it goes on from; once.

        Args:
            saved: What the module left in the checkpoint.

        Raises:
            MisconfigurationException: If a setting differs that must not.
        """
        if self._before is not None:
            return
        self._before = saved.get("settings")
        path = self.trainer.ckpt_path
        if self._before is None:
            rank_zero_warn(
                f"{path} does not say which settings its run had, because an older version wrote it: whether they are still the "
                "same is not checked, and another `optimizer` or `scheduler` setting has no effect."
            )
            return
        parts = {"model": self.module, "data": self._data(), "multiplier": self._multiplier()}
        free: dict[str, Any] = {
            name: getattr(part, "may_change_on_resume", frozenset()) for name, part in parts.items()
        }
        names = ("model", "trainer", "data", "multiplier")
        before, now = ({name: each.get(name) for name in names} for each in (self._before, self.settings))
        self._changed = tuple(check_settings(before, now, free, str(path)))

    def schedule(self, optimizer: Optimizer, make_scheduler: Callable[[Optimizer], Any] | None) -> Any:
        """Make the schedule, note both in the settings, and compare them with the checkpoint's.

        Raises:
            MisconfigurationException: If the checkpoint's state is not for this optimizer or schedule.
        """
        scheduler, described = describe_optimizer(optimizer, make_scheduler)
        self.settings["optimizer"] = described
        if self._before is not None:
            self._changed += tuple(check_optimizer(self._before["optimizer"], described))
        return scheduler

    def take_effect(
        self, make_optimizer: Make, make_scheduler: Make | None, parameters: list[nn.Parameter], step: int
    ) -> None:
        """Let changed settings of optimizer and schedule take effect, over what was restored.

        Args:
            make_optimizer: From parameters to an optimizer with the settings of this run.
            make_scheduler: From an optimizer to a schedule; null for none.
            parameters: What is trained.
            step: Batches trained on so far, for the message.
        """

        def make_both() -> tuple[Optimizer, Any]:
            with as_user_error("`optimizer` and `scheduler`"):
                optimizer = make_optimizer(parameters)
                return optimizer, None if make_scheduler is None else make_scheduler(optimizer)

        if self._before is not None:
            schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
            take_effect(
                self.trainer.optimizers[0],
                schedulers[0] if schedulers else None,
                self._before["optimizer"],
                self.settings["optimizer"],
                make_both,
            )
        if self._changed:
            rank_zero_info(f"Resumed at step {step} with other settings: {', '.join(self._changed)}.")


def check_origin(checkpoint: dict[str, Any], module: str, path: Any) -> dict[str, Any]:
    """Return what a module left in its checkpoint.

    Args:
        checkpoint: Its content.
        module: The class that wants it.
        path: Where it is, for messages; null if that is not known.

    Raises:
        MisconfigurationException: If it is another module's or another program's.
    """
    saved = checkpoint.get("pgpo_lightning")
    if saved is None or saved["module"] != module:
        origin = f"{saved['module']}'s" if saved else "another program's"
        raise MisconfigurationException(f"Expected a checkpoint of {module}, but it is {origin}{_at(path)}.")
    return saved


def check_state(checkpoint: dict[str, Any], path: Any) -> None:
    """Raise if a checkpoint has nothing but weights where a run is to go on.

    Args:
        checkpoint: Its content.
        path: Where it is, for messages; null if that is not known.

    Raises:
        MisconfigurationException: If the optimizer's state is missing.
    """
    if "optimizer_states" not in checkpoint:
        raise MisconfigurationException(
            f"Expected a checkpoint with the optimizer's state to go on from, but it has nothing but weights{_at(path)}. Start a "
            "new run from them: `pgpo export`, and `model` the folder."
        )


def _at(path: Any) -> str:
    return f" ({path})" if path else ""


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
