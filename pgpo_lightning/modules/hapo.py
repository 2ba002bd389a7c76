"""Hindsight-Anchored Policy Optimization (HAPO, arXiv 2603.11321): GRPO that shows the student what it hardly ever finds."""

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from transformers import PreTrainedModel

from pgpo_lightning.core.settings import Count, Seed, Temperature, checked
from pgpo_lightning.models.lora import LoRA
from pgpo_lightning.models.quantization import Quantization
from pgpo_lightning.modules.documentation import with_common_args
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.objectives.configs import InjectionConfig, PolicyGradientConfig
from pgpo_lightning.objectives.demonstrations import ColumnDemonstrations, Demonstrations
from pgpo_lightning.objectives.gates import ConfidenceGate, Gate
from pgpo_lightning.objectives.injection import DemonstrationVerifier, InjectedPolicyGradient
from pgpo_lightning.rewards.grade import Verifier
from pgpo_lightning.rollout.engine import Engine
from pgpo_lightning.training.configs import EvaluationConfig, MismatchConfig, ModelConfig, RewardConfig, UpdateConfig
from pgpo_lightning.training.optimization import adamw


@checked
@with_common_args
class HAPO(OnPolicyModule):
    """GRPO with demonstrations where the student has few successes.

    Args:
        demonstrations: Where they come from; by default the column `solution` of the data.
        gate: Which groups get one; by default those whose confidence lies below 0.8.
        injection: How demonstrations enter the loss.
        policy_gradient: Advantages and clipping. Advantages are divided by the group's standard deviation (Eq. 2) unless
            `policy_gradient.norm_adv_by_std_in_grpo` is false.
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
        demonstrations: Demonstrations | None = None,
        gate: Gate | None = None,
        injection: InjectionConfig = InjectionConfig(),
        policy_gradient: PolicyGradientConfig = PolicyGradientConfig(),
    ) -> None:
        super().__init__(
            model=model, verifier=verifier, engine=engine, num_generations=num_generations,
            max_prompt_length=max_prompt_length, max_response_length=max_response_length, temperature=temperature,
            optimizer=optimizer, scheduler=scheduler, lora=lora, quantization=quantization, seed=seed,
            evaluation=evaluation, update=update, model_config=model_config, mismatch=mismatch, reward=reward,
        )  # fmt: skip
        self.demonstrations = demonstrations or ColumnDemonstrations()
        self.gate = gate or ConfidenceGate()
        self.objective = InjectedPolicyGradient(
            self.demonstrations,
            self.gate,
            DemonstrationVerifier(self.encoder, verifier, reward, max_response_length),
            injection,
            reward.success_threshold,
            config=policy_gradient,
            num_generations=num_generations,
            updates=update.steps_per_batch,
        )
