"""Incremental decoding: logits of the next token while responses grow, with and without a cache."""

import inspect
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from pgpo_lightning.models.lm_head import decoder
from pgpo_lightning.models.next_token import Decoding, NextToken, padded_prompts
from pgpo_lightning.models.sampling_weights import wide_logits
from pgpo_lightning.models.shared_attention import CopiedKeys, SharedKeys
from pgpo_lightning.models.shared_decoding import SharedPrompts


@dataclass(frozen=True)
class Way:
    """How a model is run while responses grow.

    Attributes:
        cache: Whether keys and values are kept. Otherwise every token takes a pass over the whole sequence.
        padding: Whether prompts of different lengths may be in one batch.
        own_mask: Whether the attention mask of every token is made here. That of transformers lets the host wait for a GPU at
            every token.
        shared: Whether keys and values of a prompt are kept once for all of its responses.
        refills: Whether further responses can take the place of ended ones.
        captured: Whether a GPU repeats the operations for a token by itself, as a CUDA graph.
    """

    cache: bool
    padding: bool
    own_mask: bool = False
    shared: bool = False
    refills: bool = False
    captured: bool = False

    def suits(self, model: PreTrainedModel) -> bool:
        """Return whether it is worth a trial with a model."""
        if not (self.own_mask or self.shared):
            return True
        kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
        known = {DynamicLayer, DynamicSlidingWindowLayer}
        if self.shared and not self.refills:
            known |= {LinearAttentionLayer, LinearAttentionAndFullAttentionLayer}
        sdpa = model.config.get_text_config()._attn_implementation == "sdpa"
        return sdpa and kinds <= known and kinds != {LinearAttentionLayer}

    def start(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        n: int,
        max_tokens: int,
        at_once: int | None = None,
        trial: bool = False,
    ) -> Decoding:
        """Run prompts once, and return the decoding of `n` responses of at most `max_tokens` tokens to each.

        Args:
            model: In evaluation mode.
            prompts: Token ids.
            n: Responses per prompt.
            max_tokens: Maximum tokens of a response.
            at_once: Responses that are started, the first ones; null for all, or if it never refills.
            trial: Whether the layers take turns between the forms in which they are run for short and for long prompts.
        """
        if self.shared:
            kinds = (SharedKeys, CopiedKeys) if trial else None
            return SharedPrompts(model, prompts, n, at_once, kinds, captured=self.captured)
        return Cached(model, prompts, n, max_tokens, self.own_mask) if self.cache else Uncached(model, prompts, n)


WAYS = (
    Way(cache=True, padding=True, shared=True, refills=True),
    Way(cache=True, padding=True, shared=True),
    Way(cache=True, padding=True, own_mask=True),
    Way(cache=True, padding=True),
    Way(cache=True, padding=False),
    Way(cache=False, padding=True),
)
"""From the fastest to the one that works with every causal model."""

CAPTURED = replace(WAYS[0], captured=True)
"""The fastest on a GPU, if the model's layers are attention only and nothing in them waits for the host."""


class Cached(Decoding):
    """Decoding with a cache: keys and values, or another state that the layers of the model keep.

    Args:
        model: In evaluation mode.
        prompts: Token ids.
        n: Responses per prompt.
        max_tokens: Maximum tokens of a response.
        own_mask: See :class:`Way`.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: list[list[int]], n: int, max_tokens: int, own_mask: bool = False
    ) -> None:
        self.run = NextToken(model)
        device = next(model.parameters()).device
        self.width = width = max(map(len, prompts))
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.cache = DynamicCache(config=model.config)
        self.cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in self.cache.layers]
        self.padding = [width - len(prompt) for prompt in prompts]  # of every prompt, then of every response
        self.kinds = _kinds(model, self.cache.layers) if own_mask else {}
        self.mask = None
        if any(self.padding):  # on the left, so that all responses begin at the same position
            self.mask = (torch.arange(width + max_tokens, device=device) >= (width - lengths).unsqueeze(1)).long()
        logits = self.run(*padded_prompts(prompts, device), self.cache)
        rows = torch.arange(len(prompts), device=device).repeat_interleave(n)
        self.position = lengths - 1  # (prompts,), and (responses,) after the selection
        self._select(rows, [padded for padded in self.padding for _ in range(n)])
        self.logits = logits[rows]  # (responses, V)
        if self.kinds and self.mask is not None:
            self.mask = self.mask.bool()[:, None, None]

    def append(self, tokens: Tensor) -> None:
        """See :meth:`Decoding.append`."""
        self.width += 1
        self.position = self.position + 1
        self.logits = self.run(tokens.unsqueeze(1), self.position.unsqueeze(1), self._mask(), self.cache)

    def keep(self, rows: list[int]) -> None:
        """See :meth:`Decoding.keep`."""
        kept = torch.tensor(rows, dtype=torch.int64, device=self.position.device)
        self._select(kept, [self.padding[row] for row in rows])

    def _mask(self) -> Tensor | dict[str, Tensor] | None:
        """Return the mask of the newest token: ``(responses, width)``, or ``(responses, 1, 1, keys)``, by kind of layer."""
        if self.mask is None or (self.kinds and not any(self.padding)):
            return None
        if not self.kinds:
            return self.mask[:, : self.width]
        masks = {}
        for kind, layer in self.kinds.items():
            keys, start = layer.get_mask_sizes(1)
            masks[kind] = self.mask[..., start : start + keys]
        return masks if len(masks) > 1 else masks[kind]

    def _select(self, rows: Tensor, padding: list[int]) -> None:
        self.padding = padding
        # Not `batch_select_indices`, which layers with a recurrent state lack, or which drops that state.
        self.cache.reorder_cache(cast("torch.LongTensor", rows))
        self.position = self.position[rows]
        self.mask = None if self.mask is None else self.mask[rows]


class Uncached(Decoding):
    """Decoding without a cache, by a pass over the whole sequence for every token: slow, but correct for every causal model.

    Args:
        model: In evaluation mode.
        prompts: Token ids.
        n: Responses per prompt.
    """

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], n: int) -> None:
        self.model, self.wide = model, wide_logits(model)
        device = next(model.parameters()).device
        longest = max(map(len, prompts))
        self.ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        logits = self._run()
        self.ids, self.lengths, self.logits = (x.repeat_interleave(n, dim=0) for x in (self.ids, self.lengths, logits))

    def append(self, tokens: Tensor) -> None:
        """See :meth:`Decoding.append`."""
        self.ids = torch.nn.functional.pad(self.ids, (0, 1)).scatter(1, self.lengths.unsqueeze(1), tokens.unsqueeze(1))
        self.lengths = self.lengths + 1
        self.logits = self._run()

    def keep(self, rows: list[int]) -> None:
        """See :meth:`Decoding.keep`."""
        kept = torch.tensor(rows, dtype=torch.int64, device=self.ids.device)
        self.ids, self.lengths = self.ids[kept], self.lengths[kept]

    def _run(self) -> Tensor:
        rows = torch.arange(len(self.ids), device=self.ids.device)
        if self.wide is not None:
            hidden = decoder(self.model)(input_ids=self.ids, use_cache=False).last_hidden_state
            return self.wide(hidden[rows, self.lengths - 1])
        ends, which = (self.lengths - 1).unique(return_inverse=True)
        few = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        inputs = {"logits_to_keep": ends} if few else {}
        logits = self.model(input_ids=self.ids, use_cache=False, **inputs).logits
        place = which if few else self.lengths - 1
        return logits[rows, place]


def _kinds(model: PreTrainedModel, layers: list[Any]) -> dict[str, Any]:
    """Return a layer of the cache for each kind of layer that the model's configuration names."""
    names = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"] * len(layers)
    return dict(zip(names, layers, strict=False))


class _RoomyLayer(DynamicLayer):
    """Keys and values in preallocated tensors. The layer that it replaces copies all of them for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.room: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of the newest tokens, and return all of them."""
        if self.get_seq_length() == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys = keys = self._append("keys", key_states)
        self.values = values = self._append("values", value_states)
        return keys, values

    def _append(self, name: str, new: Tensor) -> Tensor:
        old: Tensor = getattr(self, name)
        before, after = old.size(-2), old.size(-2) + new.size(-2)
        room = self.room.get(name)
        # Repeating or selecting responses creates tensors outside of the preallocated ones.
        if room is None or room.data_ptr() != old.data_ptr() or room.size(-2) < after:
            room = self.room[name] = old.new_empty(*old.shape[:-2], after + max(32, after // 4), old.size(-1))
            room[..., :before, :] = old
        room[..., before:after, :] = new
        return room[..., :after, :]
