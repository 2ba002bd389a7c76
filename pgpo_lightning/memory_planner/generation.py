"""Seconds of sampling: the engine's batches replayed with counts in place of tensors."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count

import torch
from transformers import PretrainedConfig

from pgpo_lightning.core.devices import is_gpu
from pgpo_lightning.memory_planner import flops
from pgpo_lightning.memory_planner.cards import Rates
from pgpo_lightning.memory_planner.dry_run import Compute
from pgpo_lightning.memory_planner.flops import Width
from pgpo_lightning.memory_planner.passes import decode_work, prefill_work
from pgpo_lightning.memory_planner.work import TokenWork, Work
from pgpo_lightning.memory_planner.workload import EngineKind
from pgpo_lightning.models.shared_attention import CopiedKeys, Keys
from pgpo_lightning.models.shared_decoding import kind_of_keys, room_for
from pgpo_lightning.rollout.transformers_engine import look_every

DRAW_LAUNCHES = 26
"""Operations of drawing a token for all responses and recording it; counted on a CPU."""

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
        captured: Whether the package's sampler repeats a step as a CUDA graph.
    """

    limit: int
    kind: EngineKind = "transformers"
    at_once: int | None = None
    nucleus: bool = False
    captured: bool = False


def own_segments(
    groups: list[Group], at_once: int | None, device: str, limit: int, copied: bool
) -> tuple[list[Segment], list[list[int]]]:
    """Follow the package's sampler, in which others take the places of ended responses when a quarter of them has ended.

    The first token of a response needs no step of its own: its logits are those of the prompt.

    Args:
        groups: Questions of a call.
        at_once: Maximum responses decoded at the same time; None for all.
        device: On cuda, ended responses are only looked for at every 16th token.
        limit: Maximum tokens of a response.
        copied: Whether every response reads a copy of its prompt's keys. Otherwise those of a prompt are read once.

    Returns:
        Steps of decoding, and the prompts of every pass over prompts.
    """
    waiting = deque((question, min(length, limit)) for question, group in enumerate(groups) for length in group.lengths)
    at_once, every = at_once or len(waiting), look_every(device)
    rows: list[tuple[int, int, int]] = []  # question, tokens, and the step at which it began
    held: set[int] = set()
    segments: list[Segment] = []
    prefills: list[list[int]] = []
    columns, kept, new = 0, rows, [waiting.popleft() for _ in range(min(at_once, len(waiting)))]
    steps = 0  # of the newest segment; 0 where another begins
    for step in count():
        if new:
            started = dict.fromkeys(question for question, _ in new)
            prefills.append([groups[question].prompt for question in started if question not in held])
            held |= set(started)
            columns, steps = max(columns, *(groups[question].prompt for question in started)), 0
        if kept is not rows or new:
            rows = kept + [(*response, step) for response in new]
            oldest = min(start for *_, start in rows)
        kept, new = rows, []
        full = step - oldest + 1 == limit
        if full or step % every == every - 1:
            going = [row for row in rows if step - row[2] + 1 < row[1]]
            if not going and not waiting:
                return segments, prefills
            if full or len(going) <= 0.75 * len(rows):
                begun = {question for question in held if waiting and question == waiting[0][0]}  # siblings will join
                kept, new = going, [waiting.popleft() for _ in range(min(len(waiting), at_once - len(going)))]
                held, steps = begun | {question for question, *_ in kept}, 0
        if kept:
            steps += 1
            context = columns * (len(kept) if copied else len(held)) + sum(step - start + 1 for *_, start in kept)
            if steps == 1:
                segments.append(Segment(1, len(kept), context))
            else:
                segments[-1] = replace(segments[-1], steps=steps)
    raise AssertionError  # count() does not end


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


def growths(tokens: int) -> int:
    """Return how often the memory for responses grows until it holds so many tokens, after which a step is captured again."""
    found = room = 0
    while room < tokens:
        found, room = found + 1, room_for(room)
    return found


def decode_seconds(segments: Iterable[Segment], token: TokenWork, rates: Rates) -> float:
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
        self.vocabulary, self.head = text.vocab_size, text.vocab_size * text.hidden_size
        short, long = (prefill_work(config, compute, tokens) for tokens in (64, 128))
        self._prompt_token = (long + short * -1) * (1 / 64)
        self._prompt = short + self._prompt_token * -64
        self._tokens: dict[tuple[bool, type[Keys]], TokenWork] = {}

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
            queued = refilled_segments(groups, sampling.at_once or VLLM_AT_ONCE)
            return {
                "prefill": self._prefill([group.prompt for group in groups]),
                "decode": decode_seconds(queued, token, self.rates),
            }
        prompts = [group.prompt for group in groups]
        kind = kind_of_keys(prompts, len(groups[0].lengths), is_gpu(self.device))
        segments, prefills = own_segments(groups, sampling.at_once, self.device, sampling.limit, kind.copied)
        token = self._token(min(prompts) < max(prompts), kind)
        drawn = TokenWork(
            token.once + Work(launches=DRAW_LAUNCHES),
            token.row + Work(other_bytes=DRAW_BYTES[sampling.nucleus] * self.vocabulary),
            token.context,
        )
        eager = 0.0
        if sampling.captured:
            longest = min(sampling.limit, max(length for group in groups for length in group.lengths))
            times = 2 * (len(segments) + growths(longest) - 1)  # two ordinary steps before each capture is repeated
            eager = times * token.once.launches * self.rates.overhead
            drawn = replace(drawn, once=replace(drawn.once, launches=1 + DRAW_LAUNCHES))
        return {
            "prefill": sum(self._prefill(part) for part in prefills if part),
            "decode": eager + decode_seconds(segments, drawn, self.rates),
        }

    def _token(self, padded: bool, kind: type[Keys] = CopiedKeys) -> TokenWork:
        if (padded, kind) not in self._tokens:
            token = decode_work(self.config, self.compute, padded, kind)
            if is_gpu(self.device) and self.compute.narrow == torch.bfloat16:
                # It sums products of 16-bit operands in fp32. A CPU, on which they are counted, has an fp32 copy of the head.
                wider = (torch.float32.itemsize - torch.bfloat16.itemsize) * self.head
                token = TokenWork(token.once + Work(product_bytes=-wider), token.row, token.context)
            self._tokens[padded, kind] = token
        return self._tokens[padded, kind]

    def _compiled(self, token: TokenWork) -> TokenWork:
        """Return a step of vLLM, whose CUDA graphs and fused kernels leave the products' bytes, and its host code."""
        host = Work(launches=self.rates.engine_overhead / self.rates.overhead, product_bytes=token.once.product_bytes)
        row, context = (Work(flops=part.flops, product_bytes=part.product_bytes) for part in (token.row, token.context))
        return TokenWork(host, row, context)

    def _prefill(self, prompts: list[int]) -> float:
        tokens = len(prompts) * max(prompts)
        work = self._prompt + self._prompt_token * tokens
        work = Work(work.launches, flops.prefill(self.width, prompts), work.product_bytes, work.other_bytes)
        return work.seconds(self.rates)
