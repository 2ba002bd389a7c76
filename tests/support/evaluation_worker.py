"""Evaluates a tiny model on its share of some questions; run by test_evaluation.py.

Usage: python -m tests.support.evaluation_worker OUTPUT RANKS QUESTIONS FOLDER
"""

import json
import sys
from pathlib import Path

import lightning as L
import torch

from pgpo_lightning.core.types import Verdict
from pgpo_lightning.distributed import collectives as ranks
from pgpo_lightning.modules import SDPO
from tests.support.helpers import LIMITS, TOKENIZER, build, loader, questions, tiny_model


def letter(question, response):
    return Verdict(float(len(response) % 2 == 0), answer=str(len(response) % 2))


def main():
    output, count, asked, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    ranks.CHUNK = 1000  # bytes: about a question and a half
    module = build(SDPO, tiny_model(), letter, tokenizer=TOKENIZER, eval_samples=4, **LIMITS)
    trainer = L.Trainer(
        accelerator="cpu", devices=count, strategy="ddp" if count > 1 else "auto", default_root_dir=folder, logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    (scores,) = trainer.validate(module, loader(questions(asked), 3), verbose=False)
    Path(f"{output}.{trainer.global_rank}").write_text(
        json.dumps({"scores": scores, "errors": module.evaluator.held_out.errors})
    )


if __name__ == "__main__":
    main()
