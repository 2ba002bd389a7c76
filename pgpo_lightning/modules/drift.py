"""DRIFT (arXiv 2606.30345): failures are distilled, successes reinforced where their question is neither easy nor hard."""

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from transformers import PreTrainedModel

from pgpo_lightning.core.settings import Count, Seed, Temperature, checked
from pgpo_lightning.models.lora import LoRA
from pgpo_lightning.models.quantization import Quantization
from pgpo_lightning.modules.documentation import with_common_args
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.objectives.configs import DifficultyConfig, DivergenceConfig, PolicyGradientConfig, RhythmConfig
from pgpo_lightning.objectives.distillation import DistillationObjective
from pgpo_lightning.objectives.drift import DifficultyRouted
from pgpo_lightning.objectives.policy_gradient import PolicyGradientObjective
from pgpo_lightning.rewards.grade import Verifier
from pgpo_lightning.rollout.engine import Engine
from pgpo_lightning.teachers.configs import RepromptConfig, TeacherConfig
from pgpo_lightning.teachers.self_teaching import SelfTeaching
from pgpo_lightning.training.configs import EvaluationConfig, MismatchConfig, ModelConfig, RewardConfig, UpdateConfig
from pgpo_lightning.training.optimization import adamw


@checked
@with_common_args
class DRIFT(OnPolicyModule):
    """SDPO for failures, GRPO with difficulty weights and rhythm factors for successes, after a stage of SDPO.

    A failure without a teacher has no loss. The loss of a success is GRPO's for the advantage ``gamma M A``: gamma depends on the
    moving average of its question's success rate, M on what student and teacher say of the token.

    Args:
        divergence: Which divergence between student and teacher, for distilled responses.
        teacher: Whose weights the teacher has.
        reprompt: What the teacher reads. Which demonstration is decided by the stage of training.
        policy_gradient: Advantages and clipping, for reinforced responses.
        difficulty: Classes of questions, stages, and the buffer of successes.
        rhythm: Factors of token advantages.
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
        divergence: DivergenceConfig = DivergenceConfig(),
        teacher: TeacherConfig = TeacherConfig(),
        reprompt: RepromptConfig = RepromptConfig(),
        policy_gradient: PolicyGradientConfig = PolicyGradientConfig(),
        difficulty: DifficultyConfig = DifficultyConfig(),
        rhythm: RhythmConfig = RhythmConfig(),
    ) -> None:
        super().__init__(
            model=model, verifier=verifier, engine=engine, num_generations=num_generations,
            max_prompt_length=max_prompt_length, max_response_length=max_response_length, temperature=temperature,
            optimizer=optimizer, scheduler=scheduler, lora=lora, quantization=quantization, seed=seed,
            evaluation=evaluation, update=update, model_config=model_config, mismatch=mismatch, reward=reward,
        )  # fmt: skip
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
        self.objective = DifficultyRouted(
            DistillationObjective(teaching, divergence, num_generations=num_generations),
            PolicyGradientObjective(policy_gradient, num_generations=num_generations, updates=update.steps_per_batch),
            difficulty,
            rhythm,
        )
