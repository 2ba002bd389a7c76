"""A sampler that does not sample from the weights that are trained stops the run, whatever the engine."""

import copy
import math

import pytest
import torch

from pgpo_lightning.losses.step_statistics import StepStatistics
from pgpo_lightning.modules import GRPO, SDPO
from pgpo_lightning.rollout.mismatch import check_sampler
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from tests.support.helpers import (
    LIMITS,
    TOKENIZER,
    accumulate,
    build,
    half_right,
    loader,
    questions,
    random_rows,
    tiny_model,
    tiny_sdpo,
    trainer,
)


class Off(TransformersEngine):
    """Log-probabilities that are wrong by so much up and down in turn, so that their mean is nearly right."""

    def __init__(self, by):
        super().__init__()
        self.by = by

    def generate(self, *args):
        rollouts = super().generate(*args)
        for rollout in rollouts:
            rollout.log_probs += self.by * (-1.0) ** torch.arange(len(rollout.log_probs))
        return rollouts


class Stale(TransformersEngine):
    """Goes on with the weights of the first call."""

    def generate(self, model, *args):
        if not hasattr(self, "first"):
            self.first = copy.deepcopy(model)
        return super().generate(self.first, *args)


def fit(folder, engine=None, steps=3, lr=3e-3, kind=SDPO, **settings):
    limits = LIMITS if kind is SDPO else {k: v for k, v in LIMITS.items() if k != "max_reprompt_len"}
    module = build(kind,
        tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, engine=engine,
        optimizer=lambda p: torch.optim.AdamW(p, lr=lr), **(limits | settings),
    )  # fmt: skip
    runner = trainer(folder, max_steps=steps * settings.get("updates_per_batch", 1) * settings.get("num_iterations", 1))
    return module, lambda: runner.fit(module, loader(questions(8), 2))


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("kind", [SDPO, GRPO])
def test_wrong_log_probs_stop_the_run_before_anything_is_learned(tmp_path, kind):
    module, run = fit(tmp_path, Off(0.3), kind=kind)
    with pytest.raises(
        RuntimeError, match=r"at most `mismatch.max_sampler_gap`=0.1 nats per token, but got 0\.\d+ at step 0: the"
    ):
        run()
    assert all(torch.equal(a, b) for a, b in zip(weights(module.model), weights(tiny_model()), strict=True))


def test_rounding_does_not_stop_the_run_and_is_reported(tmp_path):
    module, run = fit(tmp_path, Off(0.05))
    run()
    assert module.steps == 3
    assert module.scalars["rollout_corr/gap"] == pytest.approx(0.05, abs=1e-4)


def test_the_limit_can_be_moved_or_left_out(tmp_path):
    _, run = fit(tmp_path, Off(0.05), max_sampler_gap=0.02)
    with pytest.raises(RuntimeError, match=r"`mismatch.max_sampler_gap`=0\.02 nats per token, but got 0\.05 at step 0"):
        run()
    module, run = fit(tmp_path, Off(0.3), max_sampler_gap=None)
    run()
    assert module.scalars["rollout_corr/gap"] == pytest.approx(0.3, abs=1e-4)
    with pytest.raises(ValueError, match=r"Expected `mismatch.max_sampler_gap` to be above 0, but got 0"):
        fit(tmp_path, max_sampler_gap=0)


def test_old_weights_stop_the_run_at_the_second_step(tmp_path):
    _, run = fit(tmp_path, lr=0.01)
    run()  # the rate alone is no reason
    _, run = fit(tmp_path, Stale(), lr=0.01)
    with pytest.raises(RuntimeError, match="at step 1: the rollouts are not samples of the weights that are trained"):
        run()


@pytest.mark.parametrize("several", [{"updates_per_batch": 2}, {"num_iterations": 2}])
def test_only_the_first_update_of_a_batch_is_compared(tmp_path, several):
    module, run = fit(tmp_path, lr=0.01, steps=2, **several)
    run()
    assert module.step_statistics.sampler_gap.mean() > 0.1  # the last update's: the policy has moved since
    assert module.scalars["rollout_corr/gap"] < 1e-4


def test_the_gap_is_a_mean_over_tokens_of_sizes():
    module = tiny_sdpo()
    rows = random_rows(6)
    accumulate(module, rows)
    statistics = module.step_statistics
    sizes = []
    for row in rows:
        ids = row.rollout.prompt_ids + row.rollout.response_ids
        with torch.no_grad():
            log_p = module.model(torch.tensor([ids])).logits[0, len(row.rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        own = log_p[torch.arange(row.length), row.rollout.response_ids]
        sizes += (own - row.rollout.log_probs).abs().tolist()
    assert check_sampler(statistics, None, 0)["rollout_corr/gap"] == pytest.approx(sum(sizes) / len(sizes), abs=1e-4)


def test_without_tokens_there_is_nothing_to_compare_and_nan_is_left_to_others():
    assert check_sampler(StepStatistics.empty(), 0.1, 0) == {}
    nan = StepStatistics(*(torch.full((2,), math.nan) for _ in StepStatistics.__dataclass_fields__))
    assert math.isnan(check_sampler(nan, 0.1, 0)["rollout_corr/gap"])
