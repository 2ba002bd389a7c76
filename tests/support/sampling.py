"""Models that end their responses, and their distributions by a plain forward pass."""

import random

import torch
from torch import nn

from pgpo_lightning.core.seeding import seeded
from pgpo_lightning.core.types import Question
from pgpo_lightning.models.soundness import way_to_sample
from pgpo_lightning.rollout.engine import Sampling
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from tests.support.helpers import TOKENIZER, tiny_model

EOS = TOKENIZER.eos_token_id


def ending_model(logit=2.5, **settings):
    """Ends about one in twenty tokens; with dropout, so that training mode shows."""
    model = tiny_model(tie_word_embeddings=False, attention_dropout=0.5, **settings)
    bias = torch.zeros(len(TOKENIZER))
    bias[EOS] = logit
    model.lm_head.bias = nn.Parameter(bias)
    return model.eval()


def prompts_of(*lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(6, len(TOKENIZER)) for _ in range(length)] for length in lengths]


def generate(model, prompts, n=1, seed=0, max_sequences=None, cuda_graphs=False, **sampling):
    asked = [Question(f"question {i}", "1", index=i) for i in range(len(prompts))]
    settings = Sampling(**{"max_tokens": 12} | sampling)
    with seeded("test", seed):
        return TransformersEngine(max_sequences, cuda_graphs).generate(model, TOKENIZER, asked, prompts, n, settings)


def distribution(model, prompt, response=(), temperature=1.0):
    """Log-probabilities of every next token, from one unpadded forward pass without a cache."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, len(prompt) - 1 :]
    model.train(was_training)
    return (logits / temperature).log_softmax(-1)


def forced(model, rollout, temperature=1.0):
    log_p = distribution(model, rollout.prompt_ids, rollout.response_ids, temperature)
    return log_p[torch.arange(len(rollout.response_ids)), rollout.response_ids]


def assert_log_probs(model, rollouts, temperature=1.0):
    for rollout in rollouts:
        assert rollout.log_probs.dtype == torch.float32
        torch.testing.assert_close(rollout.log_probs, forced(model, rollout, temperature), rtol=0, atol=1e-5)


def responses(rollouts):
    return [rollout.response_ids for rollout in rollouts]


def watched(model):
    """Collect the sizes of all batches that the model sees while it samples."""
    way_to_sample(model, 64)
    sizes = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].size(0)), with_kwargs=True
    )
    return sizes
