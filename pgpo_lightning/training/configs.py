"""Groups of settings that every module has, beside what everybody sets."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from transformers import PreTrainedTokenizerBase

from pgpo_lightning.core.run_settings import ConfigGroup
from pgpo_lightning.core.settings import Count, Natural, Nucleus, Positive, Range, Temperature, Text, checked
from pgpo_lightning.models.loading import Dtype
from pgpo_lightning.models.recomputation import Selective

_OF_THE_ENCODER = {
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages", "padding",
    "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs", "tools", "truncation",
}  # fmt: skip

ScheduleName = Literal["constant", "constant_with_warmup", "linear", "cosine"]
LossAggregation = Literal["seq-mean-token-mean", "token-mean"]


@partial(checked, prefix="evaluation.")
@dataclass(frozen=True)
class EvaluationConfig(ConfigGroup):
    """How held-out questions are answered.

    Args:
        samples: k of avg@k, pass@k and majority@k.
        temperature: Sampling temperature, 0.0001 to 100.
        top_p: Nucleus, 0.001 to 1.
        solution_column: Column of the data with a worked solution of each held-out question, as the student would write it,
            thinking included. Evaluations then also give the exact probability of this text and its end token, at temperature 1
            and without top-p: a score without sampling noise. Null for none.
        max_sequences: Maximum responses decoded at the same time in an evaluation, for an engine with `max_sequences`. Null for
            the engine's. Evaluations run no gradients, and their answers may be shorter, so more may fit.
        base_answers: Folder in which runs share the answers of the model before its first step. A run reads them where weights,
            prompts, batches, sampling, seeds, precision, versions and machine are the same, else it samples and writes them. No
            score changes. Ignored with several devices, and with engines other than TransformersEngine. Null for sampling in
            every run.

    Raises:
        ValueError: If a setting is out of range; names the field.
    """

    samples: Count = 16
    temperature: Temperature = 0.6
    top_p: Nucleus = 0.95
    solution_column: Text | None = None
    max_sequences: Count | None = None
    base_answers: Text | None = None


@partial(checked, prefix="update.")
@dataclass(frozen=True)
class UpdateConfig(ConfigGroup):
    """How a batch becomes optimizer steps.

    Args:
        max_grad_norm: Gradients are clipped to this norm; null for no clipping.
        updates_per_batch: Optimizer steps per batch, each on its share of the questions. Lightning's `max_steps` counts
            optimizer steps, including those that are left out because no rollout of any rank is in the loss. Curves,
            checkpoints and schedules count batches.
        num_iterations: Passes over each batch, each with `updates_per_batch` optimizer steps. A teacher that does not change
            within a batch is run in the first pass only.
        micro_batch_tokens: Maximum padded tokens per forward pass; shared prompts are counted and computed once. Passes are
            smaller where lengths differ and that saves padding.
        padding_free: Concatenate sequences in one row in place of padding them, where prompts are not shared. Null: if
            `model_config.attn_implementation` is flash attention, which computes each by itself, and the model allows it. Other
            attention then masks all pairs of tokens of a pass, which is slower than padding. With sharded weights prompts are
            shared wherever that is possible. A teacher of other weights follows its own attention.
        reduce_every_pass: With sharded weights, exchange gradients between ranks after every micro-batch, so that each holds only
            its part of them. False exchanges them once, after the last: until then a rank holds all of its own in fp32, 4 bytes
            per parameter. Null: true where weights are fp32, false in 16 bits, where sums of parts would be rounded.
        loss_agg_mode: ``seq-mean-token-mean``: mean over each response's tokens, then over *all* rollouts of the optimizer step;
            rollouts without a loss count as zero, as in SDPO's code. ``token-mean``: mean over all tokens in the loss of the
            optimizer step. Both are over all ranks and micro-batches.
        max_skipped_steps: Optimizer steps in a row that may be skipped because the loss or the gradient is not finite.
        lr_scheduler_type: Schedule of the learning rate, by its name in transformers: ``constant``, ``constant_with_warmup``,
            ``linear`` or ``cosine`` (both fall to 0 at the end of the run). Null for that of `scheduler`, if any.
        warmup_steps: Batches over which the rate rises linearly from 0. As in transformers, the first has the rate 0.

    Raises:
        ValueError: If a setting is out of range or contradicts another; names the field.
    """

    max_grad_norm: Annotated[float, Range(least=1e-6, most=1e6)] | None = 1.0
    updates_per_batch: Count = 1
    num_iterations: Count = 1
    micro_batch_tokens: Count = 16384
    padding_free: bool | None = None
    reduce_every_pass: bool | None = None
    loss_agg_mode: LossAggregation = "seq-mean-token-mean"
    max_skipped_steps: Natural = 5
    lr_scheduler_type: ScheduleName | None = None
    warmup_steps: Natural = 0

    def __post_init__(self) -> None:
        """Check the settings of the schedule against each other."""
        kind = self.lr_scheduler_type
        if self.warmup_steps and kind in (None, "constant"):
            raise ValueError(
                "Expected `update.lr_scheduler_type` constant_with_warmup, linear or cosine with `update.warmup_steps` "
                f"{self.warmup_steps}, but got {kind or 'null'}, which has no warm-up."
            )
        if kind == "constant_with_warmup" and not self.warmup_steps:
            raise ValueError(
                "Expected `update.warmup_steps` of at least 1 with `update.lr_scheduler_type` constant_with_warmup, but got 0."
            )

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps per batch."""
        return self.updates_per_batch * self.num_iterations


@partial(checked, prefix="model_config.")
@dataclass(frozen=True)
class ModelConfig(ConfigGroup):
    """How the model and its tokenizer are loaded.

    Args:
        tokenizer: Folder, Hub id or object; by default the model's.
        enable_thinking: Thinking mode of the chat template.
        chat_template_kwargs: Other arguments of the chat template, for student and teacher.
        dtype: Type of the weights; keep float32 for mixed precision.
        attn_implementation: As in transformers.
        gradient_checkpointing: Recompute activations in the backward pass.
        selective_ac_option: Which of them, by torchtitan's name. A whole number n recomputes every n-th layer, from the first.
            ``op`` recomputes every layer but its matrix products and its attention, whose outputs are kept. Null recomputes
            every layer completely.
        revision: Branch, tag or commit of model and tokenizer on the Hub.
        trust_remote_code: Run Python code that comes with model or tokenizer.

    Raises:
        ValueError: If a setting is out of range or contradicts another; names the field.
    """

    tokenizer: str | PreTrainedTokenizerBase | None = None
    enable_thinking: bool = False
    dtype: Dtype = "float32"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    selective_ac_option: Selective | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check that recomputation is on if it is selective, and that no argument of the chat template is set elsewhere."""
        if self.selective_ac_option is not None and not self.gradient_checkpointing:
            raise ValueError(
                "Expected `model_config.gradient_checkpointing` true with `model_config.selective_ac_option` "
                f"{self.selective_ac_option}, which says what is recomputed, but got false. Set it, or the option to null."
            )
        for name in self.chat_template_kwargs or {}:
            if name == "enable_thinking":
                raise ValueError(
                    "Expected no enable_thinking in `model_config.chat_template_kwargs`. Set `model_config.enable_thinking`."
                )
            if name in _OF_THE_ENCODER:
                raise ValueError(
                    f"Expected arguments of the chat template in `model_config.chat_template_kwargs`, but got {name}, which "
                    "is set for every prompt. Remove it."
                )


@partial(checked, prefix="mismatch.")
@dataclass(frozen=True)
class MismatchConfig(ConfigGroup):
    """How differences between the trainer's and the sampler's log-probabilities are treated (train-inference mismatch).

    Args:
        importance_weight_cap: Upper bound of the importance weight of a token, trainer over sampler; null for no weight.
        is_clip: SDPO's name of `importance_weight_cap`; null if it is not used.
        max_sampler_gap: Stop the run when trainer and sampler differ by more than this in the log-probability of a sampled token
            (mean absolute difference, nats per token, first update of a batch); null never stops.

    Raises:
        ValueError: If a setting is out of range, or both names are used; names the field.
    """

    importance_weight_cap: Positive | None = 2.0
    is_clip: Positive | None = None
    max_sampler_gap: Positive | None = 0.1

    def __post_init__(self) -> None:
        """Let the alias stand for the field."""
        if self.is_clip is None:
            return
        if self.importance_weight_cap not in (2.0, self.is_clip):
            raise ValueError(
                "Expected only one of `mismatch.importance_weight_cap` and `mismatch.is_clip`, which mean the same, but got "
                f"{self.importance_weight_cap} and {self.is_clip}."
            )
        object.__setattr__(self, "importance_weight_cap", self.is_clip)
        object.__setattr__(self, "is_clip", None)


@partial(checked, prefix="reward.")
@dataclass(frozen=True)
class RewardConfig(ConfigGroup):
    """How rewards are read.

    Args:
        success_threshold: Rewards of at least this count as success.
        on_error: What happens when the verifier raises or returns no finite number: ``raise`` stops the run, ``zero`` gives that
            response a reward of 0 and counts it.
        workers: Threads that call the verifier at the same time, which then has to be thread-safe and must not draw from the
            global random generators; or responses that an ``async def`` judges at the same time. Null for one call after
            another, or for all responses at once if it is an ``async def``.
        while_sampling: Judge finished responses while others are still being sampled. Needs an engine that hands them over
            (TransformersEngine, or VLLMEngine with a server), and a verifier that is called for several at the same time: with
            `reward.workers`, as an ``async def`` or with a ``grade_batch``, which is then called several times in a step. It must
            not draw from the global random generators. Null: if the verifier's class says so, as CodeExecution does.

    Raises:
        ValueError: If a setting is out of range; names the field.
    """

    success_threshold: float = 0.5
    on_error: Literal["raise", "zero"] = "raise"
    workers: Count | None = None
    while_sampling: bool | None = None
