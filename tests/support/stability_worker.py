"""Trains on two ranks with a guard that rolls back once; run by distributed/test_collapse_guard.py.

Usage: python -m tests.support.stability_worker OUTPUT RANKS
"""

import sys

import torch

from pgpo_lightning.callbacks import CollapseGuard
from tests.support.helpers import loader, questions, trainer
from tests.support.stability import REWARD_ONLY, Script, scripted


def worker():
    output, ranks = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    guard, script = CollapseGuard("roll-back", REWARD_ONLY, max_rollbacks=1), Script(scores={2: 0.8})
    module = scripted(script)
    fit = trainer(
        output, devices=ranks, strategy="ddp", max_epochs=1, val_check_interval=2, num_sanity_val_steps=-1,
        callbacks=[guard],
    )  # fmt: skip
    fit.fit(module, loader(questions(40), 2), loader(questions(4), 2))
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    best = torch.cat([guard.best["weights"][name].flatten() for name, _ in module.named_parameters()])
    state = {
        "weights": weights,
        "best": best,
        "rollbacks": guard.rollbacks,
        "steps": module.steps,
        "curves": guard.curves,
    }
    torch.save(state, f"{output}.{fit.global_rank}")


if __name__ == "__main__":
    worker()
