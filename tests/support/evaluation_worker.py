"""Evaluates a tiny model on its share of some questions; run by test_evaluation.py.

Usage: python -m tests.support.evaluation_worker OUTPUT RANKS QUESTIONS FOLDER [fsdp2]

With `fsdp2` two ranks shard the weights, and every number of ranks computes the probability of the worked solutions, in several
micro-batches.
"""

import json
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from pgpo_lightning.core.types import Verdict
from pgpo_lightning.distributed import collectives as ranks
from pgpo_lightning.modules import SDPO
from pgpo_lightning.training.learner import Learner
from tests.support.helpers import LIMITS, TOKENIZER, build, loader, questions, tiny_model


def letter(question, response):
    return Verdict(float(len(response) % 2 == 0), answer=str(len(response) % 2))


def main():
    output, count, asked, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    sharded = "fsdp2" in sys.argv[5:]
    torch.set_num_threads(1)
    ranks.CHUNK = 1000  # bytes: about a question and a half
    exact = (
        {"evaluation.solution_column": "solution", "micro_batch_tokens": 60, "max_response_length": 32}
        if sharded
        else {}
    )
    module = build(SDPO, tiny_model(), letter, tokenizer=TOKENIZER, **(LIMITS | {"eval_samples": 4} | exact))
    fsdp2 = ModelParallelStrategy(data_parallel_size=count, tensor_parallel_size=1) if sharded else "ddp"
    trainer = L.Trainer(
        accelerator="cpu", devices=count, strategy=fsdp2 if count > 1 else "auto", default_root_dir=folder, logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    passes, log_probs = [], Learner._log_probs
    Learner._log_probs = lambda learner, samples, *args: (
        passes.append(len(samples)) or log_probs(learner, samples, *args)
    )
    (scores,) = trainer.validate(module, loader(questions(asked), 3), verbose=False)
    Path(f"{output}.{trainer.global_rank}").write_text(
        json.dumps(
            {
                "scores": scores,
                "errors": module.evaluator.held_out.errors,
                "sharded": module.placement.sharded,
                "passes": len(passes),
            }
        )
    )


if __name__ == "__main__":
    main()
