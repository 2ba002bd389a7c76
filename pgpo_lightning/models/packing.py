"""Layouts of prompts with responses for one forward pass: the one place where padding is decided."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from pgpo_lightning.core.devices import moved

PromptSharing = Literal["never", "if-cheaper", "always"]
"""Whether equal prompts are computed once per forward pass: never, where that needs fewer padded tokens, or always."""


@dataclass(frozen=True)
class Packing:
    """How the sequences of a model are laid out.

    Attributes:
        prompt_sharing: Whether equal prompts are computed once.
        padding_free: Whether sequences that hold their own prompts are concatenated in one row in place of padded.
    """

    prompt_sharing: PromptSharing = "never"
    padding_free: bool = False

    def on_all_ranks(self) -> "Packing":
        """Return the layouts for sharded weights, with which all ranks run a model equally often."""
        return self if self.prompt_sharing == "never" else replace(self, prompt_sharing="always")


@dataclass
class PaddedTokens:
    """Counts the padded tokens of one forward pass as sequences are added to it.

    Attributes:
        packing: The layouts to choose from.
        sequences: Sequences so far.
        real: Tokens of all prompts with their responses.
        longest: Tokens of the longest prompt with its response.
        longest_prompt: Tokens of the longest prompt.
        longest_response: Tokens of the longest response.
        prompts: The different prompts so far.
    """

    packing: Packing
    sequences: int = 0
    real: int = 0
    longest: int = 0
    longest_prompt: int = 0
    longest_response: int = 0
    prompts: set[tuple[int, ...]] = field(default_factory=set)

    def plus(self, prompt: tuple[int, ...], response: int) -> "PaddedTokens":
        """Return the count with one more sequence.

        The set of prompts is the same object, to which :meth:`keep` adds the prompt if the sequence stays in this pass.

        Args:
            prompt: Token ids of its prompt.
            response: Tokens of its response.
        """
        return PaddedTokens(
            self.packing,
            self.sequences + 1,
            self.real + len(prompt) + response,
            max(self.longest, len(prompt) + response),
            max(self.longest_prompt, len(prompt)),
            max(self.longest_response, response),
            self.prompts,
        )

    def keep(self, prompt: tuple[int, ...]) -> "PaddedTokens":
        """Add the prompt of the newest sequence to the set of prompts."""
        self.prompts.add(prompt)
        return self

    def joined(self, prompts: list[tuple[int, ...]], responses: list[int]) -> "PaddedTokens":
        """Return the count with more sequences, as a separate object.

        Args:
            prompts: Token ids of their prompts.
            responses: Tokens of their responses.
        """
        return PaddedTokens(
            self.packing,
            self.sequences + len(prompts),
            self.real + sum(map(len, prompts)) + sum(responses),
            max(self.longest, *(len(prompt) + response for prompt, response in zip(prompts, responses, strict=True))),
            max(self.longest_prompt, *map(len, prompts)),
            max(self.longest_response, *responses),
            self.prompts | set(prompts),
        )

    @property
    def unshared(self) -> int:
        """Padded tokens if every sequence holds its own prompt."""
        return self.real if self.packing.padding_free else self.sequences * self.longest

    def tokens(self, new_prompt: tuple[int, ...] | None = None) -> int:
        """Return the padded tokens of the layout that would be used.

        Args:
            new_prompt: The prompt of the newest sequence, if it is not in the set yet.
        """
        if self.packing.prompt_sharing == "never":
            return self.unshared
        prompts = len(self.prompts) + (new_prompt is not None and new_prompt not in self.prompts)
        shared = prompts * self.longest_prompt + self.sequences * max(1, self.longest_response - 1)
        return shared if self.packing.prompt_sharing == "always" else min(self.unshared, shared)


@dataclass
class Sequences:
    """Prompts with their responses, padded on the right or concatenated, and the positions of the responses.

    Padding on the right needs no attention mask: in a causal model no real token attends to what follows it. In a concatenated
    row the position ids of every sequence start at 0. By them transformers tells sequences apart: flash attention computes each
    by itself, other attention gets a mask of all pairs of tokens.

    Attributes:
        input_ids: Shape ``(sequences, longest)``, or ``(1, tokens)`` if concatenated; int64.
        row: Row of every response token in `input_ids`, shape ``(N,)``.
        position: For every response token, the position whose output predicts it, shape ``(N,)``.
        targets: The response tokens, one sequence after the other, shape ``(N,)``.
        lengths: Response tokens of each sequence, shape ``(sequences,)``.
        position_ids: Position of every token in its sequence, shape ``(1, tokens)``; ``None`` if padded.
    """

    input_ids: Tensor
    row: Tensor
    position: Tensor
    targets: Tensor
    lengths: Tensor
    position_ids: Tensor | None = None

    @classmethod
    def pack(
        cls,
        pairs: list[tuple[list[int], list[int]]],
        pad_id: int,
        device: torch.device,
        packing: Packing = Packing(),
    ) -> "PackedSequences":
        """Lay out (prompt, response) pairs of token ids.

        Args:
            pairs: At least one pair. Prompts and responses are not empty.
            pad_id: Any valid token id.
            device: Device of the tensors.
            packing: The layouts to choose from. With shared prompts the model runs twice: on prompts and on responses.
        """
        if packing.prompt_sharing == "always":
            return SharedSequences.pack_shared(pairs, pad_id, device)
        if packing.prompt_sharing == "if-cheaper":
            load = PaddedTokens(packing)
            for prompt, response in pairs:
                load = load.plus(tuple(prompt), len(response)).keep(tuple(prompt))
            if load.tokens() < load.unshared:
                return SharedSequences.pack_shared(pairs, pad_id, device)
        sequences = [[*prompt, *response] for prompt, response in pairs]
        row, position = _response_positions(pairs, [len(prompt) - 1 for prompt, _ in pairs])
        targets = torch.tensor([token for _, response in pairs for token in response])
        lengths = torch.tensor([len(response) for _, response in pairs])
        if packing.padding_free:
            sizes = torch.tensor([len(sequence) for sequence in sequences])
            starts = sizes.cumsum(0) - sizes
            ids = torch.tensor([[token for sequence in sequences for token in sequence]])
            position_ids = torch.arange(ids.size(1)) - starts.repeat_interleave(sizes)
            parts = [ids, torch.zeros_like(row), position + starts[row], targets, lengths, position_ids.unsqueeze(0)]
        else:
            parts = [_padded(sequences, pad_id), row, position, targets, lengths]
        return cls(*moved(parts, device))

    def hidden_states(self, decoder: Callable[..., Any], config: PretrainedConfig) -> Tensor:
        """Return the hidden states that predict the response tokens, ``(N, D)``.

        Args:
            decoder: The submodule that computes hidden states, or a function with its signature.
            config: Configuration of its model.
        """
        given = {} if self.position_ids is None else {"position_ids": self.position_ids}
        return decoder(input_ids=self.input_ids, use_cache=False, **given).last_hidden_state[self.row, self.position]


@dataclass
class SharedSequences:
    """Different prompts, each computed once, and responses, which attend to the keys and values of their prompt.

    Gradients flow through those keys and values, so this is the same function as :class:`Sequences`, up to rounding.

    Attributes:
        prompts: The different prompts, padded on the right, shape ``(prompts, longest prompt)``, int64.
        prompt_lengths: Shape ``(prompts,)``.
        owner: Index of each sequence's prompt, shape ``(sequences,)``.
        responses: Responses without their last token, padded on the right, shape ``(sequences, longest response - 1)``.
        mask: Which keys a response attends to, shape ``(sequences, longest prompt + longest response - 1)``; ``None`` for all
            preceding ones.
        row, position, targets, lengths: As in :class:`Sequences`. Position 0 is the end of the prompt.
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
        """Lay out (prompt, response) pairs of token ids; see :meth:`Sequences.pack`."""
        index: dict[tuple[int, ...], int] = {}
        owner = [index.setdefault(tuple(prompt), len(index)) for prompt, _ in pairs]
        prompts = _padded([list(prompt) for prompt in index], pad_id)
        lengths = torch.tensor([len(prompt) for prompt in index])
        # At least one column, so that the model always runs twice.
        responses = _padded([response[:-1] or [pad_id] for _, response in pairs], pad_id)
        mask = None
        if lengths.min() < prompts.size(1):
            seen = torch.arange(prompts.size(1)) < lengths[owner].unsqueeze(1)  # (sequences, longest prompt)
            mask = torch.cat([seen, torch.ones_like(responses, dtype=torch.bool)], dim=1).long()
        row, position = _response_positions(pairs, [0] * len(pairs))
        targets = torch.tensor([token for _, response in pairs for token in response])
        counts = torch.tensor([len(response) for _, response in pairs])
        parts = [prompts, lengths, torch.tensor(owner), responses, row, position, targets, counts]
        if mask is None:
            prompts, lengths, owners, responses, *rest = moved(parts, device)
        else:
            prompts, lengths, owners, responses, *rest, mask = moved([*parts, mask], device)
        return cls(prompts, lengths, owners, responses, mask, *rest)

    def hidden_states(self, decoder: Callable[..., Any], config: PretrainedConfig) -> Tensor:
        """Return the hidden states that predict the response tokens, ``(N, D)``; see :meth:`Sequences.hidden_states`."""
        cache = DynamicCache(config=config)
        hidden = decoder(input_ids=self.prompts, past_key_values=cache, use_cache=True).last_hidden_state
        ends = hidden[torch.arange(len(hidden), device=hidden.device), self.prompt_lengths - 1]  # (prompts, D)
        states = ends.index_select(0, self.owner).unsqueeze(1)  # (sequences, 1, D)
        layers: list[Any] = cache.layers  # each a DynamicLayer with keys and values: `shares_prompts` checks it
        for layer in layers:
            layer.keys = layer.keys.index_select(0, self.owner)
            layer.values = layer.values.index_select(0, self.owner)
        start = self.prompt_lengths[self.owner].unsqueeze(1)  # (sequences, 1)
        after = decoder(
            input_ids=self.responses,
            attention_mask=self.mask,
            position_ids=start + torch.arange(self.responses.size(1), device=start.device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return torch.cat([states, after], dim=1)[self.row, self.position]


PackedSequences = Sequences | SharedSequences
"""Sequences in either layout."""


def _padded(ids: list[list[int]], pad_id: int) -> Tensor:
    longest = max(map(len, ids))
    return torch.tensor([row + [pad_id] * (longest - len(row)) for row in ids], dtype=torch.int64)


def _response_positions(pairs: list[tuple[list[int], list[int]]], starts: list[int]) -> tuple[Tensor, Tensor]:
    row = [i for i, (_, response) in enumerate(pairs) for _ in response]
    position = [start + t for start, (_, response) in zip(starts, pairs, strict=True) for t in range(len(response))]
    return torch.tensor(row), torch.tensor(position)
