"""Trains where one rank, then both, have no rollout in the loss; run by distributed/test_no_signal.py.

Usage: python -m tests.support.no_signal_worker OUTPUT RANKS STRATEGY
"""

import itertools
import sys

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from pgpo_lightning.callbacks import (
    RandomMultiplier,
)
from pgpo_lightning.distributed.fsdp import full_tensor
from pgpo_lightning.modules import SDPO
from tests.support.helpers import LIMITS, TOKENIZER, build, loader, questions, tiny_model


def main():
    output, ranks, strategy = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    empty = {0: {2, 3}, 1: {1, 3}}
    turn = itertools.cycle((0.0, 1.0))

    def verifier(question, response):
        value = next(turn)
        return 0.0 if module.steps in empty[module.global_rank] else value

    class Kept(SDPO):
        def on_train_batch_end(self, *_):
            weights.append(torch.cat([full_tensor(p.detach()).flatten().clone() for p in self.model.parameters()]))

    weights = []
    module = build(Kept, tiny_model(), verifier, tokenizer=TOKENIZER, num_generations=4,
                  optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), **LIMITS)  # fmt: skip
    multiplier = RandomMultiplier(0.5, 1.5)
    strategies = {"ddp": "ddp", "fsdp2": ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)}
    t = L.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategies[strategy], max_steps=5, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[multiplier],
    )  # fmt: skip
    t.fit(module, loader(questions(20), 2))
    kept = {"weights": weights, "history": multiplier.history, "left_out": module.steps_without_signal}
    torch.save(kept, f"{output}.{t.global_rank}")


if __name__ == "__main__":
    main()
