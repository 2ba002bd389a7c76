"""What `pgpo plan` finds out about evaluations: the number of questions, and how often they are asked."""

from typing import Any

from pgpo_lightning.core.settings import Count, check
from pgpo_lightning.data.questions import QuestionData
from pgpo_lightning.memory_planner.workload import Evaluations
from pgpo_lightning.modules import OnPolicyModule


def evaluations_of(
    trainer: Any, module: OnPolicyModule, data: QuestionData, questions: int | None
) -> Evaluations | None:
    """Return the evaluations of a run, None if it has none.

    Args:
        trainer: Settings of the Trainer.
        module: The module.
        data: The data.
        questions: Held-out questions, if given.

    Raises:
        ValueError: If the number of questions is out of range.
    """
    check("questions", questions, Count | None)
    if trainer.limit_val_batches == 0:
        return None
    questions = data.held_out_questions() if questions is None else questions
    every, batches = trainer.val_check_interval, trainer.max_steps // module.update.steps_per_batch
    per_step = None
    # `pgpo fit` counts a whole number in batches, whatever the length of an epoch.
    if isinstance(every, int) and batches > 0 and trainer.check_val_every_n_epoch in (None, 1):
        before = trainer.num_sanity_val_steps == -1  # of the untrained model
        per_step = (batches // every + before) / batches
    return Evaluations(questions, data.eval_batch_size, module.evaluator.config.max_sequences, per_step)


def evaluated_at_once(found: Evaluations | None, samples: int, devices: int, at_once: int | None) -> int:
    """Return the maximum number of answers that a device decodes at the same time in an evaluation; 0 for no evaluation.

    Args:
        found: The evaluations of the run.
        samples: Answers per question.
        devices: Number of devices.
        at_once: Maximum responses that the engine decodes at the same time in training; None for all.

    Raises:
        ValueError: If it is unlimited, because the number of questions is unknown.
    """
    if found is None:
        return 0
    limits = [limit for limit in (found.at_once or at_once,) if limit is not None]
    if found.questions is not None:
        limits.append(-(-found.questions // devices) * samples)
    if found.batch is not None:
        limits.append(found.batch * samples)
    if not limits:
        raise ValueError(
            "Expected `questions`, the number of held-out questions, because neither `data.eval_batch_size` nor "
            "`max_sequences` limits how many are answered at the same time, but got null."
        )
    return min(limits)
