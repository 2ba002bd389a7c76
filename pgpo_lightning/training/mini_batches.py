"""Samples to mini-batches and micro-batches, and what the loss knows about their tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pgpo_lightning.core.devices import moved
from pgpo_lightning.core.types import Sample
from pgpo_lightning.losses.fused import TokenStatistics
from pgpo_lightning.models.packing import Packing, PaddedTokens

_PASS_TOKENS = 128
"""What a forward and backward pass costs in addition to its tokens, in tokens: operations are started, gradients summed."""
_SHARDED_PASS_TOKENS = 2048
"""The same under sharded weights, which are gathered for every pass (by arithmetic for 8B on eight GPUs, not measured)."""
_PADDED = 1.75
"""Padded over real tokens up to which passes stay full. Other passes round differently, which a small saving is not worth."""
_CUTS = 32
"""Places at which a full pass may be divided."""


@dataclass(frozen=True)
class Pass:
    """The samples of one forward pass.

    Attributes:
        samples: At least one.
        counts: False for a dummy pass, which keeps collectives in step across ranks and has no part in the loss.
    """

    samples: list[Sample]
    counts: bool


def mini_batches(samples: list[Sample], count: int) -> Iterator[list[Sample]]:
    """Split samples into `count` mini-batches, one per optimizer step.

    All samples of a question are in the same mini-batch, and the order of the batch is kept.

    Args:
        samples: Samples of one batch.
        count: Number of mini-batches.

    Raises:
        ValueError: If there are fewer questions than mini-batches.
    """
    questions = list(dict.fromkeys(sample.rollout.question.index for sample in samples))
    if len(questions) < count:
        raise ValueError(
            f"Expected at least one question for each of {count} updates, but the batch has {len(questions)}."
        )
    for i in range(count):
        own = set(questions[i * len(questions) // count : (i + 1) * len(questions) // count])
        yield [sample for sample in samples if sample.rollout.question.index in own]


def micro_batches(
    samples: list[Sample],
    token_budget: int,
    contexts: Callable[[Sample], list[list[int]]],
    packings: Sequence[Packing],
    sharded: bool = False,
) -> list[list[Sample]]:
    """Group samples so that no forward pass has more than `token_budget` padded tokens.

    Samples of similar length waste little on padding. Samples with the same prompt need to compute it only once. Which order is
    cheaper depends on the data, so both are tried. If the padded tokens are still more than 1.75 times the real ones,
    full passes are divided: smaller passes have less padding, but each has a cost of its own.

    Args:
        samples: Samples of one optimizer step, in any order.
        token_budget: Maximum padded tokens of one forward pass. A single longer sample is a group of its own.
        contexts: The prompts that precede a sample's response: the student's, and the teacher's if there is one.
        packings: Layouts of the student's sequences, and of the teacher's, whose prompts are all after the first.
        sharded: Whether weights are gathered for every pass.

    Returns:
        Groups of samples, longest first, so that a run that exceeds the memory does so in its first pass.
    """
    prompts = {id(sample): [tuple(prompt) for prompt in contexts(sample)] for sample in samples}

    def length(sample: Sample) -> int:
        return max(map(len, prompts[id(sample)])) + sample.length

    def empty(own: list[tuple[int, ...]]) -> list[PaddedTokens]:
        return [PaddedTokens(packing) for packing in _for_prompts(packings, len(own))]

    def fill(ordered: list[Sample]) -> tuple[int, list[list[Sample]]]:
        groups: list[list[Sample]] = []
        total, counts = 0, list[PaddedTokens]()
        for sample in ordered:
            own = prompts[id(sample)]
            more = [count.plus(prompt, sample.length) for count, prompt in zip(counts, own, strict=False)]
            if not groups or max(count.tokens(prompt) for count, prompt in zip(more, own, strict=True)) > token_budget:
                total += sum(count.tokens() for count in counts)
                groups.append([])
                more = [count.plus(prompt, sample.length) for count, prompt in zip(empty(own), own, strict=True)]
            groups[-1].append(sample)
            counts = [count.keep(prompt) for count, prompt in zip(more, own, strict=True)]
        return total + sum(count.tokens() for count in counts), groups

    orders = [sorted(samples, key=length, reverse=True)]
    shares = any(packing.prompt_sharing != "never" for packing in packings)
    if shares:
        longest: dict[tuple[int, ...], int] = {}
        for sample in samples:
            key = prompts[id(sample)][0]
            longest[key] = max(longest.get(key, 0), sample.length)
        by_prompt = sorted(
            samples, key=lambda sample: (longest[key := prompts[id(sample)][0]], key, sample.length), reverse=True
        )
        orders.append(by_prompt)
    full = [fill(ordered) for ordered in orders]
    padded, groups = min(full, key=lambda found: found[0])
    if padded <= _PADDED * _real_tokens(prompts, samples, packings):
        return groups
    if shares:  # where prompts are shared, what is left to pad are responses
        full.append(fill(sorted(samples, key=lambda sample: (sample.length, length(sample)), reverse=True)))
    pass_cost = _SHARDED_PASS_TOKENS if sharded else _PASS_TOKENS
    divided = [[_divided(group, prompts, packings, pass_cost) for group in groups] for _, groups in full]
    best = min(divided, key=lambda parts: sum(cost for cost, _ in parts))
    found = [part for _, parts in best for part in parts]
    return [part for _, part in sorted(found, key=lambda part: part[0], reverse=True)]


def _for_prompts(packings: Sequence[Packing], prompts: int) -> list[Packing]:
    """Return the layouts of the passes on a sample's prompts: the first is the student's, all others are the teacher's."""
    return [packings[min(which, len(packings) - 1)] for which in range(prompts)]


def _real_tokens(prompts: dict[int, list[tuple[int, ...]]], samples: list[Sample], packings: Sequence[Packing]) -> int:
    """Return the tokens of all passes together if there were no padding, each shared prompt counted once."""
    total = 0
    for which, packing in enumerate(_for_prompts(packings, max(map(len, prompts.values()), default=0))):
        own = [prompts[id(sample)][which] for sample in samples]
        counted = own if packing.prompt_sharing == "never" else set(own)
        total += sum(map(len, counted)) + sum(sample.length for sample in samples)
    return total


def _divided(
    group: list[Sample], prompts: dict[int, list[tuple[int, ...]]], packings: Sequence[Packing], pass_cost: int
) -> tuple[int, list[tuple[int, list[Sample]]]]:
    """Divide a group at the places that cost least, by dynamic programming over at most 32 places.

    Returns:
        The cost in tokens, and the parts, each with the padded tokens of its largest pass.
    """
    size = -(-len(group) // _CUTS)
    blocks = [group[i : i + size] for i in range(0, len(group), size)]
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # of the first j blocks: cost, start and load of the last part
    for stop in range(1, len(blocks) + 1):
        counts = [PaddedTokens(packing) for packing in _for_prompts(packings, len(prompts[id(group[0])]))]
        options = []
        for start in reversed(range(stop)):
            for which, count in enumerate(counts):
                own = [prompts[id(sample)][which] for sample in blocks[start]]
                counts[which] = count.joined(own, [sample.length for sample in blocks[start]])
            loads = [count.tokens() for count in counts]
            options.append((best[start][0] + sum(loads) + pass_cost, start, max(loads)))
        best.append(min(options))
    parts, stop = [], len(blocks)
    while stop:
        _, start, load = best[stop]
        parts.append((load, [sample for block in blocks[start:stop] for sample in block]))
        stop = start
    return best[-1][0], parts[::-1]


@dataclass
class TokenInputs:
    """What is known about each response token before the forward pass, each of shape ``(N,)``, fp32.

    Attributes:
        sampler: Log-probability under the sampler (nats).
        coefficient: Weight of the token's loss in the loss of the step.
        advantage: Advantage of its response.
        old: Log-probability under the policy before the first of several updates (nats); ``None`` where that is the current one.
        taught: Whether the samples have a teacher's prompt. Samples with and without one are never in the same pass.
        demonstration: Whether the token belongs to a demonstration, bool; ``None`` if none does. There `sampler` is undefined,
            and `old` too unless the objective sets it.
        contrast: Log-probability under the teacher after its second prompt (nats); ``None`` on routes that are not contrasted.
        reference: Log-probability under the initial model (nats); ``None`` without a KL divergence from it.
    """

    sampler: Tensor
    coefficient: Tensor
    advantage: Tensor
    old: Tensor | None
    taught: bool
    demonstration: Tensor | None = None
    contrast: Tensor | None = None
    reference: Tensor | None = None

    @classmethod
    def from_samples(cls, samples: list[Sample], lengths: Tensor, scale: float, by_sequence: bool) -> "TokenInputs":
        """Collect the inputs of all tokens of some samples.

        Args:
            samples: In the order of the packed sequences.
            lengths: Their response tokens, shape ``(sequences,)``, on the device of the model.
            scale: Weight of a sequence's mean over its tokens, or of a token.
            by_sequence: Whether `scale` is the weight of a sequence.

        Raises:
            ValueError: If only some of the samples have `old_log_probs`.
        """
        device = lengths.device
        parts = {
            "sampler": torch.cat([sample.rollout.log_probs for sample in samples]),
            "advantage": torch.tensor([sample.advantage for sample in samples]),
        }
        if any(sample.weight != 1 for sample in samples):
            parts["weight"] = torch.tensor([sample.weight for sample in samples])
        if any(sample.demonstration for sample in samples):
            parts["demonstration"] = torch.tensor([sample.demonstration for sample in samples])
        there = dict(zip(parts, moved([part.float() for part in parts.values()], device), strict=True))
        sampler = there["sampler"]

        def per_token(values: Tensor) -> Tensor:
            return values.repeat_interleave(lengths, output_size=sampler.numel())

        coefficient = (
            scale / lengths if by_sequence else torch.full(lengths.shape, scale, dtype=torch.float32, device=device)
        )
        if "weight" in there:
            coefficient = coefficient * there["weight"]
        old = demonstration = reference = None
        if all(sample.reference_log_probs is not None for sample in samples):
            known = [sample.reference_log_probs for sample in samples if sample.reference_log_probs is not None]
            reference = torch.cat(known).to(device)
        if any(sample.old_log_probs is not None for sample in samples):
            old = torch.cat([_old_log_probs(sample) for sample in samples]).to(device)
        if "demonstration" in there:
            demonstration = per_token(there["demonstration"]).bool()
        taught = samples[0].reprompt_ids is not None
        return cls(
            sampler,
            per_token(coefficient),
            per_token(there["advantage"]),
            old,
            taught,
            demonstration,
            reference=reference,
        )

    def __getitem__(self, part: slice) -> "TokenInputs":
        """Return the inputs of some of the tokens."""
        known = (self.old, self.demonstration, self.contrast, self.reference)
        old, given, contrast, reference = (None if values is None else values[part] for values in known)
        inputs = (self.sampler[part], self.coefficient[part], self.advantage[part])
        return TokenInputs(*inputs, old, self.taught, given, contrast, reference)

    def old_log_probs(self, tokens: TokenStatistics) -> Tensor:
        """Return log-probabilities under the policy that the batch was sampled from, computed by the trainer, ``(N,)``."""
        return tokens.log_p_student.detach() if self.old is None else self.old


def _old_log_probs(sample: Sample) -> Tensor:
    log_probs = sample.old_log_probs
    if log_probs is None and sample.demonstration:
        log_probs = sample.rollout.log_probs
    if log_probs is None:
        raise ValueError("Expected `old_log_probs` of all samples of a forward pass, but some have none.")
    return log_probs


def prompts_of(sample: Sample) -> list[list[int]]:
    """Return the student's prompt and those of the teacher that there are."""
    teacher = [ids for ids in (sample.reprompt_ids, sample.contrast_ids) if ids is not None]
    return [sample.rollout.prompt_ids, *teacher]


def student_prompt(sample: Sample) -> list[list[int]]:
    """Return the student's prompt alone."""
    return [sample.rollout.prompt_ids]
