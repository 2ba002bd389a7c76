"""A teacher that harms is told before the first optimizer step; a whole one is not."""

import warnings
from pathlib import Path

import pytest
import torch
import yaml

from pgpo_lightning.commands.main import main
from pgpo_lightning.losses.step_statistics import StepStatistics
from pgpo_lightning.modules import GRPO, SDPO
from pgpo_lightning.monitoring.curves import read_scalars
from pgpo_lightning.training.preflight import less_successful, net_gap, significantly_negative
from tests.support.helpers import (
    LIMITS,
    TOKENIZER,
    build,
    config,
    half_right,
    loader,
    questions,
    tiny_model,
    trainer,
)
from tests.support.runs import final


def told(caught):
    return [str(w.message) for w in caught if "`pgpo probe`" in str(w.message)]


class Shifted(SDPO):
    """Information of a chosen value at every step, for twelve rollouts of six questions."""

    def configure_model(self):
        super().configure_model()
        self.learner.accumulate = self.shifted

    def shifted(self, *args):
        step = type(self.learner).accumulate(self.learner, *args)
        n, real = 12, step.statistics
        values = {name: torch.ones(n) for name in StepStatistics.__dataclass_fields__}
        spread = torch.linspace(-0.1, 0.1, n)
        values |= {
            "entropy_student": 1 + self.shift + spread,
            "entropy_teacher": torch.ones(n),
            "sampler_gap": torch.zeros(n),
        }
        step.statistics = StepStatistics(**values | {"question": torch.arange(n).float() // 2})
        assert len(real)
        return step


@pytest.mark.parametrize(("shift", "warned"), [(-0.3, True), (-0.05, False), (0.3, False)])
def test_information_below_zero_is_told_once_before_the_first_step(tmp_path, shift, warned):
    module = build(Shifted, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, **LIMITS)
    module.shift = shift
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t = trainer(tmp_path, max_steps=3)
        t.fit(module, loader(questions(6), 2))
        t.save_checkpoint(tmp_path / "now.ckpt")
    said = told(caught)
    assert len(said) == warned
    if warned:
        assert said[0].startswith("Step 1: the teacher is less certain than the student: I = -0.3 +- 0.0")
        assert "over 6 questions, below 0 at the one-sided level of 1%" in said[0]
    resumed = build(Shifted, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, **LIMITS)
    resumed.shift = -0.3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, max_steps=4).fit(resumed, loader(questions(6), 2), ckpt_path=tmp_path / "now.ckpt")
    assert told(caught) == []


def test_the_level_is_what_it_says():
    """Normal means of eight questions: one in a hundred is told, of a teacher that tells nothing."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(20_000, 8, generator=generator, dtype=torch.float64)
    means, errors = draws.mean(1), draws.std(1) / 8**0.5
    share = sum(significantly_negative(m, e, 8) for m, e in zip(means.tolist(), errors.tolist(), strict=True)) / len(
        draws
    )
    assert share == pytest.approx(0.01, abs=0.003)
    assert not significantly_negative(-5.0, float("nan"), 1)


def test_the_net_gap_is_a_mean_with_an_error_over_questions():
    gains, question = torch.tensor([-1.0, -1.0, 0.0, 0.0, -1.0, 0.0]), torch.tensor([0, 0, 1, 1, 2, 2])
    gap = net_gap(gains, question)
    assert gap.value == pytest.approx(-0.5)
    assert gap.standard_error == pytest.approx((1.0 + 1.0) ** 0.5 * 1.5**0.5 / 6)
    assert less_successful(gap, 3) is None
    assert "net gap -0.9 +- 0.01 over 8 questions" in less_successful(gap._replace(value=-0.9, standard_error=0.01), 8)


class Confused(SDPO):
    """What the teacher says is always wrong: judged by the prompt, which the verifier does not see."""

    def judge(self, rollouts):
        verdicts = super().judge(rollouts)
        for rollout, verdict in zip(rollouts, verdicts, strict=True):
            if rollout.prompt_ids != self.encoder.question(rollout.question):
                verdict.reward = 0.0
        return verdicts


def graded(folder, base, **settings):
    module = build(base, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, **LIMITS | settings)
    asked = questions(16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t = trainer(folder, max_steps=2)
        t.fit(module, loader(asked, 8))
    return module, [text for text in told(caught) if "answers worse" in text], t


def test_the_teachers_own_answers_are_graded_if_wanted(tmp_path):
    module, said, _ = graded(tmp_path, Confused, preflight=True)
    assert len(said) == 1
    assert said[0].startswith("Step 1: the teacher answers worse than the student: net gap -0.")
    assert "self_distillation/net_gap" not in module.reported  # the second step has none
    whole, said, _ = graded(tmp_path, SDPO, preflight=True)
    assert said == []
    plain, said, _ = graded(tmp_path, SDPO)
    assert said == []
    # The answers draw random numbers of their own: training is the same with and without them.
    for a, b in zip(whole.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_module_without_a_teacher_says_nothing(tmp_path):
    limits = {name: value for name, value in LIMITS.items() if name != "max_reprompt_len"}
    module = build(GRPO, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, **limits)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, max_steps=1).fit(module, loader(questions(4), 2))
    assert told(caught) == []


# ---------------------------------------------------------------------------------------------- the monitor of `pgpo fit`


def test_pgpo_fit_has_a_monitor_that_resumes_and_makes_way_for_a_guard(tmp_path):
    folder = tmp_path / "run"
    path = config(folder, steps=2)
    main(["fit", "--config", path])
    assert "stability/alarms" in read_scalars(folder)
    seen = final(folder, 2)["callbacks"]["StabilityMonitor"]["curves"]
    assert list(seen["critic/score/mean"]) == [1, 2]
    # A checkpoint that was written without a monitor.
    file = folder / "checkpoints" / "step=000002.ckpt"
    content = torch.load(file, weights_only=True)
    del content["callbacks"]["StabilityMonitor"]
    torch.save(content, tmp_path / "without.ckpt")
    settings = yaml.safe_load(Path(path).read_text())
    settings["trainer"] |= {"max_steps": 3, "default_root_dir": str(tmp_path / "other")}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(settings))
    main(["fit", "--config", str(tmp_path / "other.yaml"), "--ckpt_path", str(tmp_path / "without.ckpt")])
    assert list(final(tmp_path / "other", 3)["callbacks"]["StabilityMonitor"]["curves"]["critic/score/mean"]) == [3]
    settings["trainer"] |= {"fast_dev_run": True, "callbacks": [{"class_path": "CollapseGuard"}]}
    (tmp_path / "guarded.yaml").write_text(yaml.safe_dump(settings))
    main(["fit", "--config", str(tmp_path / "guarded.yaml")])  # two monitors would be refused
