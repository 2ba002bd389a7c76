"""On-policy distillation (OPD): another model corrects the student, token by token, on the student's own responses."""

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from transformers import PreTrainedModel

from pgpo_lightning.core.settings import Count, Seed, Temperature, checked
from pgpo_lightning.losses.token_weights import TokenWeights
from pgpo_lightning.models.lora import LoRA
from pgpo_lightning.models.quantization import Quantization
from pgpo_lightning.modules.documentation import with_common_args
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.objectives.configs import DivergenceConfig
from pgpo_lightning.objectives.distillation import DistillationObjective
from pgpo_lightning.rewards.grade import Verifier
from pgpo_lightning.rollout.engine import Engine
from pgpo_lightning.teachers.configs import TeacherConfig, plain_prompt
from pgpo_lightning.teachers.self_teaching import SelfTeaching
from pgpo_lightning.training.configs import EvaluationConfig, MismatchConfig, ModelConfig, RewardConfig, UpdateConfig
from pgpo_lightning.training.optimization import adamw


@checked
@with_common_args
class OPD(OnPolicyModule):
    """Distils another model into the student, on responses that the student sampled.

    The teacher reads the student's prompt and nothing else. Every response is in the loss, whatever its reward, which is only
    reported: ``1/B sum_i 1/L_i sum_t w_it D(S_it, T_it)``. A teacher that reads a context too is :class:`SDPO` with
    `teacher.model`.

    Args:
        divergence: Which divergence D between student S and teacher T; by default the reverse KL(S||T).
        teacher: The other model, as `teacher.model`, and where it is kept.
        token_weights: See :class:`SDPO`.

    Raises:
        ValueError: Without a `teacher.model`.
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
        divergence: DivergenceConfig = DivergenceConfig(alpha=1.0),
        teacher: TeacherConfig = TeacherConfig(),
        token_weights: TokenWeights | None = None,
    ) -> None:
        if teacher.model is None:
            raise ValueError(
                "Expected `teacher.model` to be the folder or Hub id of the teacher, but got none. To learn from the student's "
                "own weights, which read a context, take SDPO."
            )
        super().__init__(
            model=model, verifier=verifier, engine=engine, num_generations=num_generations,
            max_prompt_length=max_prompt_length, max_response_length=max_response_length, temperature=temperature,
            optimizer=optimizer, scheduler=scheduler, lora=lora, quantization=quantization, seed=seed,
            evaluation=evaluation, update=update, model_config=model_config, mismatch=mismatch, reward=reward,
        )  # fmt: skip
        teaching = SelfTeaching(
            teacher,
            plain_prompt(max_prompt_length),
            self.encoder,
            num_generations=num_generations,
            max_prompt_length=max_prompt_length,
            success_threshold=reward.success_threshold,
            adapter=lora is not None,
            verifier=verifier,
        )
        self.objective = DistillationObjective(
            teaching, divergence, num_generations=num_generations, token_weights=token_weights
        )
