"""What a step logs, and when."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pgpo_lightning.modules.updating import Updating
from pgpo_lightning.ranks import gather
from pgpo_lightning.records import Row
from pgpo_lightning.reporting import loss_scalars, rollout_scalars
from pgpo_lightning.statistics import StepStatistics, information


class Reporting(Updating):
    """Times the phases of a step and logs it."""

    has_teacher = False
    """Whether the objective compares the student with a teacher, so that there is information to measure."""

    last_rows: list[Row]
    """This rank's rows of the last step, for callbacks that show texts."""

    _timing: dict[str, float]

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._timing[f"timing_s/{phase}"] = time.perf_counter() - start

    def report(self, rows: list[Row], statistics: StepStatistics) -> None:
        """Log the step; every value is that of all ranks together.

        With several updates per batch the statistics are those of all of them, loss, gradient norm and rates of the last.

        Args:
            rows: This rank's rollouts.
            statistics: Of the sequences in the loss, of all updates and ranks.
        """
        shared = gather(self.scalars)
        scalars = {name: sum(each[name] for each in shared) / len(shared) for name in self.scalars}
        scalars |= rollout_scalars(rows, self.success_reward_threshold)
        scalars |= loss_scalars(statistics, self.success_reward_threshold)
        scalars |= self._timing
        scalars["perf/tokens_per_s"] = scalars["response_length/total"] / self._timing["timing_s/step"]
        scalars["actor/skipped_steps"] = float(self.skipped)
        scalars["rollout/verifier_errors"] = float(sum(gather(self.verifier_errors)))
        if self.device.type == "cuda":
            scalars["perf/max_memory_allocated_gb"] = torch.cuda.max_memory_allocated() / 2**30
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
