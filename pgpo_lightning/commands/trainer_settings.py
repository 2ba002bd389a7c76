"""Settings of Lightning's Trainer that have no effect, or another effect, in this package."""

import json
from typing import Any

from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    Timer,
)

from pgpo_lightning.callbacks import ResumeCheckpoint, RunSummary
from pgpo_lightning.core.texts import shown

INSTEAD = {
    "barebones": (
        False,
        "a run writes a log and checkpoints. Remove it, and disable single features by their own settings",
    ),
    "accumulate_grad_batches": (
        1,
        "a batch is one step. Set `model.init_args.update.micro_batch_tokens` to save memory",
    ),
    "gradient_clip_val": (None, "the module clips. Set `model.init_args.update.max_grad_norm`"),
    "gradient_clip_algorithm": (None, "the module clips, by the norm. Set `model.init_args.update.max_grad_norm`"),
}
CALLBACKS: dict[type[Callback], str] = {
    LearningRateFinder: "it needs a loss that `training_step` does not return. Compare rates with `pgpo ablate`",
    BatchSizeFinder: (
        "it takes steps that are discarded. Use `pgpo plan`, and set `model.init_args.update.micro_batch_tokens`"
    ),
    StochasticWeightAveraging: "neither rollouts nor the teacher would use the averages. Set `teacher.regularization: ema`",
    GradientAccumulationScheduler: "a batch is one step. Set `model.init_args.update.micro_batch_tokens` to save memory",
    ResumeCheckpoint: "every run has its own. Set `checkpoint.every_n_train_steps` and `checkpoint.keep`",
    RunSummary: "every run has its own. Set it by `summary`",
}


def check_trainer(config: Any) -> None:
    """Raise if the Trainer has a setting that training does not follow.

    Args:
        config: The arguments of the Trainer, with callbacks that have been built.

    Raises:
        ValueError: If a setting has no effect, or leaves nothing to train.
    """
    for name, (only, why) in INSTEAD.items():
        if (value := config.get(name)) is not None and value != only:
            wanted, got = shown(only, json.dumps), shown(value, json.dumps)
            raise ValueError(f"Expected `trainer.{name}` to be {wanted}, but got {got}: {why}.")
    callbacks = config.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        for kind, why in CALLBACKS.items():
            if isinstance(callback, kind):
                raise ValueError(f"Expected `trainer.callbacks` without {kind.__name__}, but got one: {why}.")
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        if config.get(name) == 0:
            raise ValueError(
                f"Expected `trainer.{name}` to leave something to train, but got 0. `pgpo validate` trains nothing."
            )
    for unit in ("steps", "epochs"):
        least, most = config.get(f"min_{unit}"), config.get(f"max_{unit}")
        if least is not None and most not in (None, -1) and least > most:
            raise ValueError(
                f"Expected `trainer.min_{unit}` to be at most `trainer.max_{unit}`, {most}, but got {least}."
            )
    if (limit := config.get("max_time")) is not None and not (Timer(limit)._duration or 0) > 0:
        raise ValueError(f"Expected `trainer.max_time` to be longer than nothing, but got {limit}.")
