"""Trains with vLLM in every rank's process; run by tests/vllm/test_ranks.py.

Usage: python -m tests.support.vllm_ranks_worker OUTPUT STRATEGY WHAT, once per rank. WHAT is `whole`, `lora` (merged), `adapter`
(alone), `shared` (two ranks share one copy of the model), `stale` or `stale-lora` (weights are synced once), or `dies` (rank 1
disappears at the second step).
"""

import os
import sys

import lightning as L
import torch

from pgpo_lightning.core.types import Question
from pgpo_lightning.data import QuestionData
from pgpo_lightning.modules import SDPO
from tests.support.adapters import lora
from tests.support.helpers import LIMITS, TOKENIZER, build
from tests.support.ranks_worker import STRATEGIES
from tests.support.vllm_checks import Counting, student


class Recording(SDPO):
    """Keeps what every step sampled, and how far the sampler was from the trainer."""

    def on_fit_start(self):
        super().on_fit_start()
        self.recorded = []

    def on_train_batch_end(self, *_):
        responses = [sample.rollout.response_ids for sample in self.last_samples]
        self.recorded.append((self.scalars["rollout_corr/gap"], responses))


class Once(Counting):
    def sync_weights(self, model, sampler):
        if not self.weight_syncs:
            super().sync_weights(model, sampler)


class Numbers(QuestionData):
    def load(self, split):
        return [Question(f"Speed {i} m/s?", str(i), source=f"{split}:{i}") for i in range(8)]


def main():
    output, strategy, what = sys.argv[1:]
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    ranks = int(os.environ["WORLD_SIZE"])

    def verifier(question, response):
        if what == "dies" and module.steps == 1 and module.global_rank == 1:
            os._exit(3)
        return float(len(response) % 2)

    engine = (Once if what.startswith("stale") else Counting)(
        max_model_len=256,
        enforce_eager=True,
        tensor_parallel_size=2 if what == "shared" else 1,
        lora="adapter" if what == "adapter" else "merged",
    )
    given = {"lora": lora()} if what.endswith(("lora", "adapter")) else {}
    if what == "stale-lora":  # a step moves an adapter's product by less than the default limit
        given["max_sampler_gap"] = 1e-4
    module = build(Recording,
        student(), verifier, tokenizer=TOKENIZER, num_generations=4, eval_samples=2, engine=engine,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), **LIMITS | given,
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy=STRATEGIES[strategy](ranks), max_steps=3, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        check_val_every_n_epoch=None, val_check_interval=3, default_root_dir=os.path.dirname(output),
    )  # fmt: skip
    trainer.fit(module, Numbers(batch_size=2 * ranks, eval_batch_size=4))
    found = {"recorded": module.recorded, "syncs": engine.weight_syncs, "score": module.evaluator.held_out.scores}
    torch.save(found, f"{output}.{trainer.global_rank}")


if __name__ == "__main__":
    main()
