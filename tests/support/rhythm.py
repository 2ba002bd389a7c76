"""DRIFT's factors of token advantages, token by token in plain Python."""

import math


def one_response(log_ratio, h_s, h_t, strength, sensitivity, maximum, sharpness, gain, bound):
    """M of one response, token by token in plain Python."""
    n, mu = len(log_ratio), sum(log_ratio) / len(log_ratio)
    bonus = [min(math.exp(sensitivity * max(d - mu, 0)), maximum) - 1 for d in log_ratio]
    anchor = [0.0]
    for t in range(1, n):
        drop_t, drop_s = h_t[t - 1] - h_t[t], h_s[t - 1] - h_s[t]
        anchor.append(max(drop_t - drop_s, 0) * max(h_s[t] - h_t[t], 0))
    mean = sum(anchor) / n
    deviation = math.sqrt(sum((d - mean) ** 2 for d in anchor) / n) + 1e-6
    gate = [2 * max(1 / (1 + math.exp(-sharpness * (d - mean) / deviation)) - 0.5, 0) for d in anchor]
    raised = [1 + gain * g for g in gate]
    g = [min(max(m * n / sum(raised), 1 - bound), 1 + bound) for m in raised]
    return [1 + strength * a * b for a, b in zip(g, bonus, strict=True)]
