"""Attention of one new token per response over the keys of its prompt, which siblings share, and over its own keys.

Both parts are computed apart. The softmax over all keys follows from their log-sum-exps, as in cascade inference (Ye et al.,
2024, FlashInfer): o = o_own + s (o_prompt - o_own), with s = sigmoid(lse_prompt - lse_own).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from pgpo_lightning.core.devices import is_gpu


@dataclass(frozen=True)
class Places:
    """Which response is in which row, for one token of all of them.

    Attributes:
        ages: Tokens of each response before the new one, ``(rows,)``.
        oldest: The highest of them, or a number above it, up to which keys are read and masked.
        even: The age of all responses, or null if they differ.
        room: Tokens for which responses have memory.
        prompts: Number of prompts.
        each: The most rows of a prompt.
        gather: Row that is in each place of a grid, ``(prompts * each,)``; null if rows are the grid.
        scatter: Place in the grid of each row, ``(rows,)``; null if rows are the grid.
    """

    ages: Tensor
    oldest: int
    even: int | None
    room: int
    prompts: int
    each: int
    gather: Tensor | None = None
    scatter: Tensor | None = None

    def to_grid(self, rows: Tensor) -> Tensor:
        """Return values of rows ``(rows, ...)`` by prompt, ``(prompts, each, ...)``. Places without a row get any row's."""
        return (rows if self.gather is None else rows[self.gather]).unflatten(0, (self.prompts, self.each))

    def to_rows(self, grid: Tensor) -> Tensor:
        """Return values by prompt ``(prompts, each, ...)`` of every row, ``(rows, ...)``."""
        flat = grid.flatten(0, 1)
        return flat if self.scatter is None else flat[self.scatter]


@dataclass(frozen=True)
class Reach:
    """What the new tokens attend to in layers of one kind.

    Attributes:
        prompt: First column of the prompts' keys that any of them attends to.
        own: First column of their own keys, from -`columns` on where they begin with a copy of the prompt's.
        prompt_mask: True where a token attends, ``(prompts, each or 1, columns)``; null for everywhere.
        own_mask: The same, ``(rows, columns)``.
    """

    prompt: int
    own: int
    prompt_mask: Tensor | None
    own_mask: Tensor | None


def reach(places: Places, padding: Tensor | None, columns: int, window: int | None, copied: bool) -> Reach:
    """Return what new tokens attend to.

    Args:
        places: Of the responses.
        padding: Columns of padding on the left of each prompt, ``(prompts,)``, or if they are copied, of each row, ``(rows,)``;
            null if there are none.
        columns: Columns of the prompts' keys.
        window: Keys that a token attends to at most, its own included; null for all.
        copied: Whether own keys begin with a copy of the prompt's.
    """
    end, device = places.oldest + 1, places.ages.device
    first, first_own = 0, -columns if copied else 0
    if window is not None and places.even is not None:  # the same window for all: a part of the columns
        first_own = max(first_own, end - window)
        first = min(columns, max(0, columns + end - window))
    prompt_mask = own_mask = None
    if padding is not None and first < columns:
        place = torch.arange(first, end + columns if copied else columns, device=device)
        mask = place >= padding.unsqueeze(1)
        prompt_mask, own_mask = (None, mask) if copied else (mask.unsqueeze(1), None)
    if places.even is None:
        place, age = torch.arange(first_own, end, device=device), places.ages.unsqueeze(1)
        past = place <= age if window is None else (place <= age) & (place > age - window)
        own_mask = past if own_mask is None else own_mask & past
        if window is not None and not copied:
            place = torch.arange(-columns, 0, device=device)
            near = place > places.to_grid(age) - window  # (prompts, each, columns)
            prompt_mask = near if prompt_mask is None else near & prompt_mask
    return Reach(first, first_own, prompt_mask, own_mask)


class Keys(ABC):
    """Keys and values of one layer of attention, of every prompt once, and of every response.

    Args:
        window: Keys that a token attends to at most, its own included; null for all.
    """

    copied = False
    """Whether the keys of a response begin with a copy of the prompt's."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.prompts: list[Tensor] = []  # keys and values, (prompts, heads, columns, D)
        self.own: list[Tensor] = []  # of responses, (rows, heads, room, D)

    @property
    def columns(self) -> int:
        """Columns of the prompts' keys."""
        return self.prompts[0].size(2)

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(tensor.nbytes for tensor in (*self.prompts, *self.own))

    def keep(self, rows: Tensor, prompts: Tensor | None, used: int) -> None:
        """Keep only these rows and prompts.

        Args:
            rows: Indices of rows.
            prompts: Indices of prompts; null for all.
            used: Tokens of the oldest response.
        """
        used += self.columns if self.copied else 0
        self.own = [part[rows, :, :used] for part in self.own]
        if prompts is not None:
            self.prompts = [part[prompts] for part in self.prompts]

    def add(self, prompts: list[Tensor], of: Tensor) -> None:
        """Add prompts, aligned on the right, and rows without tokens of their own.

        Args:
            prompts: Keys and values, ``(new prompts, heads, columns, D)`` each; none if no prompt is new.
            of: Prompt of each new row among all, ``(new rows,)``.
        """
        before = self.columns if self.prompts else 0
        if self.prompts and prompts:
            columns = max(before, prompts[0].size(2))
            pairs = zip(self.prompts, prompts, strict=True)
            self.prompts = [
                torch.cat([pad(part, (0, 0, columns - part.size(2), 0)) for part in pair]) for pair in pairs
            ]
        self.prompts = self.prompts or prompts
        if self.copied:
            new = [part[of] for part in self.prompts]
            if self.own:
                wider, room = self.columns - before, self.own[0].size(2) - before
                new = [
                    torch.cat([pad(old, (0, 0, wider, 0)), pad(part, (0, 0, 0, room))])
                    for old, part in zip(self.own, new, strict=True)
                ]
            self.own = new
        elif self.own:
            self.own = [torch.cat([part, part.new_zeros(len(of), *part.shape[1:])]) for part in self.own]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, places: Places, reach: Reach) -> Tensor:
        """Store the new tokens' keys and values, and return what they attend to.

        Args:
            query: ``(rows, query heads, 1, D)``.
            key: ``(rows, heads, 1, D)``.
            value: ``(rows, heads, 1, E)``.
            scale: Factor of the products of queries and keys.
            places: Of the rows.
            reach: Of this kind of layer.

        Returns:
            ``(rows, 1, query heads, E)``.
        """
        before = self.columns if self.copied else 0
        end = before + places.oldest + 1
        self._store(key, value, places, before)
        grouped = query.view(len(query), key.size(1), -1, query.size(-1))  # heads that share keys are further queries
        keys, values = (part[:, :, before + reach.own : end] for part in self.own)
        mixed = self._attend(grouped, keys, values, scale, places, reach)
        return mixed.reshape(len(query), 1, query.size(1), -1)

    @abstractmethod
    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, places: Places, reach: Reach
    ) -> Tensor:
        """Return what queries ``(rows, heads, group, D)`` attend to, given the rows' own keys and values."""

    def _store(self, key: Tensor, value: Tensor, places: Places, before: int) -> None:
        if not self.own:
            self.own = [new.new_zeros(*new.shape[:2], 0, new.size(-1)) for new in (key, value)]
        if (held := self.own[0].size(2)) < before + places.room:
            for i, part in enumerate(self.own):
                self.own[i] = part.new_zeros(*part.shape[:2], before + places.room, part.size(-1))
                self.own[i][:, :, :held] = part
        for part, new in zip(self.own, (key, value), strict=True):
            if places.even is not None:
                part[:, :, before + places.even] = new[:, :, 0]
            else:
                part[torch.arange(len(new), device=new.device), :, before + places.ages] = new[:, :, 0]


class SharedKeys(Keys):
    """Siblings attend to the keys of their prompt together."""

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, places: Places, reach: Reach
    ) -> Tensor:
        mask = None if reach.own_mask is None else reach.own_mask[:, None, None]
        mixed, total = attention(query, keys, values, scale, mask)
        if reach.prompt == self.columns:
            return mixed
        grid = places.to_grid(query).transpose(1, 2)  # (prompts, heads, each, group, D)
        mask = None if reach.prompt_mask is None else reach.prompt_mask[:, None]
        if mask is not None and mask.size(2) > 1:
            mask = mask.repeat_interleave(grid.size(3), dim=2, output_size=mask.size(2) * grid.size(3))
        keys, values = (part[:, :, reach.prompt :] for part in self.prompts)
        found, share = attention(grid.flatten(2, 3), keys, values, scale, mask)
        found, share = (part.unflatten(2, grid.shape[2:4]).transpose(1, 2) for part in (found, share))
        share = torch.sigmoid(places.to_rows(share) - total).unsqueeze(-1)
        return torch.lerp(mixed.float(), places.to_rows(found).float(), share).to(mixed.dtype)


class CopiedKeys(Keys):
    """Every response attends to a copy of its prompt's keys beside its own, which is faster for short prompts."""

    copied = True

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, places: Places, reach: Reach
    ) -> Tensor:
        mask = None if reach.own_mask is None else reach.own_mask[:, None, None]
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return attention without causality, and the log-sum-exp of its scores.

    Where nothing is attended to, the first is finite and the second below any other.

    Args:
        query: ``(B, heads, M, D)``.
        key: ``(B, heads, N, D)``.
        value: ``(B, heads, N, E)``.
        scale: Factor of the products.
        mask: True where a query attends, ``(B, 1, M or 1, N)``; null for everywhere.

    Returns:
        ``(B, heads, M, E)`` in the type of `value`, and ``(B, heads, M)`` in fp32.
    """
    lowest = torch.finfo(query.dtype).min  # not minus infinity, of which a whole row would be NaN
    if query.device.type == "cpu" and key.size(-1) == value.size(-1):
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, lowest)
            bias = bias.expand(-1, -1, query.size(2), -1)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the one behind sdpa, which keeps the sums
        mixed, total = flash(query, key, value, attn_mask=bias, scale=scale)
        return mixed, total.float()
    if is_gpu(query.device) and query.dtype != torch.float32:
        pair = query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)
        scores = torch.bmm(*pair, out_dtype=torch.float32).unflatten(0, query.shape[:2])
    else:
        scores = query.float() @ key.float().transpose(2, 3)
    scores = scores * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, lowest)
    total = scores.logsumexp(-1)
    return (scores - total.unsqueeze(-1)).exp().to(value.dtype) @ value, total
