"""Stops a collapse: ends the run, or goes back to its best weights with a lower learning rate."""

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

    Going back restores weights, teacher and optimizer state as they were at the evaluation with the best held-out score, that
    of the base model included. The run goes on from there with the batches that follow, at a learning rate that is lower for
    good: `lr_factor` is multiplied into the rates and into the schedule. What happened in between stays in logs and in the
    count of steps, and a multiplier keeps what it has learnt, but rules forget it. When a rule fires after the last allowed
    time, or shows a broken teacher, which no rate can mend, the run goes back once more and stops: it ends with its best
    weights.

    The best weights are kept in the memory of every process and within its checkpoints, not in a file of their own: so a run
    that is killed at any moment resumes with exactly the ones that belong to its checkpoint, whatever `checkpoint.keep`
    deletes. That costs CPU memory and disk for trained weights, teacher and optimizer state once more. Where this is too much,
    train an adapter, or take ``stop`` with `checkpoint.keep` null.

    Args:
        action: ``warn``; ``stop`` ends the run after the batch, with a last evaluation; ``roll-back`` goes back.
        rules: Thresholds; by default those of :class:`~pgpo_lightning.monitoring.collapse_rules.CollapseRules`.
        lr_factor: Multiplied into the learning rate each time the run goes back.
        max_rollbacks: How often it goes back and goes on.

    Raises:
        ValueError: If a setting is out of range.
        MisconfigurationException: At start-up, if there is nothing to go back to.
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
        """Return what was seen, how often the run went back, and the best weights."""
        return {**super().state_dict(), "rollbacks": [list(pair) for pair in self.rollbacks], "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what was there before the interruption."""
        super().load_state_dict(state_dict)
        self.rollbacks, self.best = [list(pair) for pair in state_dict["rollbacks"]], state_dict["best"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Check that there will be something to go back to."""
        if self.action != "roll-back" or trainer.fast_dev_run:
            return
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise MisconfigurationException(
                "Expected `trainer.strategy` auto or ddp for `action: roll-back`, because every process keeps whole weights, but "
                f"got {type(trainer.strategy).__name__}. Use `action: stop`."
            )
        if not trainer.enable_validation:
            raise MisconfigurationException(
                "Expected a validation for `action: roll-back`, which goes back to the best held-out score, but there is none. "
                "Give held-out questions and a `limit_val_batches` above 0, or use `action: stop`."
            )
        if trainer.num_sanity_val_steps != float("inf") and trainer.ckpt_path is None:
            raise MisconfigurationException(
                "Expected `trainer.num_sanity_val_steps` to be -1 for `action: roll-back`, but got "
                f"{trainer.num_sanity_val_steps}: a run that collapses at once can only go back to the base model, whose score "
                "has to be known."
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
        """Do what the user chose."""
        if self.action == "warn":
            return
        now = pl_module.steps
        over = self.action == "stop" or self.best is None
        told = "Stopped"
        if self.action == "roll-back" and self.best is not None:
            told = f"Back to the weights of step {self.best['step']} (held-out score {self.best['score']:.3g})"
            over = len(self.rollbacks) >= self.max_rollbacks or BROKEN_TEACHER in reasons
            self._go_back(trainer, pl_module, self.best)
            if not over:
                schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
                lower_rates(trainer.optimizers, schedules, self.lr_factor)
            told += ", and stopped" if over else f", learning rate times {self.lr_factor:g}"
        trainer.should_stop = trainer.should_stop or over
        rank_zero_warn(f"{told} after step {now}, because of {', '.join(reasons)}.")

    def _go_back(self, trainer: L.Trainer, pl_module: OnPolicyModule, best: dict[str, Any]) -> None:
        step = best["step"]
        with torch.inference_mode(False):
            pl_module.load_state_dict({**pl_module.state_dict(), **best["weights"]})
            for optimizer, state in zip(trainer.optimizers, best["optimizers"], strict=True):
                # The rates stay where the schedule is now. A copy, because torch keeps the tensors that it is given.
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": _copy(state), "param_groups": groups})
        self.rollbacks.append([pl_module.steps, step])
        self.curves = {tag: {s: v for s, v in points.items() if s <= step} for tag, points in self.curves.items()}
        self.warned = {}  # what fires again shall act again
        self._log(trainer, pl_module.steps, {"rollbacks": float(len(self.rollbacks))}, always=True)


def _trained(pl_module: OnPolicyModule) -> dict[str, Any]:
    """Return what a step may change: everything but the frozen weights of the student, such as those under an adapter."""
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
