"""A verifier that fails on one of two ranks; run by test_failing_ranks.py.

Usage: python -m tests.support.failing_worker STRATEGY WHAT FOLDER, where WHAT is `train`, `validate` or `elsewhere`. The second
rank fails, the first would go on for an hour; or the first alone is to go on from a checkpoint.
"""

import sys

import lightning as L
import torch

from pgpo_lightning.core.types import Question
from pgpo_lightning.data import QuestionData
from pgpo_lightning.modules import SDPO
from tests.support.helpers import LIMITS, TOKENIZER, build, tiny_model
from tests.support.ranks_worker import STRATEGIES


class Numbers(QuestionData):
    def load(self, split):
        return [Question(f"Speed {i} m/s?", str(i), source=f"{split}:{i}") for i in range(40)]


def main():
    strategy, what, folder = sys.argv[1:]
    torch.set_num_threads(1)

    def verifier(question, response):
        if module.global_rank == 1 and len(seen) == 7:
            raise ValueError("no such test")
        seen.append(question)
        return float(len(seen) % 2)

    seen = []
    module = build(SDPO,
        tiny_model(), verifier, tokenizer=TOKENIZER, num_generations=2, eval_samples=2, **LIMITS,
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=STRATEGIES[strategy](2), max_steps=100_000, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=1.0 if what == "validate" else 0, default_root_dir=folder,
    )  # fmt: skip
    data = Numbers(batch_size=2, eval_batch_size=1)
    if what == "validate":
        trainer.validate(module, data)
    else:
        if what == "elsewhere" and trainer.global_rank == 0:
            trainer.ckpt_path = "step=000007.ckpt"
        trainer.fit(module, data)


if __name__ == "__main__":
    main()
