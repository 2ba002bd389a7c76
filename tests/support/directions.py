"""Optimizers whose direction is known."""

import torch

DIRECTIONS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.03),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.03, betas=(0.0, 0.9)),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.03, betas=(0.0, 0.9), weight_decay=0.0),
}
