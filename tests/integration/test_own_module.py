"""A module of a user's own: an objective of two routes, on the command line and in Python."""

import pytest

from pgpo_lightning import (
    SDPO,
    DistillationObjective,
    DivergenceConfig,
    Objective,
    OnPolicyModule,
    PolicyGradientConfig,
    PolicyGradientObjective,
    RepromptConfig,
    Route,
    SelfTeaching,
    TeacherConfig,
)
from pgpo_lightning.commands.main import main
from pgpo_lightning.core.settings import Positive, checked
from tests.support.helpers import TOKENIZER, build, config, half_right, loader, questions, tiny_model, trainer

LIMITS = {"max_prompt_length": 64, "max_reprompt_len": 160, "max_response_length": 12}


class FailuresAndSuccesses(Objective):
    """Distils failures, whatever their advantage, and reinforces successes, which keep the reprompt that they were given."""

    def __init__(self, distillation, policy_gradient, weight):
        self.distillation, self.policy_gradient, self.weight = distillation, policy_gradient, weight
        self.teaching, self.divergence = distillation.teaching, distillation.divergence
        # `token_weights` stays null: equal weights. So does `loss_is_divergence`: a weighted sum of two losses is none.

    def failed(self, sample):
        return sample.verdict.reward < self.teaching.builder.success_reward_threshold

    def prepare(self, samples, given):
        scalars = self.distillation.prepare(samples, given) | self.policy_gradient.prepare(samples, given)
        for sample in filter(self.failed, samples):
            sample.old_log_probs = None  # the importance weight of distillation is that of the policy as it is now
        return scalars

    def in_loss(self, sample):
        return sample.reprompt_ids is not None if self.failed(sample) else self.policy_gradient.in_loss(sample)

    def routes(self, samples):
        samples = [sample for sample in samples if self.in_loss(sample)]
        return [
            Route(
                [sample for sample in samples if self.failed(sample)],
                lambda *given: self.weight * self.distillation.token_loss(*given),
                taught=True,
            ),
            Route([sample for sample in samples if not self.failed(sample)], self.policy_gradient.token_loss),
        ]

    def normalizer(self, samples):
        return self.policy_gradient.normalizer(samples)


@checked
class Own(OnPolicyModule):
    """Takes the common arguments as keywords."""

    def __init__(
        self,
        *args,
        distil_weight: Positive = 1.0,
        divergence: DivergenceConfig = DivergenceConfig(),  # noqa: B008
        teacher: TeacherConfig = TeacherConfig(),  # noqa: B008
        reprompt: RepromptConfig = RepromptConfig(),  # noqa: B008
        policy_gradient: PolicyGradientConfig = PolicyGradientConfig(),  # noqa: B008
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        teaching = SelfTeaching(
            teacher,
            reprompt,
            self.encoder,
            num_generations=self.num_generations,
            max_prompt_length=self.actor.max_prompt_length,
            success_threshold=self.reward.success_threshold,
            adapter=self.lora is not None,
            verifier=self.actor.verifier,
        )
        self.objective = FailuresAndSuccesses(
            DistillationObjective(teaching, divergence, num_generations=self.num_generations),
            PolicyGradientObjective(
                policy_gradient, num_generations=self.num_generations, updates=self.update.steps_per_batch
            ),
            distil_weight,
        )


def test_it_runs_on_the_command_line_with_every_common_argument(tmp_path, capsys):
    settings = {"distil_weight": 0.5, "eval_samples": 1}
    main(["fit", "--config", config(tmp_path / "run", steps=2, module=f"{__name__}.Own", model=settings)])
    assert "2 steps" in capsys.readouterr().out
    with pytest.raises(ValueError, match="`distil_weight` to be above 0"):
        main(["fit", "--config", config(tmp_path / "bad", module=f"{__name__}.Own"), "--model.distil_weight", "-1"])


def test_it_runs_in_python_and_an_old_name_is_answered(tmp_path):
    module = build(
        Own,
        tiny_model(),
        half_right,
        tokenizer=TOKENIZER,
        num_generations=4,
        distil_weight=0.5,
        updates_per_batch=2,
        **LIMITS,
    )
    trainer(tmp_path, max_steps=2).fit(module, loader(questions(8), 4))
    learnt = [sample for sample in module.last_samples if module.objective.in_loss(sample)]
    kinds = {(sample.verdict.reward, sample.reprompt_ids is not None) for sample in learnt}
    assert {(0.0, True), (1.0, True)} <= kinds, "the example needs a success with a reprompt"
    assert {(sample.verdict.reward, sample.old_log_probs is None) for sample in learnt} == {(0.0, True), (1.0, False)}
    for cls in (Own, SDPO):
        with pytest.raises(ValueError, match=r"Expected `update.max_grad_norm`, where `max_grad_norm` stands now"):
            cls(tiny_model(), half_right, max_grad_norm=1.0)
