"""CEPO (arXiv 2605.19436): the verifier says in which direction a token goes, a right and a wrong answer how far."""

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from transformers import PreTrainedModel

from pgpo_lightning.core.settings import Count, Seed, Temperature, checked
from pgpo_lightning.models.lora import LoRA
from pgpo_lightning.models.quantization import Quantization
from pgpo_lightning.modules.documentation import with_common_args
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.objectives.configs import EvidenceConfig, PolicyGradientConfig
from pgpo_lightning.objectives.contrast import ContrastedPolicyGradient
from pgpo_lightning.rewards.grade import Verifier
from pgpo_lightning.rollout.engine import Engine
from pgpo_lightning.teachers.configs import RepromptConfig, TeacherConfig
from pgpo_lightning.teachers.contrast import check_reprompt
from pgpo_lightning.teachers.self_teaching import SelfTeaching
from pgpo_lightning.training.configs import EvaluationConfig, MismatchConfig, ModelConfig, RewardConfig, UpdateConfig
from pgpo_lightning.training.optimization import adamw


@checked
@with_common_args
class CEPO(OnPolicyModule):
    """GRPO whose advantages are spread over a response's tokens by a contrast of the self-teacher with right and wrong answer.

    ``A [(1 - lambda) + lambda clip(exp(sign(A) (log T+ - log T-)), 1 - e, 1 + e)]``: T+ is the self-teacher that reads the
    question's right answer, T- the same teacher that reads the answer of the rejected rollout with the lowest reward. It runs
    over every response twice.

    Args:
        evidence: What the teacher reads, and how its evidence enters the advantages.
        teacher: Whose weights the teacher has. Default ``live``, the student itself, which the paper found best.
        reprompt: Template and limit of what the teacher reads; the answer stands where SDPO has its demonstration.
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
        evidence: EvidenceConfig = EvidenceConfig(),
        teacher: TeacherConfig = TeacherConfig("live"),
        reprompt: RepromptConfig = RepromptConfig(),
        policy_gradient: PolicyGradientConfig = PolicyGradientConfig(),
    ) -> None:
        super().__init__(
            model=model, verifier=verifier, engine=engine, num_generations=num_generations,
            max_prompt_length=max_prompt_length, max_response_length=max_response_length, temperature=temperature,
            optimizer=optimizer, scheduler=scheduler, lora=lora, quantization=quantization, seed=seed,
            evaluation=evaluation, update=update, model_config=model_config, mismatch=mismatch, reward=reward,
        )  # fmt: skip
        check_reprompt(reprompt, evidence.shown)
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
        self.objective = ContrastedPolicyGradient(
            teaching,
            evidence,
            config=policy_gradient,
            num_generations=num_generations,
            updates=update.steps_per_batch,
        )
