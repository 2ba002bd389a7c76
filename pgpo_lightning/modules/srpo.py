"""Sample-Routed Policy Optimisation (SRPO, arXiv 2604.02288): failures are distilled, everything else is reinforced.

With `route` ``group`` it is I-SDPO (arXiv 2608.12957), which distils the questions that have no success.
"""

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from transformers import PreTrainedModel

from pgpo_lightning.core.settings import Count, Seed, Temperature, checked
from pgpo_lightning.losses.token_weights import TokenWeights
from pgpo_lightning.models.lora import LoRA
from pgpo_lightning.models.quantization import Quantization
from pgpo_lightning.modules.documentation import with_common_args
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.objectives.configs import DivergenceConfig, PolicyGradientConfig
from pgpo_lightning.objectives.distillation import DistillationObjective
from pgpo_lightning.objectives.policy_gradient import PolicyGradientObjective
from pgpo_lightning.objectives.routed import RoutedObjective, RoutingUnit
from pgpo_lightning.rewards.grade import Verifier
from pgpo_lightning.rollout.engine import Engine
from pgpo_lightning.teachers.configs import RepromptConfig, TeacherConfig
from pgpo_lightning.teachers.self_teaching import SelfTeaching
from pgpo_lightning.training.configs import EvaluationConfig, MismatchConfig, ModelConfig, RewardConfig, UpdateConfig
from pgpo_lightning.training.optimization import adamw


@checked
@with_common_args
class SRPO(OnPolicyModule):
    """SDPO's loss for failed responses that have a teacher, GRPO's for all others.

    With c = 1 for a success and m = 1 for a response that has a teacher, ``z = (1 - c) m`` and the loss of a token is
    ``z w SDPO + (1 - z) GRPO``. Advantages are over the whole group, distilled responses included. The paper divides by the
    tokens of all responses, which is ``update.loss_agg_mode: token-mean``; with the default of this collection every response
    counts the same instead. The weights w are those of `token_weights` with the signal ``teacher-certainty``; their mean is over
    the distilled tokens.

    Args:
        divergence: Which divergence between student and teacher, for distilled responses.
        teacher: Whose weights the teacher has.
        reprompt: What the teacher reads.
        token_weights: Weights of the distilled tokens or responses, of mean 1; null for equal weights.
        policy_gradient: Advantages and clipping, for reinforced responses.
        route: ``sample``: each failed response is distilled (SRPO). ``group``: the responses to a question are distilled if all
            of them failed, otherwise all of them are reinforced (I-SDPO). The teacher then needs a context that does not depend
            on a success: the question's `privileged_context`, or feedback.
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
        policy_gradient: PolicyGradientConfig = PolicyGradientConfig(),
        route: RoutingUnit = "sample",
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
        self.objective = RoutedObjective(
            DistillationObjective(teaching, divergence, num_generations=num_generations, token_weights=token_weights),
            PolicyGradientObjective(policy_gradient, num_generations=num_generations, updates=update.steps_per_batch),
            route,
        )
