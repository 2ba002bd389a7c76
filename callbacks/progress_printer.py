"""Progress of a run whose output goes to a file: one line per step and per evaluation."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.training.held_out import summary_line


class ProgressPrinter(ProgressBar):
    """Prints step, reward, information I (nats), multiplier rho and seconds of every step, and the scores of every evaluation.

    Replaces a progress bar, which would fill a log file with control characters.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._start = 0.0

    def enable(self) -> None:
        """Enable printing."""
        self._enabled = True

    def disable(self) -> None:
        """Disable printing, on all ranks except the first."""
        self._enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print text of the module."""
        if self._enabled:
            print(*args, **kwargs)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: OnPolicyModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: OnPolicyModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print the step."""
        if not self._enabled:
            return
        seconds, shown = time.perf_counter() - self._start, trainer.progress_bar_metrics
        # Lightning goes on showing the last rho, also after a step that the optimizer did not take.
        names = ["reward", "I", *(["rho"] if "lr/multiplier" in pl_module.scalars else [])]
        parts = [f"{name} {float(shown[name]):.3f}" for name in names if name in shown]
        print(", ".join([f"step {pl_module.steps}", *parts, f"{seconds:.1f} s"]), flush=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Print the scores of a training run's evaluation."""
        evaluator = pl_module.evaluator
        if self._enabled and trainer.state.fn == TrainerFn.FITTING and evaluator.held_out is not None:
            scores = summary_line(evaluator.held_out, evaluator.config.samples)
            print(f"step {pl_module.steps}, held-out {scores}", flush=True)
