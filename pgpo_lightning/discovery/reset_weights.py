"""The control whose updates do not add up: every step is taken from the weights that the run began with."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from pgpo_lightning.modules.on_policy import OnPolicyModule


class ResetWeights(L.Callback):
    """Puts the initial weights back before every optimizer step, and forgets the optimizer's moments.

    The attempts of a batch therefore come from the initial weights after one update, that of the batch before. What SDPO gains
    over this control it gains by accumulating updates. Not for sharded weights.
    """

    def __init__(self) -> None:
        self._initial: dict[str, Tensor] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Keep the weights, unless the run is resumed."""
        if self._initial is None:
            self._initial = {name: p.detach().clone() for name, p in _trained(pl_module)}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: OnPolicyModule, optimizer: Optimizer) -> None:
        """Put the weights back; the gradients stay."""
        initial = self._initial or {}
        with torch.no_grad():
            for name, parameter in _trained(pl_module):
                parameter.copy_(initial[name])
        optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the initial weights: a checkpoint has moved ones."""
        return {"initial": self._initial}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the initial weights."""
        self._initial = state_dict["initial"]


def _trained(module: OnPolicyModule) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.model.named_parameters() if parameter.requires_grad]
