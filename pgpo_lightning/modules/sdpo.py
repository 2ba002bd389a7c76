"""Self-Distilled Policy Optimisation (SDPO, arXiv 2601.20802). PGPO (arXiv 2606.03620) is this module plus a callback.

The student answers a question. The same model, shown what became of it (a correct sibling answer, an error message), is the
self-teacher; token by token the student is pulled towards it, on the very responses that it sampled.
"""

from typing import Annotated

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from transformers import PreTrainedModel

from pgpo_lightning.core.settings import Count, Range, Seed, Temperature, checked
from pgpo_lightning.losses.token_weights import TokenWeights
from pgpo_lightning.models.lora import LoRA
from pgpo_lightning.models.quantization import Quantization
from pgpo_lightning.modules.documentation import with_common_args
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.objectives.configs import DivergenceConfig
from pgpo_lightning.objectives.distillation import DistillationObjective
from pgpo_lightning.rewards.grade import Verifier
from pgpo_lightning.rollout.engine import Engine
from pgpo_lightning.teachers.configs import RepromptConfig, TeacherConfig
from pgpo_lightning.teachers.self_teaching import SelfTeaching
from pgpo_lightning.training.configs import EvaluationConfig, MismatchConfig, ModelConfig, RewardConfig, UpdateConfig
from pgpo_lightning.training.optimization import adamw


@checked
@with_common_args
class SDPO(OnPolicyModule):
    """Distils the feedback-conditioned self-teacher into the student.

    The loss of a step with B rollouts is ``1/B sum_i 1/L_i sum_t w_it D(S_it, T_it)``, over the rollouts that
    have a teacher: a successful sibling's answer, feedback of their own, or both.

    Args:
        divergence: Which divergence D between student S and teacher T.
        teacher: Whose weights the teacher has.
        reprompt: What the teacher reads.
        token_weights: Weights of tokens or responses by their information or the teacher's certainty (DW-SDPO), of mean 1; null
            for equal weights.
        question_weight_exponent: Weigh questions by their success rate p: ``(p (1 - p))^exponent``, of mean 1
            (:func:`~pgpo_lightning.losses.token_weights.question_weights`; SC-SDPO has 0.5; 0 to 10). Divisors of the loss stay
            what they are. Null for equal weights.
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
        token_weights: TokenWeights | None = None,
        question_weight_exponent: Annotated[float, Range(least=0, most=10)] | None = None,
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
        self.objective = DistillationObjective(
            teaching,
            divergence,
            num_generations=num_generations,
            token_weights=token_weights,
            question_weight_exponent=question_weight_exponent,
        )
