"""Trains, saves, resumes and keeps what was reported; run by distributed/test_reports_of_ranks.py.

Usage: python -m tests.support.reporting_worker OUTPUT RANKS
"""

import itertools
import sys
from pathlib import Path

import lightning as L
import torch

from pgpo_lightning.modules import GRPO
from tests.support.helpers import (
    LIMITS,
    TOKENIZER,
    build,
    loader,
    questions,
    tiny_model,
)


def main():
    output, ranks = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    kept = {"errors": [], "advantages": [], "std": [], "seconds": []}
    limits = {name: value for name, value in LIMITS.items() if name != "max_reprompt_len"}

    class Kept(GRPO):
        def on_train_batch_end(self, *_):
            told = self.trainer.callback_metrics
            kept["errors"].append(int(told["rollout/verifier_errors"]))
            kept["std"].append(told["critic/advantages/std"].item())
            kept["advantages"].append(torch.tensor([row.advantage for row in self.last_samples]))
            kept["seconds"].append(told["timing_s/step"].item())

    def fit(steps, checkpoint=None):
        calls = itertools.count()

        def verifier(question, response):
            number = next(calls)
            if module.trainer.validating:
                if number == 1000:
                    raise ValueError("broken")
                return 0.0
            if number % 8 <= module.global_rank:
                raise ValueError("broken")
            return float(number % 8 > 5 - 2 * module.global_rank)

        class Counted(L.Callback):
            def on_validation_start(self, *_):
                nonlocal calls
                calls = itertools.count(1000)

            def on_validation_end(self, *_):
                nonlocal calls
                calls = itertools.count()

        module = build(Kept, tiny_model(), verifier, tokenizer=TOKENIZER, num_generations=4, eval_samples=2,
                      on_verifier_error="zero", **limits)  # fmt: skip
        t = L.Trainer(
            accelerator="cpu", default_root_dir=Path(output).parent,
            devices=ranks, strategy="ddp", max_steps=steps, val_check_interval=2, logger=False,
            check_val_every_n_epoch=None, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, callbacks=[Counted()],
        )  # fmt: skip
        t.fit(module, loader(questions(12), 2), loader(questions(2), 1), ckpt_path=checkpoint)
        t.save_checkpoint(f"{output}.ckpt")
        return t

    fit(2)
    t = fit(3, f"{output}.ckpt")
    torch.save(kept, f"{output}.{t.global_rank}")


if __name__ == "__main__":
    main()
