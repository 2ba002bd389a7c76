"""Optimizer and learning-rate schedule of a run."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from pgpo_lightning.training.configs import UpdateConfig
from pgpo_lightning.training.rates import build_optimizer, check_rates
from pgpo_lightning.training.resumed_optimizer import describe_optimizer
from pgpo_lightning.training.resuming import ResumedSettings
from pgpo_lightning.training.start_up import check_optimizer_fits, check_schedule, count_batches, gathers_checkpoints


def adamw(parameters: Any) -> Optimizer:
    """Return the default optimizer: AdamW with a learning rate of 1e-5 and a weight decay of 0.01."""
    return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.01)


class Optimization:
    """Builds optimizer and schedule, and lets their settings take effect in a run that is resumed.

    Args:
        make_optimizer: From parameters to an optimizer.
        make_scheduler: From an optimizer to a schedule; null for none.
        update: `lr_scheduler_type` and `warmup_steps`, and how many optimizer steps a batch has.

    Raises:
        ValueError: If there are two schedules.
    """

    def __init__(
        self,
        make_optimizer: Callable[[Any], Optimizer],
        make_scheduler: Callable[[Optimizer], Any] | None,
        update: UpdateConfig | None = None,
    ) -> None:
        self.make_optimizer, self.make_scheduler = make_optimizer, make_scheduler
        self.update = update or UpdateConfig()
        if make_scheduler is not None and (kind := self.update.lr_scheduler_type) is not None:
            raise ValueError(
                f"Expected one schedule of the learning rate, but got `scheduler` and `update.lr_scheduler_type` {kind}. Remove "
                "one of them."
            )

    def build(
        self, model: PreTrainedModel, sharded: bool, resumed: ResumedSettings | None, trainer: L.Trainer | None = None
    ) -> Any:
        """Return what Lightning wants of ``configure_optimizers``.

        Args:
            model: The student.
            sharded: Whether its weights are sharded over ranks.
            resumed: The run's settings, which the optimizer's are added to and compared with; null outside of a fit.
            trainer: Tells the length of the run to a schedule that depends on it.

        Raises:
            ValueError: If a setting is out of range; names it.
            MisconfigurationException: If optimizer or schedule do not fit the run, or the checkpoint that it goes on from.
        """
        if self.update.lr_scheduler_type is not None:
            self.make_scheduler = named_schedule(self.update, partial(_length, trainer, self.update))
        optimizer = build_optimizer(self.make_optimizer, trained(model))
        check_optimizer_fits(optimizer, model, sharded, gathers_checkpoints(trainer))
        if resumed is None:
            scheduler, _ = describe_optimizer(optimizer, self.make_scheduler)
        else:
            scheduler = resumed.schedule(optimizer, self.make_scheduler)
        if scheduler is None:
            return optimizer
        check_rates(optimizer)
        check_schedule(scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def take_effect(self, model: PreTrainedModel, resumed: ResumedSettings | None, step: int) -> None:
        """Let changed settings of optimizer and schedule take effect, over what was restored."""
        if resumed is not None:
            resumed.take_effect(self.make_optimizer, self.make_scheduler, trained(model), step)


def named_schedule(update: UpdateConfig, length: Callable[[], float]) -> Callable[[Optimizer], Any]:
    """Return what makes the schedule of `update.lr_scheduler_type`, which is that of transformers.

    Args:
        update: Its name, and the batches of its warm-up.
        length: Returns the number of batches of the run; asked only for ``linear`` and ``cosine``.

    Raises:
        MisconfigurationException: If the schedule depends on the length of a run without an end.
    """
    from transformers import get_scheduler  # here, because it loads more than a run without a schedule needs

    kind, warmup, total = str(update.lr_scheduler_type), update.warmup_steps, None
    if kind in ("linear", "cosine"):
        batches = length()
        if not math.isfinite(batches):
            raise MisconfigurationException(
                f"Expected a run with a known length for `update.lr_scheduler_type` {kind}, but it has none. Set "
                "`trainer.max_steps`."
            )
        total = int(batches)
        if warmup >= total:
            rank_zero_warn(
                f"The learning rate rises to the end of the run: `update.warmup_steps` is {warmup} and the run has {total} "
                "batches."
            )
    return partial(get_scheduler, kind, num_warmup_steps=warmup, num_training_steps=total)


def _length(trainer: L.Trainer | None, update: UpdateConfig) -> float:
    return math.inf if trainer is None else count_batches(trainer, update)


def trained(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Return the parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
