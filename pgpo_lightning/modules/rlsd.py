"""RLSD (arXiv 2604.03128): the verifier says in which direction a token goes, the self-teacher how far."""

from dataclasses import replace

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from transformers import PreTrainedModel

from pgpo_lightning.core.settings import Count, Fraction, Seed, Temperature, checked
from pgpo_lightning.models.lora import LoRA
from pgpo_lightning.models.quantization import Quantization
from pgpo_lightning.modules.documentation import with_common_args
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.objectives.configs import PolicyGradientConfig
from pgpo_lightning.objectives.policy_gradient import CreditedPolicyGradient
from pgpo_lightning.rewards.grade import Verifier
from pgpo_lightning.rollout.engine import Engine
from pgpo_lightning.teachers.configs import RepromptConfig, TeacherConfig
from pgpo_lightning.teachers.self_teaching import SelfTeaching
from pgpo_lightning.training.configs import EvaluationConfig, MismatchConfig, ModelConfig, RewardConfig, UpdateConfig
from pgpo_lightning.training.optimization import adamw


@checked
@with_common_args
class RLSD(OnPolicyModule):
    """GRPO whose advantages are spread over a response's tokens by the self-teacher's evidence.

    Responses without a teacher (no sibling has succeeded, no feedback) keep the advantage of their group.

    Args:
        mixing: Weight of the teacher's evidence at the first step, lambda, in [0, 1].
        mixing_steps: Batches over which it falls to 0, linearly; null to keep it.
        evidence_clip: How far the evidence moves a factor from 1, in [0, 1].
        teacher: Whose weights the teacher has. The paper copies the student every 10 steps: ``restart``, whose `update_rate` is 1
            here by default.
        reprompt: What the teacher reads.
        policy_gradient: Advantages and clipping.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        verifier: Verifier,
        engine: Engine | None = None,
        num_generations: Count = 8,
        max_prompt_length: Count = 2048,
        max_response_length: Count = 8192,
        temperature: Temperature = 1.0,
        optimizer: OptimizerCallable = adamw,
        scheduler: LRSchedulerCallable | None = None,
        lora: LoRA | None = None,
        quantization: Quantization | None = None,
        seed: Seed | None = None,
        evaluation: EvaluationConfig = EvaluationConfig(),
        update: UpdateConfig = UpdateConfig(),
        model_config: ModelConfig = ModelConfig(),
        mismatch: MismatchConfig = MismatchConfig(),
        reward: RewardConfig = RewardConfig(),
        mixing: Fraction = 0.5,
        mixing_steps: Count | None = 50,
        evidence_clip: Fraction = 0.2,
        teacher: TeacherConfig = TeacherConfig("restart"),
        reprompt: RepromptConfig = RepromptConfig(),
        policy_gradient: PolicyGradientConfig = PolicyGradientConfig(),
    ) -> None:
        super().__init__(
            model=model, verifier=verifier, engine=engine, num_generations=num_generations,
            max_prompt_length=max_prompt_length, max_response_length=max_response_length, temperature=temperature,
            optimizer=optimizer, scheduler=scheduler, lora=lora, quantization=quantization, seed=seed,
            evaluation=evaluation, update=update, model_config=model_config, mismatch=mismatch, reward=reward,
        )  # fmt: skip
        if teacher.regularization == "restart" and teacher.update_rate is None:
            teacher = replace(teacher, update_rate=1.0)
        teaching = SelfTeaching(
            teacher,
            reprompt,
            self.encoder,
            num_generations=num_generations,
            max_prompt_length=max_prompt_length,
            success_threshold=reward.success_threshold,
            adapter=lora is not None,
            verifier=verifier,
        )
        self.objective = CreditedPolicyGradient(
            teaching,
            mixing,
            mixing_steps,
            evidence_clip,
            config=policy_gradient,
            num_generations=num_generations,
            updates=update.steps_per_batch,
        )
