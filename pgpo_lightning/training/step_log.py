"""Scalars of a step: pure functions of its samples and statistics, under the names of verl and the SDPO reference."""

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
    """Values of rollouts, one entry per rollout, of one rank or, after :meth:`join`, of all ranks.

    Attributes:
        reward: Reward of the response.
        response_length: Response tokens.
        prompt_length: Prompt tokens.
        cut_off: Whether the response was truncated at the length limit.
        negative_log_prob: Mean of -log p over the response tokens under the sampler (nats).
        curves: What the verifier has logged of the response.
    """

    reward: list[float]
    response_length: list[int]
    prompt_length: list[int]
    cut_off: list[bool]
    negative_log_prob: list[float]
    curves: list[dict[str, float]]

    @classmethod
    def from_samples(cls, samples: list[Sample]) -> "RolloutSummary":
        """Summarise the rollouts of one rank."""
        return cls(
            reward=[sample.verdict.reward for sample in samples],
            response_length=[sample.length for sample in samples],
            prompt_length=[len(sample.rollout.prompt_ids) for sample in samples],
            cut_off=[not sample.rollout.finished for sample in samples],
            negative_log_prob=[-sample.rollout.log_probs.mean().item() for sample in samples],
            curves=[sample.verdict.curves for sample in samples],
        )

    @classmethod
    def join(cls, parts: list["RolloutSummary"]) -> "RolloutSummary":
        """Concatenate the summaries of all ranks."""
        return cls(**{f.name: list(chain.from_iterable(getattr(part, f.name) for part in parts)) for f in fields(cls)})


def rollout_scalars(samples: list[Sample], threshold: float) -> dict[str, float]:
    """Return scalars of rewards and lengths over all rollouts of a step, of all ranks, with and without a teacher.

    `rollout/neg_log_prob` is the mean of -log p over the sampled tokens of each response (nats): an unbiased estimate of the
    student's entropy. It needs no forward pass, so it exists even if no sample is in the loss.
    `rewards/<name>` are the verifier's own curves, each averaged over the rollouts that have it.

    Args:
        samples: This rank's samples of the step.
        threshold: Rewards of at least this value are successes.
    """
    summary = RolloutSummary.join(gather(RolloutSummary.from_samples(samples)))
    reward = torch.tensor(summary.reward, dtype=torch.float32)
    length = torch.tensor(summary.response_length, dtype=torch.float32)
    own: dict[str, list[float]] = {}
    for curves in summary.curves:
        for name, value in curves.items():
            own.setdefault(f"rewards/{name}", []).append(value)
    return {name: sum(values) / len(values) for name, values in own.items()} | {
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
    """Return scalars of the sequences in the loss. Scalars without any value are omitted.

    Args:
        statistics: Statistics of one optimizer step.
        threshold: Rewards of at least this value are successes.
        bound: The largest possible value of the divergence (nats), if there is one.
    """
    successful = statistics.reward >= threshold
    taught = statistics.has_teacher.bool()
    weight = statistics.weight

    def mean(values: torch.Tensor, mask: torch.Tensor | None = None) -> float:
        values = values if mask is None else values[mask]
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
