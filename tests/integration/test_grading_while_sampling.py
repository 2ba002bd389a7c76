"""Training and evaluation with a verifier that works beside the sampler: in less time, with the same result."""

import time

import pytest

from pgpo_lightning.core.errors import VerifierError
from pgpo_lightning.data.toy_code import ToyPrograms
from pgpo_lightning.modules import GRPO, SDPO
from pgpo_lightning.rewards import CodeExecution
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from pgpo_lightning.training.configs import RewardConfig
from tests.support.helpers import GRPO_LIMITS, TOKENIZER, build, half_right, loader, questions, tiny_model, trainer

PAUSE = 0.05


class Slow(TransformersEngine):
    """Takes a while for every response."""

    def generate(self, *args):
        receive = self.receive
        if receive is not None:
            self.receive = lambda rollout: (time.sleep(PAUSE), receive(rollout))
        rollouts = super().generate(*args)
        if receive is None:
            time.sleep(PAUSE * len(rollouts))
        return rollouts


class Judge:
    """Takes as long."""

    def __call__(self, question, response):
        raise AssertionError("never called")

    def grade_batch(self, rollouts, step):
        time.sleep(PAUSE * len(rollouts))
        return [half_right(rollout.question, rollout.text) for rollout in rollouts]


def step(folder, early):
    settings = {"tokenizer": TOKENIZER, "num_generations": 4, "engine": Slow(max_sequences=4), **GRPO_LIMITS}
    module = build(GRPO, tiny_model(), Judge(), reward=RewardConfig(while_sampling=early), **settings)
    trainer(folder, max_steps=1).fit(module, loader(questions(6), 6))
    return module.reported


def untimed(reported):
    return {name: value for name, value in reported.items() if not name.startswith(("timing_s", "perf"))}


def test_a_step_takes_less_than_the_sum(tmp_path):
    afterwards, beside = step(tmp_path / "afterwards", early=None), step(tmp_path / "beside", early=True)
    total = 24 * PAUSE
    assert afterwards["timing_s/reward"] > total
    assert afterwards["timing_s/gen"] > total
    assert "timing_s/reward_total" not in afterwards
    assert beside["timing_s/reward_total"] > total
    assert beside["timing_s/reward"] < 0.5 * total  # so the step takes less than sampling and grading together
    assert untimed(beside) == untimed(afterwards)


def programs(folder, early):
    """A step and an evaluation on the toy programs; all that is sampled, graded and learnt."""
    settings = {"max_prompt_length": 32, "max_response_length": 48, "max_reprompt_len": 160, "eval_samples": 2}
    reward = RewardConfig(while_sampling=early)
    engine = TransformersEngine(max_sequences=8)
    module = build(
        SDPO, "toy-code", CodeExecution(), engine=engine, num_generations=4, reward=reward, seed=1, **settings
    )
    data = ToyPrograms(batch_size=4, eval_batch_size=6, limit_train=8, limit_val=6)
    seen = []

    def keep(rollouts, judge=module.judge):
        verdicts = judge(rollouts)
        for rollout, verdict in zip(rollouts, verdicts, strict=True):
            seen.append((rollout.response_ids, rollout.log_probs.tolist(), verdict))
        return verdicts

    module.judge = keep
    run = trainer(folder, max_steps=1, val_check_interval=1, check_val_every_n_epoch=None)
    run.fit(module, data)
    return (
        seen,
        untimed(module.reported),
        {k: v.item() for k, v in run.callback_metrics.items() if k.startswith("val/")},
    )


def test_programs_have_the_same_verdicts_and_the_same_training(tmp_path):
    beside, afterwards = programs(tmp_path / "beside", early=None), programs(tmp_path / "afterwards", early=False)
    assert beside == afterwards
    assert len(beside[0]) == 16 + 12
    verdicts = [verdict for _, _, verdict in beside[0]]
    assert 0 < sum(verdict.reward for verdict in verdicts) < len(verdicts)
    assert any(verdict.feedback for verdict in verdicts)


def test_a_failure_of_the_verifier_is_raised_once_with_its_own_message(tmp_path):
    class Broken(Judge):
        def grade_batch(self, rollouts, step):
            return [ValueError("no server") for _ in rollouts]

    settings = {"tokenizer": TOKENIZER, "num_generations": 2, **GRPO_LIMITS}
    module = build(GRPO, tiny_model(), Broken(), reward=RewardConfig(while_sampling=True), **settings)
    with pytest.raises(VerifierError, match=r"^Verifier .*Broken raised ValueError on question 0 of .*: no server$"):
        trainer(tmp_path, max_steps=1).fit(module, loader(questions(2), 2))
    module = build(GRPO, tiny_model(), Broken(), reward=RewardConfig(while_sampling=True, on_error="zero"), **settings)
    with pytest.warns(UserWarning, match="The first time: Verifier .*no server"):
        trainer(tmp_path, max_steps=1).fit(module, loader(questions(2), 2))
    assert module.reported["rollout/verifier_errors"] == 4
