"""What a step logs, and when."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pgpo_lightning.core.types import Sample
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.losses.divergence import Divergence
from pgpo_lightning.losses.information import information
from pgpo_lightning.losses.step_statistics import StepStatistics
from pgpo_lightning.modules.updating import Updating
from pgpo_lightning.training.no_signal import Outcomes, explain
from pgpo_lightning.training.preflight import less_certain
from pgpo_lightning.training.step_log import loss_scalars, rollout_scalars


class Reporting(Updating):
    """Times the phases of a step and logs it."""

    has_teacher = False
    """Whether the objective compares the student with a teacher, so that there is information to measure."""

    shows_feedback = False
    """Whether a teacher is shown the feedback of the verifier or the data."""

    num_generations: int

    measured: Divergence | None
    """Which divergence between student and teacher is reported."""

    reported: dict[str, float]
    """What the last step reported, of all ranks together."""

    last_rows: list[Sample]
    """This rank's rows of the last step, for callbacks that show texts."""

    _timing: dict[str, float]

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._timing[f"timing_s/{phase}"] = time.perf_counter() - start

    @property
    def weights_are_the_start(self) -> bool:
        """Whether no optimizer step has been taken yet, in this run or those that it continues."""
        return self.trainer.global_step == self.steps_without_signal

    def check_answers(self, rows: list[Sample]) -> None:
        """Look at the rollouts of a batch before anything is learnt from them."""

    def check_information(self) -> None:
        """Warn before the first optimizer step if the teacher is significantly less certain than the student."""
        if self.weights_are_the_start and (harm := less_certain(self.step_statistics)) is not None:
            rank_zero_warn(f"Step {self.steps + 1}: {harm}.")

    def tell_of_missing_signal(self, missed: list[list[Sample]]) -> None:
        """Warn when an optimizer step is left out for the first time, and every tenth time.

        Args:
            missed: This rank's rows of every update of the batch that was left out.
        """
        now, before = self.steps_without_signal, self.steps_without_signal - len(missed)
        if not missed or (before and now // 10 == before // 10):
            return
        rows = [row for share in missed for row in share if not row.demonstration]
        seen = Outcomes.join(gather(Outcomes.from_samples(rows)))
        why = explain(
            seen,
            self.success_reward_threshold,
            self.max_response_length,
            self.num_generations,
            self.has_teacher,
            self.shows_feedback,
        )
        rank_zero_warn(
            f"Step {self.steps}: no rollout is in the loss, so no optimizer step was taken ({now} so far). {why}"
        )

    def report(self, rows: list[Sample], statistics: StepStatistics) -> None:
        """Log the step; every value is that of all ranks together.

        With several updates per batch the statistics are those of the first, whose policy is the one that the batch was sampled
        from, as Eq. 8 of PGPO wants it; loss, gradient norm and rates are those of the last.

        Args:
            rows: This rank's rollouts.
            statistics: Of the sequences in the loss of the first update, of all ranks.
        """
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None
        shared = gather((self.scalars, self._timing, memory))
        scalars = {name: sum(each[0][name] for each in shared) / len(shared) for name in self.scalars}
        scalars |= rollout_scalars(rows, self.success_reward_threshold)
        bound = None if self.measured is None else self.measured.bound
        scalars |= loss_scalars(statistics, self.success_reward_threshold, bound)
        scalars |= {
            name: max(each[1][name] for each in shared) for name in self._timing
        }  # the others wait for the slowest
        scalars["perf/tokens_per_s"] = scalars["response_length/total"] / scalars["timing_s/step"]
        scalars["actor/skipped_steps"] = float(self.skipped)
        scalars["actor/steps_without_signal"] = float(self.steps_without_signal)
        self.count_verifier_errors()
        scalars["rollout/verifier_errors"] = float(self.verifier_errors)
        if memory is not None:
            scalars["perf/max_memory_allocated_gb"] = max(each[2] for each in shared)
        self.reported = scalars
        # Not through self.log: within an epoch it goes on reporting the last value of a curve that has no value now, such as
        # the divergence of failed responses in a step without any.
        every = self.trainer.log_every_n_steps  # 0 means never
        if every and self.steps % every == 0:
            for logger in self.trainer.loggers:
                logger.log_metrics(scalars, step=self.steps)
        self.log_dict(scalars, logger=False, batch_size=len(rows))  # for callbacks that monitor a metric
        bar = {"reward": scalars["critic/score/mean"]}
        if self.has_teacher:
            bar["I"] = scalars.get("information/used", information(statistics).value)
        if "lr/multiplier" in scalars:
            bar["rho"] = scalars["lr/multiplier"]
        self.log_dict(bar, prog_bar=True, logger=False, batch_size=len(rows))
        self.last_rows = rows
