"""Rollouts: what an engine is, and the one that samples with transformers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from pgpo_lightning.records import Question, Rollout


@dataclass
class Sampling:
    """How responses are sampled.

    Args:
        max_tokens: Most response tokens, end-of-sequence included.
        temperature: Logits are divided by it.
        top_p: Nucleus; 1.0 samples from the whole distribution. Anything else than 1.0 makes the recorded log-probabilities
            those of another distribution than the one sampled from, so it is for evaluation only.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


class Engine(ABC):
    """Samples responses from the current student."""

    @abstractmethod
    def generate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: list[Question],
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
    ) -> list[Rollout]:
        """Sample `n` responses to every prompt.

        The student is handed in with every call, so that an engine with weights of its own cannot be left with old ones.

        Args:
            model: The student as it is now.
            tokenizer: Of the student; has end-of-sequence and padding tokens.
            questions: What is asked.
            prompts: Their token ids, in the same order.
            n: Responses per prompt.
            sampling: How.

        Returns:
            ``len(questions) * n`` rollouts, those to one question next to each other.
        """


class TransformersEngine(Engine):
    """Samples with the model's own ``generate``; the prompt is run once for all of its responses.

    Args:
        max_sequences: Most responses decoded at the same time. The whole step at once is fastest; less saves memory for
            keys and values.
    """

    def __init__(self, max_sequences: int | None = None) -> None:
        if max_sequences is not None and max_sequences < 1:
            raise ValueError(f"Expected `max_sequences` to be at least 1 or null, but got {max_sequences}.")
        self.max_sequences = max_sequences

    def generate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: list[Question],
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
    ) -> list[Rollout]:
        """See :meth:`Engine.generate`."""
        limit = self.max_sequences or max(1, len(questions)) * n
        at_once, each = max(1, limit // n), min(n, limit)
        rollouts: list[Rollout] = []
        with _generating(model, tokenizer):
            for start in range(0, len(questions), at_once):
                part = slice(start, start + at_once)
                for done in range(0, n, each):  # in several goes only if the responses to one prompt are too many
                    count = min(each, n - done)
                    rollouts += _decode(model, tokenizer, questions[part], prompts[part], count, sampling)
        return rollouts


def _decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    prompts: list[list[int]],
    n: int,
    sampling: Sampling,
) -> list[Rollout]:
    width = max(len(prompt) for prompt in prompts)
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    recorder = _LogProbRecorder(sampling.temperature)
    output = model.generate(
        input_ids=ids.repeat_interleave(n, dim=0),
        attention_mask=mask.repeat_interleave(n, dim=0),
        past_key_values=_prefill(model, ids, mask, n),
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        max_new_tokens=sampling.max_tokens,
        logits_processor=LogitsProcessorList([recorder.processor]),
        stopping_criteria=StoppingCriteriaList([recorder]),
    )
    sampled = output[:, width:].tolist()
    log_probs = torch.stack(recorder.log_probs, dim=1).cpu()
    ends = _end_tokens(model, tokenizer)
    rollouts = []
    for i, row in enumerate(sampled):
        length = next((t + 1 for t, token in enumerate(row) if token in ends), len(row))
        response = row[:length]
        rollouts.append(
            Rollout(
                question=questions[i // n],
                prompt_ids=prompts[i // n],
                response_ids=response,
                # A copy: a view would keep the whole padded matrix alive.
                log_probs=log_probs[i, :length].clone(),
                text=tokenizer.decode(response, skip_special_tokens=True),
                finished=response[-1] in ends,
            )
        )
    return rollouts


class _LogProbRecorder(StoppingCriteria):
    """Keeps the log-probability of each sampled token.

    ``generate`` can return the logits of all steps, which for a real vocabulary is hundreds of gigabytes. It does show them
    to a processor before each draw, and the drawn token to a stopping criterion right after: this is both.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.log_probs: list[Tensor] = []
        self.processor = _Processor(self)
        self.current = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        self.log_probs.append(self.current.gather(1, input_ids[:, -1:]).squeeze(1))
        return torch.zeros(input_ids.size(0), dtype=torch.bool, device=input_ids.device)


class _Processor(LogitsProcessor):
    def __init__(self, recorder: _LogProbRecorder) -> None:
        self.recorder = recorder

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.recorder.current = (scores.float() / self.recorder.temperature).log_softmax(-1)
        return scores


def _prefill(model: PreTrainedModel, ids: Tensor, mask: Tensor, n: int) -> DynamicCache:
    """Run each prompt once, all but its last token, and repeat its keys and values for `n` responses."""
    cache = DynamicCache(config=model.config)
    if ids.size(1) > 1:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            model(
                input_ids=ids[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=positions[:, :-1],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        cache.batch_repeat_interleave(n)
    return cache


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return every token that ends a response: the model's own, which may be several, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])}


@contextmanager
def _generating(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Put the model into the state in which `generate` is right, and back.

    In training mode gradient checkpointing silently drops the cache, and from the second token on the samples are wrong. And
    the model's own generation settings (a top-k of 20, say) would make the sampler another policy than the student.
    """
    was_training, settings = model.training, model.generation_config
    ends = sorted(_end_tokens(model, tokenizer))
    model.eval()
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    try:
        yield
    finally:
        model.generation_config = settings
        model.train(was_training)
