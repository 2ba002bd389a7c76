"""Do the sampler and the trainer mean the same policy? The one check that finds stale weights, whatever the engine."""

from pgpo_lightning.losses.step_statistics import StepStatistics


def check_sampler(statistics: StepStatistics, limit: float | None, step: int) -> dict[str, float]:
    """Compare the rollouts' log-probabilities under trainer and sampler, before the first update on them.

    Both are the policy itself then, so that what is left is rounding. A sampler with old weights, another temperature or a
    truncated distribution shows here and hardly anywhere else: the importance weights quietly correct a part of it.

    Args:
        statistics: Of the first update on a batch, of all ranks, so that they all decide alike.
        limit: Most nats per token that they may differ by; null for no limit.
        step: How many batches came before, for the message.

    Returns:
        What to report: the mean of |log S(y) - log sampler(y)| over all tokens (nats), if there were any.

    Raises:
        RuntimeError: If it is above the limit.
    """
    if not len(statistics):
        return {}
    gap = float((statistics.sampler_gap * statistics.length).sum() / statistics.length.sum())
    if limit is not None and gap > limit:  # not for NaN, which is for the handling of losses that are not finite
        raise RuntimeError(
            f"Expected trainer and sampler to differ by at most `mismatch.max_sampler_gap`={limit:g} nats per token, but got "
            f"{gap:.3g} at step {step}: the rollouts are not samples of the weights that are trained. Either the engine kept "
            "old weights, or its log-probabilities are those of another temperature or of a truncated distribution, or the "
            "model has dropout, which acts in training alone. No update was made with this batch."
        )
    return {"rollout_corr/gap": gap}
