"""Seconds of sampling: the engine's batches replayed with counts in place of tensors."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from transformers import PretrainedConfig

from pgpo_lightning.memory_planner import flops
from pgpo_lightning.memory_planner.cards import Rates
from pgpo_lightning.memory_planner.dry_run import Compute
from pgpo_lightning.memory_planner.flops import Width
from pgpo_lightning.memory_planner.passes import decode_work, prefill_work
from pgpo_lightning.memory_planner.work import TokenWork, Work
from pgpo_lightning.memory_planner.workload import EngineKind
from pgpo_lightning.rollout.transformers_engine import look_every

DRAW_LAUNCHES = 26
"""Operations of drawing a token for all responses and recording it; counted on a CPU."""

STORE_LAUNCHES = 2
"""Operations per layer that put keys and values of a token into the cache."""

DRAW_BYTES = {False: 28, True: 92}
"""Bytes per logit that drawing reads and writes, by whether `top_p` is below 1: the fp32 copy, probabilities and their sums, and
for a nucleus the sorted values with int64 indices, their sums and the result."""

VLLM_AT_ONCE = 256
"""Responses that vLLM decodes at the same time, its default `max_num_seqs`."""


@dataclass(frozen=True)
class Group:
    """A question of one call of the engine.

    Attributes:
        prompt: Tokens of its prompt.
        lengths: Tokens of its responses.
    """

    prompt: int
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """Some steps of decoding with the same responses.

    Attributes:
        steps: Number of tokens of each response.
        rows: Number of responses.
        context: Tokens of all their contexts together in the first step.
    """

    steps: int
    rows: int
    context: int


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Args:
        limit: Maximum tokens of a response.
        kind: The engine.
        at_once: Maximum responses decoded at the same time; None for all of a call.
        nucleus: Whether `top_p` is below 1.
    """

    limit: int
    kind: EngineKind = "transformers"
    at_once: int | None = None
    nucleus: bool = False


def batches(groups: list[Group], at_once: int | None) -> list[list[Group]]:
    """Return the questions that the package's sampler decodes together: whole ones, as many as fit; or parts of one.

    Args:
        groups: Questions of a call.
        at_once: Maximum responses decoded at the same time; None for all.
    """
    if at_once is None:
        return [groups]
    samples = len(groups[0].lengths)
    if at_once < samples:
        parts = [group.lengths[i : i + at_once] for group in groups for i in range(0, samples, at_once)]
        prompts = [group.prompt for group in groups for _ in range(0, samples, at_once)]
        return [[Group(prompt, part)] for prompt, part in zip(prompts, parts, strict=True)]
    each = at_once // samples
    return [groups[i : i + each] for i in range(0, len(groups), each)]


def padded_segments(batch: list[Group], device: str, limit: int) -> Iterator[Segment]:
    """Follow one batch of the package's sampler, which pads prompts and drops ended responses when a quarter has ended.

    The first token of a response needs no step of its own: its logits are those of the prompt.

    Args:
        batch: Questions that are decoded together.
        device: On cuda, ended responses are only looked for at every 16th token.
        limit: Maximum tokens of a response.
    """
    prompt = max(group.prompt for group in batch)
    lengths = sorted(length for group in batch for length in group.lengths)
    active, done, every = len(lengths), 0, look_every(device)
    for tokens in (*range(every, limit, every), limit):
        going = len(lengths) - bisect_right(lengths, tokens)
        if going > 0 and going > 0.75 * active:
            continue
        if tokens - 1 > done:
            yield Segment(tokens - 1 - done, active, active * (prompt + done + 1))
        active, done = going, tokens - 1
        if not going:
            return


def refilled_segments(groups: list[Group], at_once: int) -> Iterator[Segment]:
    """Follow an engine that replaces each response that ends by the next one of the queue, and pads nothing.

    Args:
        groups: All questions of a call.
        at_once: Maximum responses decoded at the same time.
    """
    queue = [(group.prompt, length - 1) for group in groups for length in group.lengths if length > 1][::-1]
    active: list[tuple[int, int]] = []  # tokens so far and tokens to come
    while queue or active:
        while queue and len(active) < at_once:
            active.append(queue.pop())
        steps = min(left for _, left in active)
        yield Segment(steps, len(active), sum(context + 1 for context, _ in active))
        active = [(context + steps, left - steps) for context, left in active if left > steps]


def decode_seconds(segments: Iterator[Segment], token: TokenWork, rates: Rates) -> float:
    """Return the seconds of decoding: in each step those of the host or of the device, whichever are more.

    Args:
        segments: What is decoded.
        token: Work of one step as a function of its size.
        rates: Of the device.
    """
    total = 0.0
    for segment in segments:
        contexts = segment.context + segment.rows * torch.arange(segment.steps, dtype=torch.float64)
        seconds = torch.as_tensor(token.of(segment.rows, contexts).seconds(rates))
        total += float(seconds.expand(segment.steps).sum())
    return total


class Generation:
    """Seconds of sampling with a model on a card.

    Args:
        config: Configuration of the model.
        compute: Types that sampling computes with.
        width: Sizes that determine FLOPs.
        rates: Of the device.
        device: cuda or cpu.
    """

    def __init__(self, config: PretrainedConfig, compute: Compute, width: Width, rates: Rates, device: str) -> None:
        self.config, self.compute, self.width = config, compute, width
        self.rates, self.device = rates, device
        text = config.get_text_config()
        self.vocabulary, self.layers = text.vocab_size, text.num_hidden_layers
        short, long = (prefill_work(config, compute, tokens) for tokens in (64, 128))
        self._prompt_token = (long + short * -1) * (1 / 64)
        self._prompt = short + self._prompt_token * -64
        self._tokens: dict[bool, TokenWork] = {}

    def seconds(self, groups: list[Group], sampling: Sampling) -> dict[str, float]:
        """Return the seconds of one call of the engine: `prefill` and `decode`.

        Args:
            groups: Its questions.
            sampling: How they are sampled.
        """
        if not groups:
            return {"prefill": 0.0, "decode": 0.0}
        if sampling.kind != "transformers":
            token = self._compiled(self._token(False))
            segments = refilled_segments(groups, sampling.at_once or VLLM_AT_ONCE)
            return {"prefill": self._prefill(groups), "decode": decode_seconds(segments, token, self.rates)}
        found = {"prefill": 0.0, "decode": 0.0}
        for batch, same in groupby(batches(groups, sampling.at_once)):
            times = len(list(same))
            token = self._token(min(group.prompt for group in batch) < max(group.prompt for group in batch))
            drawn = TokenWork(
                token.once + Work(launches=DRAW_LAUNCHES + STORE_LAUNCHES * self.layers),
                token.row + Work(other_bytes=DRAW_BYTES[sampling.nucleus] * self.vocabulary),
                token.context,
            )
            found["prefill"] += times * self._prefill(batch)
            found["decode"] += times * decode_seconds(
                padded_segments(batch, self.device, sampling.limit), drawn, self.rates
            )
        return found

    def _token(self, padded: bool) -> TokenWork:
        if padded not in self._tokens:
            self._tokens[padded] = decode_work(self.config, self.compute, padded)
        return self._tokens[padded]

    def _compiled(self, token: TokenWork) -> TokenWork:
        """Return a step of vLLM, whose CUDA graphs and fused kernels leave the products' bytes, and its host code."""
        host = Work(launches=self.rates.engine_overhead / self.rates.overhead, product_bytes=token.once.product_bytes)
        row, context = (Work(flops=part.flops, product_bytes=part.product_bytes) for part in (token.row, token.context))
        return TokenWork(host, row, context)

    def _prefill(self, batch: list[Group]) -> float:
        prompts = [group.prompt for group in batch]
        tokens = len(prompts) * max(prompts)
        work = self._prompt + self._prompt_token * tokens
        work = Work(work.launches, flops.prefill(self.width, prompts), work.product_bytes, work.other_bytes)
        return work.seconds(self.rates)
