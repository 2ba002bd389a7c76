"""What the tests with the real engine share. The engine takes minutes to start on busy cores, so one serves them all."""

import random

import torch

from pgpo_lightning.core.seeding import seeded
from pgpo_lightning.core.types import Question
from pgpo_lightning.rollout.engine import Sampling
from pgpo_lightning.rollout.vllm_engine import VLLMEngine
from tests.support.helpers import TOKENIZER, tiny_model

ENDS = [TOKENIZER.eos_token_id, *range(40, 60)]  # several, so that random weights end some responses and not others


class Counting(VLLMEngine):
    """Counts the weight syncs; can leave them out, which nothing but this test may."""

    syncing = True
    weight_syncs = 0

    def sync_weights(self, model, sampler):
        if not self.syncing:
            return
        before = sampler.holds
        super().sync_weights(model, sampler)
        self.weight_syncs += before != sampler.holds


def student(seed=0, **settings):
    """A student of the shape that the engine was started with (head size 32: vLLM has no smaller one on a CPU)."""
    model = tiny_model(seed, head_dim=32, eos_token_id=ENDS, **settings)
    model.generation_config.eos_token_id = ENDS
    return model


def prompts_of(*lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(60, len(TOKENIZER)) for _ in range(length)] for length in lengths]


def generate(engine, model, prompts, n=1, seed=0, **sampling):
    asked = [Question(f"question {i}", "1", index=i) for i in range(len(prompts))]
    with seeded("test", seed):
        return engine.generate(model, TOKENIZER, asked, prompts, n, Sampling(**{"max_tokens": 12} | sampling))


def distribution(model, prompt, response=(), temperature=1.0):
    """Log-probabilities of every next token, from one unpadded forward pass of transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, len(prompt) - 1 :]
    return (logits / temperature).log_softmax(-1)


def largest_gap(model, rollouts, temperature=1.0):
    """Largest difference of any token's log-probability from transformers'."""
    worst = 0.0
    for rollout in rollouts:
        log_p = distribution(model, rollout.prompt_ids, rollout.response_ids, temperature)
        own = log_p[torch.arange(len(rollout.response_ids)), rollout.response_ids]
        worst = max(worst, (own - rollout.log_probs).abs().max().item())
    return worst


def responses(rollouts):
    return [rollout.response_ids for rollout in rollouts]


def nudge(model, size=0.02, seed=1):
    """Move every weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def check_samples(engine, model):
    """What must hold for every way of running vLLM."""
    prompts = prompts_of(7, 1, 30, 11)
    for temperature in (1.0, 0.7):
        rollouts = generate(engine, model, prompts, n=6, temperature=temperature)
        assert largest_gap(model, rollouts, temperature) < 1e-5
        assert [r.question.index for r in rollouts] == [i for i in range(4) for _ in range(6)]
        assert [r.prompt_ids for r in rollouts] == [prompts[i] for i in range(4) for _ in range(6)]
    for rollout in rollouts:
        ids = rollout.response_ids
        assert rollout.log_probs.dtype == torch.float32
        assert rollout.log_probs.shape == (len(ids),)
        assert (rollout.log_probs < 0).all()
        assert not {*ENDS} & {*ids[:-1]}
        assert rollout.finished == (ids[-1] in ENDS)
        assert rollout.finished or len(ids) == 12
        assert rollout.text == TOKENIZER.decode(ids, skip_special_tokens=True)
    ended = {rollout.response_ids[-1] for rollout in rollouts if rollout.finished}
    assert len(ended) > 2  # by several tokens
    assert not all(rollout.finished for rollout in rollouts)


def check_seeds(engine, model):
    """A function of the random state at the call, and of nothing else."""
    prompts = prompts_of(9, 5, 5)
    first = generate(engine, model, prompts, n=3, seed=1)
    again = generate(engine, model, prompts, n=3, seed=1)
    assert responses(again) == responses(first)
    assert len({tuple(ids) for ids in responses(first)}) > 6
    other = generate(engine, model, prompts, n=3, seed=2)
    assert sum(a == b for a, b in zip(responses(other), responses(first), strict=True)) < 3


def check_weight_sync(engine, model):
    """New weights at every change, at no other time, and old ones come back too."""
    prompts = prompts_of(7, 12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generate(engine, model, prompts, n=2)
    start = engine.weight_syncs
    generate(engine, model, prompts, n=2)
    assert engine.weight_syncs == start
    for seed in (1, 2):
        nudge(model, seed=seed)
        assert largest_gap(model, generate(engine, model, prompts, n=4)) < 1e-5
    model.load_state_dict(before)  # what a roll-back does
    assert largest_gap(model, generate(engine, model, prompts, n=4)) < 1e-5
    assert engine.weight_syncs == start + 3
    engine.syncing = False
    nudge(model)
    stale = generate(engine, model, prompts, n=4)
    engine.syncing = True
    assert largest_gap(model, stale) > 0.5
    assert largest_gap(model, generate(engine, model, prompts, n=4)) < 1e-5
