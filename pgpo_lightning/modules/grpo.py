"""Group Relative Policy Optimisation (GRPO), the baseline: a clipped policy gradient with the group's mean as baseline."""

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from transformers import PreTrainedModel

from pgpo_lightning.core.settings import Count, Seed, Temperature, checked
from pgpo_lightning.models.lora import LoRA
from pgpo_lightning.models.quantization import Quantization
from pgpo_lightning.modules.documentation import with_common_args
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.objectives.configs import PolicyGradientConfig
from pgpo_lightning.objectives.policy_gradient import PolicyGradientObjective
from pgpo_lightning.rewards.grade import Verifier
from pgpo_lightning.rollout.engine import Engine
from pgpo_lightning.training.configs import EvaluationConfig, MismatchConfig, ModelConfig, RewardConfig, UpdateConfig
from pgpo_lightning.training.optimization import adamw


@checked
@with_common_args
class GRPO(OnPolicyModule):
    """Reinforces the better responses of each group.

    Args:
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
        policy_gradient: PolicyGradientConfig = PolicyGradientConfig(),
    ) -> None:
        super().__init__(
            model=model, verifier=verifier, engine=engine, num_generations=num_generations,
            max_prompt_length=max_prompt_length, max_response_length=max_response_length, temperature=temperature,
            optimizer=optimizer, scheduler=scheduler, lora=lora, quantization=quantization, seed=seed,
            evaluation=evaluation, update=update, model_config=model_config, mismatch=mismatch, reward=reward,
        )  # fmt: skip
        self.objective = PolicyGradientObjective(
            policy_gradient, num_generations=num_generations, updates=update.steps_per_batch
        )
