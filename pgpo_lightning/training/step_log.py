"""What a step is reported as: pure functions from its rows to scalars, under the names of verl and the SDPO reference."""

import math
from dataclasses import dataclass, fields
from itertools import chain

import torch

from pgpo_lightning.core.types import Sample
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.losses.information import Information, information
from pgpo_lightning.losses.step_statistics import StepStatistics


@dataclass
class RolloutSummary:
    """One number per rollout and field, of one rank or, joined, of all ranks."""

    reward: list[float]
    response_length: list[int]
    prompt_length: list[int]
    cut_off: list[bool]
    negative_log_prob: list[float]

    @classmethod
    def from_samples(cls, rows: list[Sample]) -> "RolloutSummary":
        """Summarise the rollouts of one rank."""
        return cls(
            reward=[row.verdict.reward for row in rows],
            response_length=[row.length for row in rows],
            prompt_length=[len(row.rollout.prompt_ids) for row in rows],
            cut_off=[not row.rollout.finished for row in rows],
            negative_log_prob=[-row.rollout.log_probs.mean().item() for row in rows],
        )

    @classmethod
    def join(cls, parts: list["RolloutSummary"]) -> "RolloutSummary":
        """Put the summaries of all ranks behind each other."""
        return cls(**{f.name: list(chain.from_iterable(getattr(part, f.name) for part in parts)) for f in fields(cls)})


def rollout_scalars(rows: list[Sample], threshold: float) -> dict[str, float]:
    """Return rewards and lengths of all rollouts of a step and of all ranks, with and without a teacher.

    `rollout/neg_log_prob` is the mean of -log p over the sampled tokens of each response (nats): an unbiased estimate of the
    student's entropy that needs no forward pass, so it is there even when no row is in the loss.
    """
    summary = RolloutSummary.join(gather(RolloutSummary.from_samples(rows)))
    reward = torch.tensor(summary.reward, dtype=torch.float32)
    length = torch.tensor(summary.response_length, dtype=torch.float32)
    return {
        "critic/score/mean": reward.mean().item(),
        "critic/score/success": (reward >= threshold).float().mean().item(),
        "response_length/mean": length.mean().item(),
        "response_length/max": length.max().item(),
        "response_length/min": length.min().item(),
        "response_length/total": length.sum().item(),
        "response_length/clip_ratio": sum(summary.cut_off) / len(summary.cut_off),
        "prompt_length/mean": sum(summary.prompt_length) / len(summary.prompt_length),
        "rollout/neg_log_prob": sum(summary.negative_log_prob) / len(summary.negative_log_prob),
    }


def loss_scalars(statistics: StepStatistics, threshold: float, bound: float | None = None) -> dict[str, float]:
    """Return what the rows in the loss say. Entries that no row speaks for are left out.

    Args:
        statistics: Of one optimizer step.
        threshold: Rewards from here on count as success.
        bound: The largest value that the divergence can have (nats), if there is one.
    """
    successful = statistics.reward >= threshold
    taught = statistics.has_teacher.bool()
    weight = statistics.weight

    def mean(values: torch.Tensor, rows: torch.Tensor | None = None) -> float:
        values = values if rows is None else values[rows]
        return values.mean().item() if values.numel() else math.nan

    scalars = {
        "actor/entropy": mean(statistics.entropy_student),
        "rollout_corr/log_ratio": mean(statistics.sampler_log_ratio),
        "rollout_corr/log_ratio_max": statistics.sampler_log_ratio.abs().max().item() if len(statistics) else math.nan,
        "rollout_corr/rollout_is_mean": mean(weight),
        "rollout_corr/rollout_is_max": weight.max().item() if len(statistics) else math.nan,
    }
    if taught.any():
        signal: Information = information(statistics)
        scalars |= {
            "self_distillation/teacher_entropy": mean(statistics.entropy_teacher, taught),
            "self_distillation/objective": mean(statistics.loss, taught),
            "self_distillation/divergence": mean(statistics.divergence, taught),
            "self_distillation/divergence_success": mean(statistics.divergence, taught & successful),
            "self_distillation/divergence_failure": mean(statistics.divergence, taught & ~successful),
            "self_distillation/divergence_bound": math.nan if bound is None else bound,
            "information/mean": signal.value,
            "information/standard_error": signal.standard_error,
            "information/kl": information(statistics, "kl").value,
            "information/log_ratio": information(statistics, "log-ratio").value,
        }
    return {name: value for name, value in scalars.items() if not math.isnan(value)}
