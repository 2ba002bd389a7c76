"""A judge that takes a second costs a step about a second, in threads and as a coroutine, and changes nothing else."""

import asyncio
import time

import pytest

from pgpo_lightning.modules import GRPO
from pgpo_lightning.training.configs import RewardConfig
from tests.support.helpers import GRPO_LIMITS, TOKENIZER, build, half_right, loader, questions, tiny_model, trainer


def slow(question, response):
    time.sleep(1)
    return half_right(question, response)


async def slow_coroutine(question, response):
    await asyncio.sleep(1)
    return half_right(question, response)


def step(folder, verifier, **reward):
    settings = {"tokenizer": TOKENIZER, "num_generations": 8, "reward": RewardConfig(**reward), **GRPO_LIMITS}
    module = build(GRPO, tiny_model(), verifier, **settings)
    trainer(folder, max_steps=1).fit(module, loader(questions(8), 8))
    return module.reported


@pytest.mark.parametrize(("verifier", "reward"), [(slow, {"workers": 64}), (slow_coroutine, {})])
def test_a_second_for_each_of_64_rollouts_is_under_five_seconds_of_a_step(tmp_path, verifier, reward):
    found, usual = step(tmp_path / "slow", verifier, **reward), step(tmp_path / "usual", half_right)
    assert 1 <= found["timing_s/reward"] < 5
    assert found["timing_s/step"] < 10
    for name in ("critic/score/mean", "actor/pg_loss", "actor/grad_norm"):
        assert found[name] == usual[name]
