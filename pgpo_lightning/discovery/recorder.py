"""The callback that writes the attempts of a run that trains, and ends it with the first success."""

from typing import Any

import lightning as L

from pgpo_lightning.core.settings import Count, Text, checked
from pgpo_lightning.discovery.attempts import AttemptsFile, batch_of
from pgpo_lightning.discovery.base_runs import no_feedback
from pgpo_lightning.modules.on_policy import OnPolicyModule


@checked
class AttemptRecorder(L.Callback):
    """Writes every rollout of a step as an attempt, before a checkpoint of that step can be written.

    A run that was killed between the two makes the step again, with the same draws. Its attempts are in the file already, and are
    not written a second time.

    Args:
        folder: Of the attempts.
        size: Attempts per step.
        stop: End the run after the step with the first success.
    """

    def __init__(self, folder: Text, size: Count, stop: bool = True) -> None:
        self.file, self.stop = AttemptsFile(folder, size), stop
        self._written = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Refuse a module that cannot learn before the first success.

        Raises:
            ValueError: If the module has no self-teacher.
        """
        if not pl_module.has_teacher:
            raise ValueError(
                f"Expected `model` to be a module with a self-teacher, such as SDPO, but got {type(pl_module).__name__}. Before "
                "the first success a reward method has no gradient, so that it is best-of-k."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Read how many attempts the file has."""
        self._written = len(self.file.repair())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: OnPolicyModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the attempts of the step.

        Raises:
            ValueError: If no attempt of the first step has a teacher, because there is no feedback.
        """
        _check_feedback(pl_module)
        told = pl_module.reported
        sampled = told["timing_s/gen"] + told["timing_s/reward"]
        threshold, number = pl_module.reward.success_threshold, pl_module.steps - 1
        attempts = batch_of(pl_module.last_samples, threshold, number, sampled, told["timing_s/step"] - sampled)
        if attempts[0].number > self._written:
            self.file.append(attempts)
            self._written += len(attempts)
        if self.stop and any(attempt.success for attempt in attempts):
            trainer.should_stop = True


def _check_feedback(module: OnPolicyModule) -> None:
    samples, threshold = module.last_samples, module.reward.success_threshold
    failed = all(sample.verdict.reward < threshold for sample in samples)
    if module.steps == 1 and failed and all(sample.reprompt_ids is None for sample in samples):
        raise no_feedback("the self-teacher", samples[0].rollout.question)
