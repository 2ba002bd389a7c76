"""Acts on a collapse: ends the run, or restores its best weights and lowers the learning rate."""

from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from pgpo_lightning.callbacks.stability_monitor import StabilityMonitor
from pgpo_lightning.core.settings import Count, PositiveFraction, checked
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.monitoring.collapse_rules import BROKEN_TEACHER, CollapseRules
from pgpo_lightning.training.lowered_rates import lower_rates


@checked
class CollapseGuard(StabilityMonitor):
    """A :class:`StabilityMonitor` that acts when a rule fires.

    Rolling back restores weights, teacher and optimizer state of the evaluation with the best held-out score, which may be that
    of the base model. The run continues from there with the following batches and a permanently lower learning rate:
    `lr_factor` is multiplied into the rates and into the schedule. Logs, the count of steps and the state of a multiplier
    keep the steps in between; the rules forget them. After `max_rollbacks`, the next alarm rolls the run back once more and stops
    it, so that it ends with its best weights. So does an alarm for a broken teacher, which a lower rate does not repair.

    The best weights are kept in the memory of every process and within its checkpoints, not in a separate file. A run that is
    killed at any moment therefore resumes with the weights that belong to its checkpoint, whatever `checkpoint.keep` deletes.
    This costs CPU memory and disk for another copy of trained weights, teacher and optimizer state. If that is too much, train
    an adapter, or use ``stop`` with `checkpoint.keep` null.

    Args:
        action: ``warn``; ``stop`` ends the run after the batch, with a last evaluation; ``roll-back`` restores the best weights.
        rules: Thresholds; by default those of :class:`~pgpo_lightning.monitoring.collapse_rules.CollapseRules`.
        lr_factor: Multiplied into the learning rate at each rollback.
        max_rollbacks: Largest number of rollbacks after which the run continues.

    Raises:
        ValueError: If a setting is out of range.
        MisconfigurationException: At start-up, if there will be no weights to roll back to.
    """

    def __init__(
        self,
        action: Literal["warn", "stop", "roll-back"] = "stop",
        rules: CollapseRules | None = None,
        lr_factor: PositiveFraction = 0.5,
        max_rollbacks: Count = 3,
    ) -> None:
        super().__init__(rules)
        self.action = action
        self.lr_factor = lr_factor
        self.max_rollbacks = max_rollbacks
        self.rollbacks: list[list[int]] = []  # from which step to which
        self.best: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the curves, the rollbacks and the best weights so far."""
        return {**super().state_dict(), "rollbacks": [list(pair) for pair in self.rollbacks], "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of before the interruption."""
        super().load_state_dict(state_dict)
        self.rollbacks, self.best = [list(pair) for pair in state_dict["rollbacks"]], state_dict["best"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Check that there will be weights to roll back to."""
        if self.action != "roll-back" or trainer.fast_dev_run:
            return
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise MisconfigurationException(
                "Expected `trainer.strategy` auto or ddp for `action: roll-back`, because every process keeps all "
                f"weights, but got {type(trainer.strategy).__name__}. Use `action: stop`."
            )
        if not trainer.enable_validation:
            raise MisconfigurationException(
                "Expected a validation for `action: roll-back`, which restores the weights of the best held-out score, but "
                "there is none. Give held-out questions and a `limit_val_batches` above 0, or use `action: stop`."
            )
        if trainer.num_sanity_val_steps != float("inf") and trainer.ckpt_path is None:
            raise MisconfigurationException(
                "Expected `trainer.num_sanity_val_steps` to be -1 for `action: roll-back`, but got "
                f"{trainer.num_sanity_val_steps}: a run that collapses at once can only roll back to the base model, so its "
                "score must be known."
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Remember the scores, and the weights if they are the best so far."""
        super().on_validation_end(trainer, pl_module)
        scores = self.curves.get(f"val/avg@{pl_module.evaluator.config.samples}", {})
        score = scores.get(pl_module.steps)
        if self.action != "roll-back" or trainer.state.fn != TrainerFn.FITTING or score is None:
            return
        if self.best is None or score > self.best["score"]:
            with torch.inference_mode(False):
                self.best = {
                    "step": pl_module.steps,
                    "score": score,
                    "weights": {name: _copy(value) for name, value in _trained(pl_module).items()},
                    "optimizers": [_copy(optimizer.state_dict()["state"]) for optimizer in trainer.optimizers],
                }

    def alarm(self, trainer: L.Trainer, pl_module: OnPolicyModule, reasons: dict[str, str]) -> None:
        """Stop or roll back, as `action` says."""
        if self.action == "warn":
            return
        now = pl_module.steps
        stops = self.action == "stop" or self.best is None
        message = "Stopped"
        if self.action == "roll-back" and self.best is not None:
            message = f"Back to the weights of step {self.best['step']} (held-out score {self.best['score']:.3g})"
            stops = len(self.rollbacks) >= self.max_rollbacks or BROKEN_TEACHER in reasons
            self._go_back(trainer, pl_module, self.best)
            if not stops:
                schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
                lower_rates(trainer.optimizers, schedules, self.lr_factor)
            message += ", and stopped" if stops else f", learning rate times {self.lr_factor:g}"
        trainer.should_stop = trainer.should_stop or stops
        rank_zero_warn(f"{message} after step {now}, because of {', '.join(reasons)}.")

    def _go_back(self, trainer: L.Trainer, pl_module: OnPolicyModule, best: dict[str, Any]) -> None:
        step = best["step"]
        with torch.inference_mode(False):
            pl_module.load_state_dict({**pl_module.state_dict(), **best["weights"]})
            for optimizer, state in zip(trainer.optimizers, best["optimizers"], strict=True):
                # The rates stay those of the schedule now. A copy, because torch keeps the tensors that it is given.
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": _copy(state), "param_groups": groups})
        self.rollbacks.append([pl_module.steps, step])
        self.curves = {tag: {s: v for s, v in points.items() if s <= step} for tag, points in self.curves.items()}
        self.warned = {}  # a rule that fires again acts again
        self._log(trainer, pl_module.steps, {"rollbacks": float(len(self.rollbacks))}, always=True)


def _trained(pl_module: OnPolicyModule) -> dict[str, Any]:
    """Return the state that a step may change: all except frozen weights of the student, such as those under an adapter."""
    frozen = {
        f"model.{name}"
        for name, parameter in pl_module.get_submodule("model").named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
    return {name: value for name, value in pl_module.state_dict().items() if name not in frozen}


def _copy(value: Any) -> Any:
    """Return a deep copy with tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(each) for key, each in value.items()}
    return type(value)(_copy(each) for each in value) if isinstance(value, (list, tuple)) else value
