"""Rows to micro-batches: the one place where padding is decided."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from pgpo_lightning.core.types import Sample
from pgpo_lightning.losses.fused import TokenStatistics

Share = Literal["never", "if-cheaper", "always"]
"""Whether equal prompts are run once."""


@dataclass(frozen=True)
class Pass:
    """The rows of one forward pass, and whether they count or are there for the sake of other ranks."""

    rows: list[Sample]
    counts: bool


@dataclass
class _Load:
    """What one forward pass over some rows costs."""

    share: Share
    rows: int = 0
    longest: int = 0
    longest_prompt: int = 0
    longest_response: int = 0
    prompts: set[tuple[int, ...]] = field(default_factory=set)

    def plus(self, prompt: tuple[int, ...], response: int) -> "_Load":
        """Return the load with one more row. The set of prompts is shared until :meth:`keep`."""
        return _Load(
            self.share,
            self.rows + 1,
            max(self.longest, len(prompt) + response),
            max(self.longest_prompt, len(prompt)),
            max(self.longest_response, response),
            self.prompts,
        )

    def keep(self, prompt: tuple[int, ...]) -> "_Load":
        self.prompts.add(prompt)
        return self

    def tokens(self, new_prompt: tuple[int, ...] | None = None) -> int:
        """Return the padded tokens of the cheaper layout."""
        whole = self.rows * self.longest
        if self.share == "never":
            return whole
        prompts = len(self.prompts) + (new_prompt is not None and new_prompt not in self.prompts)
        apart = prompts * self.longest_prompt + self.rows * max(1, self.longest_response - 1)
        return apart if self.share == "always" else min(whole, apart)


def micro_batches(
    rows: list[Sample], token_budget: int, contexts: Callable[[Sample], list[list[int]]], share: Share
) -> list[list[Sample]]:
    """Group rows so that no forward pass costs more than `token_budget` padded tokens.

    Rows of similar length together waste little on padding; rows with the same prompt together need to run it only once.
    Which of the two is cheaper depends on the data, so both are worked out.

    Args:
        rows: The rows of one optimizer step, in any order.
        token_budget: Most padded tokens of one forward pass. A single row that is longer makes a group of its own.
        contexts: The prompts that a row's forward passes put before its response: the student's, and the teacher's if any.
        share: Whether equal prompts are run once.

    Returns:
        Groups of rows, longest first, so that a run that is going to be out of memory is so at once.
    """
    prompts = {id(row): [tuple(prompt) for prompt in contexts(row)] for row in rows}

    def length(row: Sample) -> int:
        return max(map(len, prompts[id(row)])) + row.length

    def fill(ordered: list[Sample]) -> tuple[int, list[list[Sample]]]:
        groups: list[list[Sample]] = []
        total, loads = 0, []
        for row in ordered:
            mine = prompts[id(row)]
            more = [load.plus(prompt, row.length) for load, prompt in zip(loads, mine, strict=False)]
            if not groups or max(load.tokens(prompt) for load, prompt in zip(more, mine, strict=True)) > token_budget:
                total += sum(load.tokens() for load in loads)
                groups.append([])
                more = [_Load(share).plus(prompt, row.length) for prompt in mine]
            groups[-1].append(row)
            loads = [load.keep(prompt) for load, prompt in zip(more, mine, strict=True)]
        return total + sum(load.tokens() for load in loads), groups

    cost, groups = fill(sorted(rows, key=length, reverse=True))
    if share == "never":
        return groups
    longest: dict[tuple[int, ...], int] = {}
    for row in rows:
        key = prompts[id(row)][0]
        longest[key] = max(longest.get(key, 0), row.length)
    together = sorted(rows, key=lambda row: (longest[key := prompts[id(row)][0]], key, row.length), reverse=True)
    cost_together, groups_together = fill(together)
    return groups_together if cost_together < cost else groups


@dataclass
class Sequences:
    """Prompts with their responses, padded on the right, and where the responses are.

    Padding on the right needs no attention mask: in a causal model no real token ever looks at what follows it.

    Attributes:
        input_ids: Shape ``(rows, longest)``, int64.
        row: For every response token, its row; shape ``(N,)``.
        position: For every response token, the position whose output predicts it; shape ``(N,)``.
        targets: The response tokens, the rows one after the other; shape ``(N,)``.
        lengths: Response tokens of each row, shape ``(rows,)``.
    """

    input_ids: Tensor
    row: Tensor
    position: Tensor
    targets: Tensor
    lengths: Tensor

    @classmethod
    def pack(
        cls, pairs: list[tuple[list[int], list[int]]], pad_id: int, device: torch.device, share: Share = "never"
    ) -> "Sequences | SharedSequences":
        """Lay out (prompt, response) pairs of token ids.

        Args:
            pairs: At least one pair; prompts and responses are not empty.
            pad_id: Any valid token id.
            device: Where the tensors are to live.
            share: Whether equal prompts are run once; if so, the model is run twice, on prompts and on responses.
        """
        if share == "always":
            return SharedSequences.pack_shared(pairs, pad_id, device)
        if share == "if-cheaper":
            load = _Load(share)
            for prompt, response in pairs:
                load = load.plus(tuple(prompt), len(response)).keep(tuple(prompt))
            if load.tokens() < load.rows * load.longest:
                return SharedSequences.pack_shared(pairs, pad_id, device)
        ids = _padded([[*prompt, *response] for prompt, response in pairs], pad_id)
        row, position = _places(pairs, [len(prompt) - 1 for prompt, _ in pairs])
        targets = torch.tensor([token for _, response in pairs for token in response])
        lengths = torch.tensor([len(response) for _, response in pairs])
        return cls(*(part.to(device) for part in (ids, row, position, targets, lengths)))

    def hidden_states(self, decoder: Callable[..., Any], config: PretrainedConfig) -> Tensor:
        """Return what predicts the response tokens, ``(N, D)``."""
        return decoder(input_ids=self.input_ids, use_cache=False).last_hidden_state[self.row, self.position]


@dataclass
class SharedSequences:
    """Each prompt once, and the responses apart; responses see the keys and values of their prompt.

    The gradient flows through those keys and values, so this is the same function as :class:`Sequences`, up to rounding.

    Attributes:
        prompts: Different prompts, padded on the right, shape ``(prompts, longest prompt)``, int64.
        prompt_lengths: Shape ``(prompts,)``.
        owner: Prompt of each row, shape ``(rows,)``.
        responses: Responses without their last token, padded on the right, shape ``(rows, longest response - 1)``.
        mask: Which keys a response may see, ``(rows, longest prompt + longest response - 1)``; ``None`` for all before it.
        row, position, targets, lengths: As in :class:`Sequences`; position 0 is the end of the prompt.
    """

    prompts: Tensor
    prompt_lengths: Tensor
    owner: Tensor
    responses: Tensor
    mask: Tensor | None
    row: Tensor
    position: Tensor
    targets: Tensor
    lengths: Tensor

    @classmethod
    def pack_shared(
        cls, pairs: list[tuple[list[int], list[int]]], pad_id: int, device: torch.device
    ) -> "SharedSequences":
        """Lay out (prompt, response) pairs; see :meth:`Sequences.pack`."""
        index: dict[tuple[int, ...], int] = {}
        owner = [index.setdefault(tuple(prompt), len(index)) for prompt, _ in pairs]
        prompts = _padded([list(prompt) for prompt in index], pad_id)
        lengths = torch.tensor([len(prompt) for prompt in index])
        # At least one wide, so that it depends on nothing how often the model is run.
        responses = _padded([response[:-1] or [pad_id] for _, response in pairs], pad_id)
        mask = None
        if lengths.min() < prompts.size(1):
            seen = torch.arange(prompts.size(1)) < lengths[owner].unsqueeze(1)
            mask = torch.cat([seen, torch.ones_like(responses, dtype=torch.bool)], dim=1).long()
        row, position = _places(pairs, [0] * len(pairs))
        targets = torch.tensor([token for _, response in pairs for token in response])
        counts = torch.tensor([len(response) for _, response in pairs])
        parts = (prompts, lengths, torch.tensor(owner), responses, mask, row, position, targets, counts)
        return cls(*(part if part is None else part.to(device) for part in parts))

    def hidden_states(self, decoder: Callable[..., Any], config: PretrainedConfig) -> Tensor:
        """Return what predicts the response tokens, ``(N, D)``."""
        cache = DynamicCache(config=config)
        hidden = decoder(input_ids=self.prompts, past_key_values=cache, use_cache=True).last_hidden_state
        ends = hidden[torch.arange(len(hidden), device=hidden.device), self.prompt_lengths - 1]
        states = ends.index_select(0, self.owner).unsqueeze(1)
        for layer in cache.layers:
            layer.keys = layer.keys.index_select(0, self.owner)
            layer.values = layer.values.index_select(0, self.owner)
        start = self.prompt_lengths[self.owner].unsqueeze(1)
        after = decoder(
            input_ids=self.responses,
            attention_mask=self.mask,
            position_ids=start + torch.arange(self.responses.size(1), device=start.device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return torch.cat([states, after], dim=1)[self.row, self.position]


def _padded(rows: list[list[int]], pad_id: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows], dtype=torch.int64)


def _places(pairs: list[tuple[list[int], list[int]]], starts: list[int]) -> tuple[Tensor, Tensor]:
    row = [i for i, (_, response) in enumerate(pairs) for _ in response]
    position = [start + t for start, (_, response) in zip(starts, pairs, strict=True) for t in range(len(response))]
    return torch.tensor(row), torch.tensor(position)


@dataclass
class TokenInputs:
    """What is known about each response token before the forward pass; shape ``(N,)`` each, fp32.

    Attributes:
        sampler: Log-probability under the sampler (nats).
        coefficient: Factor of the token's loss in the loss of the step.
        advantage: Of its response.
        old: Log-probability under the policy before the first of several updates; ``None`` where that is the current one.
        taught: Whether the rows have a teacher's prompt. Those with and without never share a pass.
        demonstration: Whether the token is of a demonstration, bool; ``None`` if none is. `sampler` and `old` say nothing there.
    """

    sampler: Tensor
    coefficient: Tensor
    advantage: Tensor
    old: Tensor | None
    taught: bool
    demonstration: Tensor | None = None

    @classmethod
    def of(cls, rows: list[Sample], lengths: Tensor, scale: float, by_sequence: bool) -> "TokenInputs":
        """Collect what the rows know.

        Args:
            rows: In the order of the packed sequences.
            lengths: Their response tokens, shape ``(rows,)``, on the device of the model.
            scale: Factor of a sequence's mean over its tokens, or of a token.
            by_sequence: Which of the two.
        """
        device = lengths.device
        sampler = torch.cat([row.rollout.log_probs for row in rows]).to(device)

        def spread(values: Tensor) -> Tensor:
            return values.repeat_interleave(lengths, output_size=sampler.numel())

        coefficient = (
            scale / lengths if by_sequence else torch.full(lengths.shape, scale, dtype=torch.float32, device=device)
        )
        if any(row.weight != 1 for row in rows):
            weight = torch.tensor([row.weight for row in rows], dtype=torch.float32, device=device)
            coefficient = coefficient * weight
        advantage = torch.tensor([row.advantage for row in rows], dtype=torch.float32, device=device)
        old = given = None
        if any(row.old_log_probs is not None for row in rows):
            known = [row.rollout.log_probs if row.demonstration else row.old_log_probs for row in rows]
            old = torch.cat(known).to(device)
        if any(row.demonstration for row in rows):
            given = spread(torch.tensor([row.demonstration for row in rows], device=device))
        taught = rows[0].reprompt_ids is not None
        return cls(sampler, spread(coefficient), spread(advantage), old, taught, given)

    def __getitem__(self, part: slice) -> "TokenInputs":
        """Return the same for some of the tokens."""
        old, given = (None if values is None else values[part] for values in (self.old, self.demonstration))
        return TokenInputs(self.sampler[part], self.coefficient[part], self.advantage[part], old, self.taught, given)

    def old_log_probs(self, tokens: TokenStatistics) -> Tensor:
        """Return log-probabilities under the policy that the batch was sampled from, as the trainer sees it."""
        return tokens.log_p_student.detach() if self.old is None else self.old


def shares(rows: list[Sample], count: int) -> Iterator[list[Sample]]:
    """Split rows into `count` shares for that many updates, whole questions each, in the order of the batch.

    Raises:
        ValueError: If there are fewer questions than shares.
    """
    questions = list(dict.fromkeys(row.rollout.question.index for row in rows))
    if len(questions) < count:
        raise ValueError(
            f"Expected at least one question for each of {count} updates, but the batch has {len(questions)}."
        )
    for i in range(count):
        mine = set(questions[i * len(questions) // count : (i + 1) * len(questions) // count])
        yield [row for row in rows if row.rollout.question.index in mine]
