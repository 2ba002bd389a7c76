"""Optimizer and learning-rate schedule of a run."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel

from pgpo_lightning.training.rates import build_optimizer, check_rates
from pgpo_lightning.training.resumed_optimizer import describe_optimizer
from pgpo_lightning.training.resuming import ResumedSettings
from pgpo_lightning.training.start_up import check_optimizer_fits, check_schedule


def adamw(parameters: Any) -> Optimizer:
    """Return the default optimizer: AdamW with a learning rate of 1e-5 and a weight decay of 0.01."""
    return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.01)


class Optimization:
    """Builds optimizer and schedule, and lets their settings take effect in a run that is resumed.

    Args:
        make_optimizer: From parameters to an optimizer.
        make_scheduler: From an optimizer to a schedule; null for none.
    """

    def __init__(
        self, make_optimizer: Callable[[Any], Optimizer], make_scheduler: Callable[[Optimizer], Any] | None
    ) -> None:
        self.make_optimizer, self.make_scheduler = make_optimizer, make_scheduler

    def build(self, model: PreTrainedModel, sharded: bool, resumed: ResumedSettings | None) -> Any:
        """Return what Lightning wants of ``configure_optimizers``.

        Args:
            model: The student.
            sharded: Whether its weights are sharded over ranks.
            resumed: The run's settings, which the optimizer's are added to and compared with; null outside of a fit.

        Raises:
            ValueError: If a setting is out of range; names it.
            MisconfigurationException: If optimizer or schedule do not fit the run, or the checkpoint that it goes on from.
        """
        optimizer = build_optimizer(self.make_optimizer, trained(model))
        check_optimizer_fits(optimizer, model, sharded)
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


def trained(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Return the parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
