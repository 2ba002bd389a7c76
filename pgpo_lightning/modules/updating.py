"""From gradients to weights: clipping, the optimizer step or its refusal, the schedule."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch.optim import Optimizer

from pgpo_lightning.distributed.fsdp import FullySharded, full_tensor
from pgpo_lightning.losses.step_statistics import StepStatistics
from pgpo_lightning.modules.lifecycle import Lifecycle
from pgpo_lightning.training.rates import check_rates


class Updating(Lifecycle):
    """Takes optimizer steps, none of which knows where the gradients came from."""

    max_grad_norm: float | None
    max_skipped_steps: int
    steps: int
    skipped: int
    skipped_in_a_row: int
    steps_without_signal: int
    """Optimizer steps that were left out because no row of any rank was in the loss."""
    step_statistics: StepStatistics
    scalars: dict[str, float]
    """What the current step reports. Callbacks may add to it."""

    _rates: list[tuple[dict[str, Any], Any]]
    """Parameter groups and the learning rates that they get back."""

    def update(self, loss: float) -> bool:
        """Clip and take one optimizer step, unless loss or gradient are not finite.

        Args:
            loss: Of this step.

        Returns:
            Whether the step was taken.

        Raises:
            RuntimeError: After `max_skipped_steps` steps in a row that were not.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        scaler = None if self._trainer is None else getattr(self._trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        norm = float(full_tensor(torch.nn.utils.clip_grad_norm_(parameters, limit * scale))) / scale
        rate = float(self.optimizers().param_groups[0]["lr"])
        self.scalars |= {"actor/pg_loss": loss, "actor/grad_norm": norm, "lr/base": rate}
        if torch.isfinite(torch.tensor([loss, norm])).all():
            try:
                self.optimizers().step()
            finally:
                self.restore_rates()
            self.optimizers().zero_grad()  # not before the next backward: generation needs the memory
            self.skipped_in_a_row = 0
            return True
        if scaler is not None and scale > 1:  # half precision looks for its scale: that is no failure of the run
            scaler.unscale_(self.optimizers().optimizer)  # takes notice of what is not finite
            scaler.update()
            self.skipped_in_a_row -= 1
        self.optimizers().zero_grad()
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.max_skipped_steps:
            raise RuntimeError(
                f"Expected finite losses and gradients, but {self.skipped_in_a_row} optimizer steps in a row had none "
                f"(loss {loss}, gradient norm {norm} at step {self.steps}); the weights were left as they were before them. "
                "Lower the learning rate, or raise `max_skipped_steps`. The last checkpoint is good."
            )
        return False

    def leave_out(self) -> None:
        """Take no optimizer step where no row of any rank is in the loss, and count it.

        Weights, momentum and weight decay stay out of it. Lightning's `max_steps` counts it, so that a run without any signal
        ends too.
        """
        rate = float(self.optimizers().param_groups[0]["lr"])
        self.scalars = {"actor/pg_loss": 0.0, "actor/grad_norm": 0.0, "lr/base": rate} | self.scalars
        self.step_statistics = StepStatistics.empty()
        self.steps_without_signal += 1
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()

    def scale_rates(self, optimizer: Optimizer, factor: float) -> None:
        """Multiply all learning rates for the rest of the optimizer step that is under way.

        :meth:`update` puts them back, also after an exception, an interrupt, or a step that a gradient scaler leaves out.

        Args:
            optimizer: Whose rates.
            factor: At least 0.
        """
        self.restore_rates()
        # The very objects are kept and put back: dividing by the factor would round, and a tensor would lose its identity.
        self._rates = [(group, group["lr"]) for group in optimizer.param_groups]
        for group, rate in self._rates:
            group["lr"] = rate * factor

    def restore_rates(self) -> None:
        """Undo :meth:`scale_rates`. Does nothing where there is nothing to undo."""
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates = []

    def _advance_schedule(self) -> None:
        if (scheduler := self.lr_schedulers()) is not None:
            with warnings.catch_warnings():
                # It goes by batches, and the first may have been skipped.
                warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before", UserWarning)
                scheduler.step()
            check_rates(self.optimizers(use_pl_optimizer=False))

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        if last:
            return nullcontext()
        if isinstance(self.placement, FullySharded):
            return self.placement.accumulating()
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()
