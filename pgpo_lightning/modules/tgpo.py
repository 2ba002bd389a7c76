"""Teacher-guided policy optimisation (TGPO, arXiv 2605.13230): GRPO, guided by a teacher's likeliest tokens at first."""

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from transformers import PreTrainedModel

from pgpo_lightning.core.settings import Count, NonNegative, Seed, Temperature, checked
from pgpo_lightning.models.lora import LoRA
from pgpo_lightning.models.quantization import Quantization
from pgpo_lightning.modules.documentation import with_common_args
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.objectives.configs import PolicyGradientConfig
from pgpo_lightning.objectives.guided import GuidedPolicyGradient
from pgpo_lightning.rewards.grade import Verifier
from pgpo_lightning.rollout.engine import Engine
from pgpo_lightning.teachers.configs import RepromptConfig, TeacherConfig, plain_prompt
from pgpo_lightning.teachers.self_teaching import SelfTeaching
from pgpo_lightning.training.configs import EvaluationConfig, MismatchConfig, ModelConfig, RewardConfig, UpdateConfig
from pgpo_lightning.training.optimization import adamw


@checked
@with_common_args
class TGPO(OnPolicyModule):
    """GRPO plus ``w_t mean_t log S(v_t)``: v_t is the teacher's likeliest token after the student's own prefix.

    The term is bounded for any teacher, unlike the reverse KL, and vanishes at ``w_t = max(w_0 (1 - t / guidance_steps), 0)``.
    From then on the teacher does not run, and the step is GRPO's.

    Args:
        guidance: Weight w_0 of the teacher's term at the first step.
        guidance_steps: Batches over which it falls to 0, linearly; null to keep it.
        teacher: Another model, as `teacher.model`, or whose weights a self-teacher has.
        reprompt: What the teacher reads. Null for the student's prompt, which needs a `teacher.model`.
        policy_gradient: Advantages and clipping.

    Raises:
        ValueError: If the teacher would be the student itself.
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
        guidance: NonNegative = 2e-3,
        guidance_steps: Count | None = 200,
        teacher: TeacherConfig = TeacherConfig(),
        reprompt: RepromptConfig | None = None,
        policy_gradient: PolicyGradientConfig = PolicyGradientConfig(),
    ) -> None:
        if teacher.model is None and reprompt is None:
            raise ValueError(
                "Expected `teacher.model` or `reprompt`, because a teacher made of the student that reads the student's prompt "
                "has nothing to teach, but got neither."
            )
        super().__init__(
            model=model, verifier=verifier, engine=engine, num_generations=num_generations,
            max_prompt_length=max_prompt_length, max_response_length=max_response_length, temperature=temperature,
            optimizer=optimizer, scheduler=scheduler, lora=lora, quantization=quantization, seed=seed,
            evaluation=evaluation, update=update, model_config=model_config, mismatch=mismatch, reward=reward,
        )  # fmt: skip
        teaching = SelfTeaching(
            teacher,
            reprompt or plain_prompt(max_prompt_length),
            self.encoder,
            num_generations=num_generations,
            max_prompt_length=max_prompt_length,
            success_threshold=reward.success_threshold,
            adapter=lora is not None,
            verifier=verifier,
        )
        self.objective = GuidedPolicyGradient(
            teaching,
            guidance,
            guidance_steps,
            config=policy_gradient,
            num_generations=num_generations,
            updates=update.steps_per_batch,
        )
