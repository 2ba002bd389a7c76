"""vLLM in this process: its samples are the student's, whatever happens to the student. Run by `make test-vllm`."""

import random
from collections import Counter

import bitsandbytes
import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from pgpo_lightning.core.types import Question
from pgpo_lightning.modules import SDPO
from pgpo_lightning.rollout.engine import Sampling
from tests.support.helpers import LIMITS, TOKENIZER, build, half_right, loader, questions, trainer
from tests.support.vllm_checks import (
    Counting,
    check_samples,
    check_seeds,
    check_weight_sync,
    distribution,
    generate,
    largest_gap,
    prompts_of,
    student,
)

pytestmark = pytest.mark.timeout(900)


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


@pytest.fixture(scope="module")
def engine():
    """Started as in a run: first used in a validation, perhaps with half precision as default type."""
    engine, model = Counting(max_model_len=256, enforce_eager=True), student()
    torch.manual_seed(3)
    torch.randint(2**62, (1,))  # all that the call may draw
    expected = states()
    torch.manual_seed(3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode():
            (first,) = engine.generate(model, TOKENIZER, [Question("?", "1")], prompts_of(5), 1, Sampling(12))
            assert torch.is_inference_mode_enabled()
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert states() == expected, "starting vLLM seeds everything, which must not be felt"
    assert first.log_probs.dtype == torch.float32
    assert largest_gap(model, [first]) < 1e-5
    return engine


@pytest.mark.parametrize("seed", [0, 5])
def test_samples(engine, seed):
    check_samples(engine, student(seed))


def test_seeds(engine):
    check_seeds(engine, student())


def test_weight_sync(engine):
    check_weight_sync(engine, student())


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.AdamW(
            p, lr=1e-2, fused=True
        ),  # these two leave the version counters of the weights alone
        lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-2),
    ],
    ids=["sgd", "fused", "8-bit"],
)
def test_after_an_optimizer_step_it_samples_from_the_new_weights(engine, optimizer):
    model = student()
    prompts = prompts_of(7, 12)
    old = generate(engine, model, prompts, n=4)
    steps = optimizer(model.parameters())
    model(torch.tensor(prompts_of(20, 20))).logits.square().mean().backward()
    steps.step()
    assert largest_gap(model, old) > 1e-2
    assert largest_gap(model, generate(engine, model, prompts, n=4)) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_tokens_have_the_frequencies_of_the_model(engine, temperature):
    model, n = student(), 3000
    (prompt,) = prompts_of(6)
    rollouts = generate(engine, model, [prompt], n=n, temperature=temperature, max_tokens=1)
    counts = Counter(rollout.response_ids[0] for rollout in rollouts)
    expected = n * distribution(model, prompt, temperature=temperature)[0].exp()
    observed = torch.tensor([float(counts[token]) for token in range(len(expected))])
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    degrees = len(expected) - 1
    assert degrees > 30
    assert ((observed - expected).square() / expected).sum() < degrees + 4 * (2 * degrees) ** 0.5


def test_nucleus(engine):
    model = student()
    for rollout in generate(engine, model, prompts_of(5, 9), n=8, temperature=0.7, top_p=0.3):
        p = distribution(model, rollout.prompt_ids, rollout.response_ids[:-1], 0.7).exp()
        for step, token, log_p in zip(p, rollout.response_ids, rollout.log_probs, strict=True):
            assert step[step > step[token]].sum() < 0.3 + 1e-5  # every token is of the nucleus
            assert log_p > step[token].log() - 1e-5  # and its probability is that within the nucleus


def test_more_tokens_than_there_is_room_for(engine):
    with pytest.raises(ValueError, match=r"`max_model_len` to be at least 250 \+ 12, .* but got 256"):
        generate(engine, student(), prompts_of(5, 250))


def test_a_large_step_at_once(engine):
    """More tokens than fit into one pass of the engine, so that prompts have to wait for each other."""
    model = student()
    rollouts = generate(engine, model, prompts_of(*[150] * 40), n=8, max_tokens=4)
    assert len(rollouts) == 320
    assert largest_gap(model, rollouts) < 1e-5


# ------------------------------------------------------------------------------------------------------- whole runs


class Recording(SDPO):
    """Keeps the gap of every step."""

    def on_train_batch_end(self, *_):
        self.gaps = [*getattr(self, "gaps", []), self.scalars["rollout_corr/gap"]]


def fit(folder, engine, steps=3, ckpt_path=None, callbacks=(), asked=8, **settings):
    L.seed_everything(0, verbose=False)
    module = build(Recording,
        student(), half_right, tokenizer=TOKENIZER, num_generations=4, engine=engine,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), **(LIMITS | settings),
    )  # fmt: skip
    keep = {"callbacks": [*callbacks], "enable_checkpointing": bool(callbacks)}
    trainer(folder, max_steps=steps, **keep).fit(module, loader(questions(asked), 2), ckpt_path=ckpt_path)
    return module


def test_a_run_samples_from_its_own_weights_at_every_step(engine, tmp_path):
    module = fit(tmp_path, engine)
    assert len(module.gaps) == 3
    assert max(module.gaps) < 1e-5


def test_a_run_without_weight_syncs_is_stopped_at_the_second_step(tmp_path, engine):
    class Once(Counting):
        def sync_weights(self, model, sampler):
            if sampler is not engine.sampler or not self.weight_syncs:
                super().sync_weights(model, sampler)

    once = Once(max_model_len=256, enforce_eager=True)
    once.sampler = engine.sampler  # the second engine of a process would take half a minute
    engine.sampler.holds = None  # so that the first weight sync takes place
    with pytest.raises(
        RuntimeError, match=r"`mismatch.max_sampler_gap`=0\.1 nats per token, but got .* at step 1: the rollouts"
    ):
        fit(tmp_path, once)
    assert once.weight_syncs == 1


def test_a_resumed_run_and_a_repeated_one_sample_the_same(engine, tmp_path):
    whole = fit(
        tmp_path / "whole", engine, steps=4, asked=2
    )  # the same questions at every step: this loader cannot resume
    save = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    fit(tmp_path / "first", engine, steps=2, callbacks=[save], asked=2)
    resumed = fit(tmp_path / "second", engine, steps=4, ckpt_path=tmp_path / "saved" / "step=2.ckpt", asked=2)
    assert len(resumed.gaps) == 2
    assert max(resumed.gaps) < 1e-5
    again = fit(tmp_path / "again", engine, steps=4, asked=2)
    for module in (resumed, again):
        assert [r.rollout.response_ids for r in module.last_samples] == [
            r.rollout.response_ids for r in whole.last_samples
        ]


def test_bf16_mixed_is_within_the_limit(engine, tmp_path):
    """The trainer computes in bf16 here and the sampler in fp32: about as far apart as they ever are for rounding alone."""
    L.seed_everything(0, verbose=False)
    module = build(Recording, student(), half_right, tokenizer=TOKENIZER, num_generations=4, engine=engine, **LIMITS)
    trainer(tmp_path, max_steps=2, precision="bf16-mixed").fit(module, loader(questions(8), 2))
    assert 1e-4 < max(module.gaps) < 0.1
