"""Monitors early signs of a collapse, which appear before the held-out score falls."""

from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pgpo_lightning.callbacks.per_run_state import PerRunState
from pgpo_lightning.core.settings import checked
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.monitoring.collapse_rules import TAGS, CollapseRules, alarms, signs


@checked
class StabilityMonitor(PerRunState):
    """Logs the signs of a collapse as ``stability/*`` and warns once for every rule that fires, with its reason.

    The signs are those of :func:`pgpo_lightning.monitoring.collapse_rules.signs`; `stability/alarms` is the number of rules
    that fire. At evaluations `stability/pass_of_first` is the held-out pass@k over that of the first evaluation. If it is below 1
    while the score rises, the student solves fewer questions more often.

    Args:
        rules: Thresholds; by default those of :class:`~pgpo_lightning.monitoring.collapse_rules.CollapseRules`.
    """

    def __init__(self, rules: CollapseRules | None = None) -> None:
        self.rules = rules or CollapseRules()
        self.curves: dict[str, dict[int, float]] = {}  # input of the rules
        self.warned: dict[str, str] = {}  # rule to reason

    def state_dict(self) -> dict[str, Any]:
        """Return the curves and warnings so far."""
        return {"curves": {tag: dict(points) for tag, points in self.curves.items()}, "warned": dict(self.warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curves and warnings of before the interruption."""
        self.curves = {tag: dict(points) for tag, points in state_dict["curves"].items()}
        self.warned = dict(state_dict["warned"])

    def setup(self, trainer: L.Trainer, pl_module: OnPolicyModule, stage: str) -> None:
        """Raise if there is a second monitor: both would log the same curves."""
        self.reset_for_new_run(trainer, stage)
        active = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, StabilityMonitor)]
        if len(active) > 1:
            raise MisconfigurationException(
                f"Expected one StabilityMonitor, but got {' and '.join(active)}. A CollapseGuard monitors too."
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: OnPolicyModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the signs of this step, and warn."""
        now = pl_module.steps
        # These values are of all ranks, so that every rank decides alike. Lightning's metrics would repeat the last divergence
        # in steps that have none.
        for tag in TAGS:
            if tag in pl_module.reported:
                self.curves.setdefault(tag, {})[now] = pl_module.reported[tag]
        found = alarms(self.curves, now, self.rules)
        self._log(trainer, now, {**signs(self.curves, now, self.rules), "alarms": float(len(found))})
        new = {name: reason for name, reason in found.items() if name not in self.warned}
        self.warned |= new
        for name, reason in new.items():
            rank_zero_warn(f"Step {now}, {name}: {reason}.")
        if new:
            self.alarm(trainer, pl_module, new)

    def alarm(self, trainer: L.Trainer, pl_module: OnPolicyModule, reasons: dict[str, str]) -> None:
        """Act on rules that fire for the first time. A monitor only warns, which it has already done.

        Args:
            trainer: The trainer.
            pl_module: The module.
            reasons: Rule to reason.
        """

    def on_validation_end(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Remember the held-out scores, which rules read at the end of the next batch."""
        # Before the first step Lightning evaluates a few batches only, unless `num_sanity_val_steps` is -1.
        whole = not trainer.sanity_checking or trainer.num_sanity_val_steps == float("inf")
        held_out = pl_module.evaluator.held_out
        if trainer.state.fn != TrainerFn.FITTING or not whole or held_out is None:
            return
        k = pl_module.evaluator.config.samples
        # Not from the logged metrics: Lightning discards those of before the first step.
        for name in ("avg", "pass"):
            self.curves.setdefault(f"val/{name}@{k}", {})[pl_module.steps] = held_out.scores[name]
        passed = list(self.curves[f"val/pass@{k}"].values())
        if passed[0] > 0:
            self._log(trainer, pl_module.steps, {"pass_of_first": passed[-1] / passed[0]}, always=True)

    def _log(self, trainer: L.Trainer, step: int, values: dict[str, float], always: bool = False) -> None:
        every = trainer.log_every_n_steps  # 0 means never
        if always or (every and step % every == 0):
            for logger in trainer.loggers:
                logger.log_metrics({f"stability/{name}": value for name, value in values.items()}, step=step)
