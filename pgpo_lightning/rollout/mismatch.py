"""Check that trainer and sampler log-probabilities agree, which detects stale weights in any engine."""

from pgpo_lightning.losses.step_statistics import StepStatistics


def check_sampler(statistics: StepStatistics, limit: float | None, step: int) -> dict[str, float]:
    """Measure the train-inference mismatch of the rollouts before the first update on them.

    Trainer and sampler then have the same weights, so only rounding should remain. The check finds a sampler with old weights,
    another temperature or a truncated distribution. Other metrics hardly show this, because importance weights correct a part.

    Args:
        statistics: Statistics of the first update on a batch, of all ranks, so that all ranks decide alike.
        limit: Maximum mismatch in nats per token; ``None`` for no limit.
        step: Number of batches before this one, for the message.

    Returns:
        The scalar to log: the mean of |log S(y) - log sampler(y)| over all tokens (nats). Empty without tokens.

    Raises:
        RuntimeError: If the mismatch exceeds the limit.
    """
    if not len(statistics):
        return {}
    gap = float((statistics.sampler_gap * statistics.length).sum() / statistics.length.sum())
    if limit is not None and gap > limit:  # NaN passes: losses that are not finite are handled elsewhere
        raise RuntimeError(
            f"Expected trainer and sampler to differ by at most `mismatch.max_sampler_gap`={limit:g} nats per token, but got "
            f"{gap:.3g} at step {step}: the rollouts are not samples of the weights that are trained. Either the engine kept "
            "old weights, or its log-probabilities are those of another temperature or of a truncated distribution, or the "
            "model has dropout, which is active in training only. No update was made with this batch."
        )
    return {"rollout_corr/gap": gap}
