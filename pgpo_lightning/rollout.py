"""Rollouts: what an engine is, and the one that samples with transformers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from pgpo_lightning.records import Question, Rollout
from pgpo_lightning.seeding import derive_seed, uniform
from pgpo_lightning.settings import Count, Nucleus, Range, Temperature, checked

_LOOK_EVERY = 16  # steps between two looks at which responses have ended, on a GPU
_WORTH_LEAVING = 0.75  # share of responses still going from which on copying their keys and values pays


@checked
@dataclass
class Sampling:
    """How responses are sampled.

    Args:
        max_tokens: Most response tokens, end-of-sequence included.
        temperature: Logits are divided by it.
        top_p: Nucleus; 1.0 samples from the whole distribution. Anything else than 1.0 makes the recorded log-probabilities
            those of another distribution than the one sampled from, so it is for evaluation only.
        seeds: One per question, of all of its responses: samples then depend on neither batch nor rank. Null draws from the
            global generator of torch.
    """

    max_tokens: Count
    temperature: Temperature = 1.0
    top_p: Nucleus = 1.0
    seeds: list[Annotated[int, Range(most=2**63)]] | None = None


class Engine(ABC):
    """Samples responses from the current student.

    Attributes:
        has_weights: Whether it has weights of its own, to which the student's are copied: whole ones, without adapter.
    """

    has_weights = False

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
            sampling: How. An engine that ignores its `seeds` makes evaluation depend on the batch size.

        Returns:
            ``len(questions) * n`` rollouts, those to one question next to each other.
        """


@checked
class TransformersEngine(Engine):
    """Samples with the model's own forward pass; the prompt is run once for all of its responses.

    Args:
        max_sequences: Most responses decoded at the same time. The whole step at once is fastest; less saves memory for
            keys and values.
    """

    def __init__(self, max_sequences: Count | None = None) -> None:
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
        with _evaluating(model):
            for start in range(0, len(questions), at_once):
                part = slice(start, start + at_once)
                for done in range(0, n, each):  # in several goes only if the responses to one prompt are too many
                    count = min(each, n - done)
                    seeds = None if sampling.seeds is None else sampling.seeds[part]
                    streams = seeds and [derive_seed(seed, i) for seed in seeds for i in range(done, done + count)]
                    rollouts += _decode(model, tokenizer, questions[part], prompts[part], count, sampling, streams)
        return rollouts


def _decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    prompts: list[list[int]],
    n: int,
    sampling: Sampling,
    streams: list[int] | None,
) -> list[Rollout]:
    ends = end_tokens(model, tokenizer)
    tokens, log_probs = _sample(model, prompts, n, sampling, ends, streams)
    rollouts = []
    for i, row in enumerate(tokens.tolist()):
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


@torch.no_grad()
def _sample(
    model: PreTrainedModel,
    prompts: list[list[int]],
    n: int,
    sampling: Sampling,
    ends: set[int],
    streams: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return sampled tokens and their log-probabilities, ``(prompts * n, T)`` each, on the CPU.

    A loop of its own instead of ``generate``, for three reasons: the prompt is run once for all of its responses; responses
    that have ended leave the batch, where ``generate`` decodes them on until the longest has ended; and the log-probability of a
    token is taken where it is drawn, without keeping logits of all steps. What follows the end of a response is undefined.

    `streams` holds a seed per response; without it torch's global generator is drawn from.
    """
    device = next(model.parameters()).device
    end_ids = torch.tensor(sorted(ends), device=device)
    nucleus = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None
    cache, mask, position, logits = _prefill(model, prompts, n, sampling.max_tokens, device)
    width, total = max(map(len, prompts)), len(prompts) * n
    tokens = torch.zeros(sampling.max_tokens, total, dtype=torch.int64, device=device)
    log_probs = torch.zeros(sampling.max_tokens, total, device=device)
    active = torch.arange(total, device=device)  # the responses that are still in the batch
    seeds = None if streams is None else torch.tensor(streams, device=device)
    ended = torch.zeros(total, dtype=torch.bool, device=device)
    for step in range(sampling.max_tokens):
        logits = logits.float()
        p = (logits if sampling.temperature == 1 else logits / sampling.temperature).softmax(-1)
        # Numbers for all responses, ended or not: what one response draws does not depend on when the others end.
        drawn = torch.rand(total, 1, device=device) if seeds is None else uniform(seeds, step).unsqueeze(1)
        token = _draw(p if nucleus is None else nucleus(None, p.log()).exp(), drawn[active])
        tokens[step, active] = token
        log_probs[step, active] = p.gather(1, token.unsqueeze(1)).squeeze(1).log()
        ended |= torch.isin(token, end_ids)
        position = position + 1
        if device.type == "cpu" or step % _LOOK_EVERY == _LOOK_EVERY - 1:  # looking makes the host wait for the device
            going = (~ended).nonzero().squeeze(1)
            if not len(going):
                return tokens[: step + 1].T.cpu(), log_probs[: step + 1].T.cpu()
            if len(going) <= _WORTH_LEAVING * len(active):
                cache.batch_select_indices(going)
                token, position, active, ended = token[going], position[going], active[going], ended[going]
                mask = mask if mask is None else mask[going]
        if step + 1 < sampling.max_tokens:
            logits = model(
                input_ids=token.unsqueeze(1),
                attention_mask=None if mask is None else mask[:, : width + step + 1],
                position_ids=position.unsqueeze(1),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
    return tokens.T.cpu(), log_probs.T.cpu()


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token per row by inverting the distribution function; several times as fast as ``torch.multinomial`` on a CPU.

    Args:
        weights: Probabilities up to a factor, shape ``(n, V)``.
        uniform: Random numbers in [0, 1), shape ``(n, 1)``.
    """
    cumulative = weights.cumsum(-1)
    # 1 - u lies in (0, 1]: no token of probability zero can be the first to reach it.
    return torch.searchsorted(cumulative, (1 - uniform) * cumulative[:, -1:]).squeeze(1)


def _prefill(
    model: PreTrainedModel, prompts: list[list[int]], n: int, max_tokens: int, device: torch.device
) -> tuple[DynamicCache, Tensor | None, Tensor, Tensor]:
    """Run each prompt once, and repeat what it leaves for `n` responses.

    Returns:
        The cache; a mask ``(prompts * n, longest + max_tokens)``, or ``None`` if there is no padding; the position of the last
        token of every prompt, ``(prompts * n,)``; and the logits behind it, ``(prompts * n, V)``.
    """
    width = max(len(prompt) for prompt in prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    mask = None
    if min(map(len, prompts)) < width:  # on the left, so that all responses begin at the same place
        mask = (torch.arange(width + max_tokens, device=device) >= (width - lengths).unsqueeze(1)).long()
    positions = (torch.arange(width, device=device) - (width - lengths).unsqueeze(1)).clamp(min=0)
    logits = model(
        input_ids=torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device),
        attention_mask=None if mask is None else mask[:, :width],
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    cache.batch_repeat_interleave(n)
    mask = mask if mask is None else mask.repeat_interleave(n, dim=0)
    return cache, mask, (lengths - 1).repeat_interleave(n), logits.repeat_interleave(n, dim=0)


class _RoomyLayer(DynamicLayer):
    """Keys and values with room to grow. The layer it replaces copies all of them for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.room: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of the newest tokens and return all."""
        if self.get_seq_length() == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        before, after = old.size(-2), old.size(-2) + new.size(-2)
        room = self.room.get(name)
        # Repeating or selecting responses makes tensors that are not in the room any more.
        if room is None or room.data_ptr() != old.data_ptr() or room.size(-2) < after:
            room = self.room[name] = old.new_empty(*old.shape[:-2], after + max(32, after // 4), old.size(-1))
            room[..., :before, :] = old
        room[..., before:after, :] = new
        return room[..., :after, :]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return every token that ends a response: the model's own, which may be several, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])}


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into evaluation mode, and back.

    In training mode gradient checkpointing silently drops the cache, and from the second token on the samples are wrong.
    """
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
