"""Metrics over questions."""

import torch


def updated(metric, question, value, *answers):
    metric.update(torch.tensor(question), torch.tensor(value), *answers)
    return metric
