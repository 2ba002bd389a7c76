"""Trains HAPO, DRIFT or I-SDPO under DDP on rollouts that depend on question and step alone; run by test_hapo.py.

Usage: python -m tests.support.hapo_worker OUTPUT RANKS METHOD
"""

import random
import sys

import lightning as L
import torch

from pgpo_lightning.core.types import Rollout
from pgpo_lightning.losses.token_weights import TokenWeights
from pgpo_lightning.modules import DRIFT, HAPO, SRPO
from pgpo_lightning.objectives.configs import DifficultyConfig
from pgpo_lightning.objectives.demonstrations import SuccessBuffer
from pgpo_lightning.objectives.gates import ConfidenceGate, ProgressThreshold
from tests.support.helpers import TOKENIZER, build, loader, questions, tiny_model

BATCH = 4


SHOWN = ("hapo", "drift", "actor", "self_distillation/routed_fraction")


def by_reward_in_the_text(question, response):
    return float(response.endswith("1")), f"The response has {len(response)} characters."


class FixedRollouts:
    def training_step(self, batch, batch_idx):
        share = BATCH // self.trainer.world_size
        start = self.steps % 2 * BATCH + self.global_rank * share
        super().training_step(questions(2 * BATCH)[start : start + share], batch_idx)

    def sample(self, questions, n, sampling):
        rollouts = []
        for question in questions:
            rng = random.Random(f"{self.steps} {question.index}")
            for _ in range(n):
                ids = [rng.randrange(5, len(TOKENIZER)) for _ in range(rng.randint(1, 10))]
                ids += [TOKENIZER.convert_tokens_to_ids(str(int(rng.random() < 0.3))), TOKENIZER.eos_token_id]
                text = TOKENIZER.decode(ids, skip_special_tokens=True)
                log_probs = torch.full((len(ids),), -3.0)
                rollouts.append(Rollout(question, self.encoder.question(question), ids, log_probs, text, True))
        return rollouts

    def on_train_batch_end(self, *_):
        self.seen.append({name: v for name, v in self.scalars.items() if name.startswith(SHOWN)})


class FixedHAPO(FixedRollouts, HAPO):
    def state(self):
        gate, kept = self.gate.state_dict(), self.demonstrations.state_dict()["kept"]
        seen = {question: gate["seen"][question] for question in sorted(gate["seen"])}
        return {"threshold": gate["threshold"], "seen": seen, "kept": readable(kept)}


class FixedDRIFT(FixedRollouts, DRIFT):
    def state(self):
        state = self.objective.state_dict()
        return {"seen": dict(sorted(state["rates"]["seen"].items())), "kept": readable(state["buffer"]["kept"])}


class FixedISDPO(FixedRollouts, SRPO):
    def state(self):
        return {}


def readable(kept):
    return {question: [ids.tolist() for ids, _ in kept[question]] for question in sorted(kept)}


SETTINGS = {
    "hapo": {
        "gate": ConfidenceGate(ProgressThreshold(slope=1.0), memory=0.5),
        "demonstrations": SuccessBuffer(size=2),
        "gradient_parts_every_n_steps": 3,
    },
    "i-sdpo": {
        "route": "group",
        "max_reprompt_len": 160,
        "token_weights": TokenWeights("token", 1.0, None, "teacher-certainty"),
    },
    "drift": {"difficulty": DifficultyConfig(warmup_steps=1, hard=0.1, buffer_size=2), "max_reprompt_len": 160},
}


def main(output, ranks, method="hapo"):
    torch.set_num_threads(1)
    module = build({"hapo": FixedHAPO, "drift": FixedDRIFT, "i-sdpo": FixedISDPO}[method],
        tiny_model(), by_reward_in_the_text, tokenizer=TOKENIZER, num_generations=4, max_prompt_length=64,
        max_response_length=32, loss_agg_mode="token-mean", is_clip=None, max_sampler_gap=None, micro_batch_tokens=150,
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-2), **SETTINGS[method],
    )  # fmt: skip
    module.seen = []
    start = torch.cat([p.detach().flatten() for p in tiny_model().parameters()])
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_steps=4, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader(range(4 * ranks), 1))
    weights = torch.cat([p.detach().flatten() for p in module.model.parameters()])
    saved = {"start": start, "weights": weights, "state": module.state(), "scalars": module.seen}
    torch.save(saved, f"{output}.{trainer.global_rank}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
