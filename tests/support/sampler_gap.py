"""Prints the train-inference mismatch of 16-bit products, with the model's own logits and with fp32 sums (docs/models.md)."""

import warnings
from contextlib import nullcontext
from unittest import mock

import torch

from pgpo_lightning.core.seeding import seeded
from pgpo_lightning.core.types import Sample, Verdict
from pgpo_lightning.models import decoding
from pgpo_lightning.modules import SDPO
from pgpo_lightning.rollout.engine import Sampling
from tests.support.helpers import LIMITS, TOKENIZER, build, half_right, questions, tiny_model


def gap(model, mixed, own):
    """Mean absolute difference between sampler and trainer, nats per token."""
    module = build(SDPO, model, half_right, tokenizer=TOKENIZER, **LIMITS | {"max_response_length": 24})
    module.configure_model()
    if not mixed:
        module.model.to(torch.bfloat16)
    rounded = mock.patch.object(decoding, "wide_logits", return_value=None) if own else nullcontext()
    with seeded("gap", 0), rounded, torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False):
        rollouts = module.actor.sample(module.model, questions(8), 8, Sampling(24))
        samples = [Sample(rollout, Verdict(1.0)) for rollout in rollouts]
        found = module.learner.log_probs(samples, samples)
    gaps = [(sample.rollout.log_probs - log_probs).abs() for sample, log_probs in found]
    return float(torch.cat(gaps).mean())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    larger = {"tie_word_embeddings": False, "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512}
    for name in ("toy", "random"):
        for mixed in (True, False):
            made = [gap("toy" if name == "toy" else tiny_model(**larger), mixed, own) for own in (True, False)]
            print(f"{name}, {'bf16-mixed' if mixed else 'bf16 weights'}: " + ", ".join(f"{each:.2g}" for each in made))
