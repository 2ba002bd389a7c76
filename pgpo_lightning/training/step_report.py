"""The values that a step logs, and the warnings about steps without signal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pgpo_lightning.core.devices import is_gpu
from pgpo_lightning.core.types import Sample
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.losses.information import information
from pgpo_lightning.losses.step_statistics import StepStatistics
from pgpo_lightning.training.actor import Actor
from pgpo_lightning.training.no_signal import Outcomes, explain, explain_failures
from pgpo_lightning.training.objective import Objective
from pgpo_lightning.training.preflight import less_certain
from pgpo_lightning.training.step_log import loss_scalars, rollout_scalars

STEPS_WITHOUT_SUCCESS = 10
"""Batches in a row without a success after which there is a warning, and again after as many more."""


class Timer:
    """Seconds of the phases of a step.

    Attributes:
        seconds: By the name of their curve. A phase in several pieces is their sum.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is enclosed."""
        start = time.perf_counter()
        yield
        tag = f"timing_s/{name}"
        self.seconds[tag] = self.seconds.get(tag, 0.0) + time.perf_counter() - start


class StepReporter:
    """Turns what a step saw into scalars, a line of the progress bar, and warnings.

    Args:
        objective: Objective of the run.
        actor: Counts failures of the verifier.
        num_generations: Rollouts per question.
        max_response_length: Longest response in tokens.
    """

    def __init__(self, objective: Objective, actor: Actor, num_generations: int, max_response_length: int) -> None:
        self.objective, self.actor = objective, actor
        self.num_generations, self.max_response_length = num_generations, max_response_length
        self.threshold = actor.reward.success_threshold
        self.steps_without_success = 0
        """Batches in a row without a success, of all ranks, since the run was started."""

    def scalars(
        self,
        samples: list[Sample],
        statistics: StepStatistics,
        scalars: dict[str, float],
        seconds: dict[str, float],
        device: torch.device,
    ) -> dict[str, float]:
        """Return what a step is logged as; every value is that of all ranks together.

        With several updates per batch the statistics are those of the first, whose policy is the one that the batch was sampled
        from, as Eq. 8 of PGPO wants it; loss, gradient norm and rates are those of the last.

        Args:
            samples: This rank's.
            statistics: Statistics of the sequences in the loss of the first update, of all ranks.
            scalars: Scalars of the objective, the learner and the callbacks on this rank; averaged over ranks.
            seconds: Seconds of each phase; the largest of all ranks, because the others wait for the slowest.
            device: Whose highest memory (GiB) is logged, if it is a GPU.
        """
        memory = torch.cuda.max_memory_allocated() / 2**30 if is_gpu(device) else None
        seconds = seconds | self.actor.seconds
        shared = gather((scalars, seconds, memory))
        divergence, teaching = self.objective.divergence, self.objective.teaching
        # A bound is for teachers with the student's weights, which are not far from it at first.
        bound = None if divergence is None or (teaching is not None and teaching.config.model) else divergence.bound
        found = {name: sum(each[0][name] for each in shared) / len(shared) for name in scalars}
        found |= rollout_scalars(samples, self.threshold)
        found |= loss_scalars(statistics, self.threshold, bound)
        found |= {name: max(each[1][name] for each in shared) for name in seconds}
        found["perf/tokens_per_s"] = found["response_length/total"] / found["timing_s/step"]
        self.actor.count_verifier_errors()
        found["rollout/verifier_errors"] = float(self.actor.verifier_errors)
        if memory is not None:
            found["perf/max_memory_allocated_gb"] = max(each[2] or 0.0 for each in shared)
        self._warn_of_failures(samples, found["critic/score/success"], explained=not len(statistics))
        return found

    def progress_bar(self, scalars: dict[str, float], statistics: StepStatistics) -> dict[str, float]:
        """Return what the progress bar shows of a step."""
        bar = {"reward": scalars["critic/score/mean"]}
        if self.objective.teaching is not None:
            bar["I"] = scalars.get("information/used", information(statistics).value)
        if "lr/multiplier" in scalars:
            bar["rho"] = scalars["lr/multiplier"]
        return bar

    def _warn_of_failures(self, samples: list[Sample], success: float, explained: bool = False) -> None:
        """Warn when no rollout has succeeded for some steps, if the teacher shows successes. All ranks have to call it.

        Args:
            samples: This rank's samples of the step.
            success: Share of successes, of all ranks.
            explained: Whether nothing is in the loss, which :meth:`warn_of_missing_signal` explains.
        """
        self.steps_without_success = 0 if success > 0 else self.steps_without_success + 1
        teaching, count = self.objective.teaching, self.steps_without_success
        if (
            explained
            or teaching is None
            or teaching.builder.demonstration_source == "none"
            or not count
            or count % STEPS_WITHOUT_SUCCESS
        ):
            return
        seen = Outcomes.join(gather(Outcomes.from_samples(samples)))
        feedback = teaching.builder.include_environment_feedback
        why = explain_failures(seen, count, self.threshold, self.max_response_length, feedback)
        rank_zero_warn(why)

    def warn_of_missing_signal(self, missed: list[list[Sample]], step: int, total: int) -> None:
        """Warn when an optimizer step is left out for the first time, and every tenth time.

        Args:
            missed: This rank's samples of every update of the batch that was left out.
            step: Batches trained on so far.
            total: Optimizer steps that were left out so far.
        """
        before = total - len(missed)
        if not missed or (before and total // 10 == before // 10):
            return
        samples = [sample for update in missed for sample in update if not sample.demonstration]
        seen = Outcomes.join(gather(Outcomes.from_samples(samples)))
        teaching = self.objective.teaching
        feedback = teaching is not None and teaching.builder.include_environment_feedback
        limits = (self.threshold, self.max_response_length, self.num_generations)
        why = explain(seen, *limits, teaching is not None, feedback)
        rank_zero_warn(
            f"Step {step}: no rollout is in the loss, so no optimizer step was taken ({total} so far). {why}"
        )


def log(module: L.LightningModule, scalars: dict[str, float], **settings: Any) -> None:
    """Log scalars with ``LightningModule.log_dict``, as fp32 tensors on the CPU.

    Lightning would make each number a tensor of the default dtype on the device, and copy it back: two waits for a GPU per value.
    """
    on_host = {name: torch.tensor(value, dtype=torch.float32, device="cpu") for name, value in scalars.items()}
    module.log_dict(on_host, **settings)


def log_to_loggers(trainer: L.Trainer, scalars: dict[str, float], step: int) -> None:
    """Hand a step's scalars to all loggers, every `log_every_n_steps` batches (0 means never).

    Not through ``LightningModule.log``: within an epoch it goes on reporting the last value of a curve that has no value now,
    such as the divergence of failed responses in a step without any.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside of Lightning's Trainer class
    if every and step % every == 0:
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=step)


def warn_of_harm(statistics: StepStatistics, step: int) -> None:
    """Warn if the teacher is significantly less certain than the student, before the first optimizer step."""
    if (harm := less_certain(statistics)) is not None:
        rank_zero_warn(f"Step {step + 1}: {harm}.")


def count_left_out(trainer: L.Trainer) -> None:
    """Let Lightning's `max_steps` count an optimizer step that was left out, so that a run without any signal ends too."""
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    progress.increment_ready()
    progress.increment_completed()
