"""Decoding in which responses to the same prompt share its keys and values, and new responses take the place of ended ones."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from itertools import cycle
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from pgpo_lightning.core.devices import is_gpu
from pgpo_lightning.models.captured_step import CapturedStep
from pgpo_lightning.models.next_token import Decoding, NextToken, padded_prompts
from pgpo_lightning.models.shared_attention import CopiedKeys, Keys, Places, Reach, SharedKeys, reach

_NAME = "pgpo_shared_prompts"
_ODD = ("softcap", "position_bias", "s_aux", "sinks")
"""What changes the scores of attention in a way that is not known here."""
_LONG, _LONG_ON_GPU = 128, 512
"""Tokens of a prompt, in the mean, from which sharing its keys pays off. On a GPU two parts and their sum are more operations."""
_ROOM = 32
"""Tokens for which memory is added at least, when that of the responses is full."""
_running: ContextVar["SharedPrompts"] = ContextVar("running")


def kind_of_keys(lengths: list[int], n: int, gpu: bool) -> type[Keys]:
    """Return how the keys of prompts are kept.

    Args:
        lengths: Tokens of the prompts.
        n: Responses per prompt.
        gpu: Whether the device is a GPU.
    """
    return SharedKeys if n > 1 and sum(lengths) >= (_LONG_ON_GPU if gpu else _LONG) * len(lengths) else CopiedKeys


def room_for(tokens: int) -> int:
    """Return the tokens of responses for which there is memory from now on, when so many have filled it.

    Args:
        tokens: Of the oldest response.
    """
    return tokens + 1 + max(_ROOM, (tokens + 1) // 4)


class SharedPrompts(Decoding):
    """Decoding with the keys and values of every prompt once, whatever the number of its responses.

    Layers of attention are run through transformers' interface for attention functions, without masks. Layers with a recurrent
    state keep theirs by response, and then all responses start at once. Response `r` of all is one to prompt ``r // n``.

    Args:
        model: In evaluation mode.
        prompts: Token ids.
        n: Responses per prompt.
        at_once: Responses that are started, the first ones; null for all.
        kinds: How keys are kept, of the layers with the same window in turns; by default as it pays off.
        run: Computes logits, if it exists already.
        captured: Whether the operations for a token are recorded and repeated, :class:`CapturedStep`. All keys in memory are then
            read, those to come masked, so that every token takes the same operations on the same memory. Not with a recurrent
            state.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        n: int,
        at_once: int | None = None,
        kinds: Sequence[type[Keys]] | None = None,
        run: NextToken | None = None,
        captured: bool = False,
    ) -> None:
        self.run, self.config = run or NextToken(model), model.config.get_text_config()
        self.device = next(model.parameters()).device
        self.prompts, self.n = prompts, n
        self.rows: list[int] = []  # the response of every row
        self.ages: list[int] = []  # its tokens so far
        self.begun = 0  # responses that have been started, the first ones
        self.stored: list[int] = []  # prompts whose keys are held
        self.first: Tensor  # logits after each of them
        self.age: Tensor  # `ages`
        self.position: Tensor  # of the next token of every row
        self.token: Tensor  # the newest of every row
        self.room = 0  # tokens for which rows have memory
        self.states = DynamicCache(config=model.config)
        kinds = kinds or [kind_of_keys(list(map(len, prompts)), n, is_gpu(self.device))]
        turns: dict[Any, Iterator[type[Keys]]] = defaultdict(lambda: cycle(kinds))
        self.keys = [_keys(layer, turns) for layer in self.states.layers]
        self.captured = CapturedStep(self._step, self.device) if captured else None
        self.join(list(range(at_once or len(prompts) * n)))

    def append(self, tokens: Tensor) -> None:
        """See :meth:`Decoding.append`."""
        if (oldest := max(self.ages)) >= self.room:
            self.room = room_for(oldest)
            self._moved()
        self.token.copy_(tokens)
        self.logits = self._step() if self.captured is None else self.captured()
        self.ages = [age + 1 for age in self.ages]

    def _step(self) -> Tensor:
        """Run the model on the newest tokens, and return the logits after them."""
        self.reaches: dict[tuple[int | None, bool], Reach] = {}  # by window and kind, for all layers that have them
        token, before = _running.set(self), self.config._attn_implementation
        self.config._attn_implementation = _NAME
        try:
            logits = self.run(self.token.unsqueeze(1), self.position.unsqueeze(1), None, self.states)
        finally:
            self.config._attn_implementation = before
            _running.reset(token)
        self.age += 1  # in place, because a captured step reads and writes the same memory every time
        self.position += 1
        return logits

    def _moved(self) -> None:
        """Forget the captured step, because what it reads or writes is elsewhere now."""
        if self.captured is not None:
            self.captured.forget()

    def join(self, responses: list[int]) -> None:
        """See :meth:`Decoding.join`."""
        new = sorted({response // self.n for response in responses} - set(self.stored))
        started = bool(self.rows)
        cache, first = self._prefill(new) if new else (None, self.first[:0])
        self.first = torch.cat([self.first, first]) if self.stored else first
        self.stored += new
        place = {prompt: i for i, prompt in enumerate(self.stored)}
        rows = torch.tensor([place[response // self.n] for response in responses], device=self.device)
        for i, keys in enumerate(self.keys):
            layer: Any = None if cache is None else cache.layers[i]
            if keys is not None:
                keys.add([] if layer is None else _narrow(layer), rows)
            if not isinstance(self.states.layers[i], LinearAttentionLayer):
                self.states.layers[i] = _Passing(self, cast("Keys", keys))
            elif started:
                raise NotImplementedError("a recurrent state takes up no further responses")
            else:
                self.states.layers[i] = _stripped(layer)
                layer.reorder_cache(rows)
        self.rows, self.begun = self.rows + responses, self.begun + len(responses)
        self.logits = torch.cat([self.logits, self.first[rows]]) if started else self.first[rows]
        self.place(self.ages + [0] * len(responses))

    def _prefill(self, new: list[int]) -> tuple[DynamicCache, Tensor]:
        """Run prompts, and return a cache with them and the logits after each, ``(new, V)``."""
        cache = DynamicCache(config=self.config)
        return cache, self.run(*padded_prompts([self.prompts[i] for i in new], self.device), cache)

    def keep(self, rows: list[int]) -> None:
        """See :meth:`Decoding.keep`. Prompts that no row needs are dropped too."""
        self.rows, used = [self.rows[row] for row in rows], max(self.ages)
        self.room = used
        needed = {response // self.n for response in self.rows}
        if self.begun % self.n:  # further siblings will join
            needed.add(self.begun // self.n)
        places = [i for i, prompt in enumerate(self.stored) if prompt in needed]
        chosen = torch.tensor(rows, dtype=torch.int64, device=self.device)
        prompts = None
        if len(places) < len(self.stored):
            prompts = torch.tensor(places, dtype=torch.int64, device=self.device)
            self.stored, self.first = [self.stored[i] for i in places], self.first[prompts]
        for keys, layer in zip(self.keys, self.states.layers, strict=True):
            if keys is not None:
                keys.keep(chosen, prompts, used)
            if isinstance(layer, LinearAttentionLayer):
                layer.reorder_cache(cast("torch.LongTensor", chosen))
        self.place([self.ages[row] for row in rows])

    def place(self, ages: list[int]) -> None:
        """Find out where every row is, after rows have come or gone.

        Args:
            ages: Tokens of every row's response.
        """
        self.ages = ages
        place = {prompt: i for i, prompt in enumerate(self.stored)}
        of = [place[response // self.n] for response in self.rows]
        counts = Counter(of)
        self.each = each = max(counts.values(), default=0)
        self.gather = self.scatter = None
        if of != [prompt for prompt in range(len(self.stored)) for _ in range(each)]:
            seen: Counter[int] = Counter()
            scatter, gather = [], [0] * (len(self.stored) * each)
            for row, prompt in enumerate(of):
                scatter.append(prompt * each + seen[prompt])
                gather[scatter[-1]] = row
                seen[prompt] += 1
            self.gather, self.scatter = (torch.tensor(where, device=self.device) for where in (gather, scatter))
        lengths = [len(self.prompts[prompt]) for prompt in self.stored]
        self.shortest, self.lengths = min(lengths, default=0), torch.tensor(lengths, device=self.device)
        self.age = torch.tensor(self.ages, dtype=torch.int64, device=self.device)
        self.of = torch.tensor(of, dtype=torch.int64, device=self.device)
        self.position = self.lengths[self.of] + self.age
        self.token = torch.zeros_like(self.age)
        self._moved()
        self.paddings: dict[tuple[int, bool], Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return the output of a layer's attention for the newest tokens, :meth:`Keys.attend`.

        Args:
            layer: Index of the layer.
            query: ``(rows, query heads, 1, D)``.
            key: ``(rows, heads, 1, D)``.
            value: ``(rows, heads, 1, E)``.
            scale: Factor of the products of queries and keys.
        """
        keys = cast("Keys", self.keys[layer])
        oldest = max(self.ages)
        even = oldest if oldest == min(self.ages) else None
        if self.captured is not None:
            oldest, even = self.room - 1, None
        places = Places(self.age, oldest, even, self.room, len(self.stored), self.each, self.gather, self.scatter)
        kind = keys.window, keys.copied
        if kind not in self.reaches:
            padding = self._padding(keys.columns, keys.copied)
            self.reaches[kind] = reach(places, padding, keys.columns, keys.window, keys.copied)
        narrow = _type(value)
        with torch.autocast(self.device.type, enabled=False):
            query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
            return keys.attend(query, key, value, scale, places, self.reaches[kind])

    def _padding(self, columns: int, by_row: bool) -> Tensor | None:
        """Return the padding of every prompt, or of every row, among so many columns; null if there is none."""
        if self.shortest >= columns:
            return None
        if (columns, by_row) not in self.paddings:
            padding = (columns - self.lengths).clamp(min=0)
            self.paddings[columns, by_row] = padding[self.of] if by_row else padding
        return self.paddings[columns, by_row]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers, while a :class:`SharedPrompts` runs.

    Raises:
        ValueError: If the layer changes scores in a way that is not known here.
    """
    if odd := [name for name in _ODD if kwargs.get(name) is not None]:
        raise ValueError(f"attention with {', '.join(odd)} does not share prompts")
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    return _running.get().attend(cast("int", module.layer_idx), query, key, value, scale), None


AttentionInterface.register(_NAME, _attention)


def _type(value: Tensor) -> torch.dtype:
    """Return the type of products, which autocast determines."""
    device = value.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype


def _narrow(layer: DynamicLayer) -> list[Tensor]:
    keys, values = cast("Tensor", layer.keys), cast("Tensor", layer.values)
    return [keys.to(_type(values)), values.to(_type(values))]


def _keys(layer: Any, turns: dict[Any, Iterator[type[Keys]]]) -> Keys | None:
    """Return the keys of a layer of attention, of the next kind for its window; null for a layer with a recurrent state."""
    if not isinstance(layer, DynamicLayer):
        return None
    window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
    return next(turns[window])(window)


def _stripped(layer: Any) -> LinearAttentionLayer:
    """Let a layer with a recurrent state keep no keys, if it has attention too, and pass the newest ones on."""
    if isinstance(layer, DynamicLayer):
        layer.keys = layer.values = None
        layer.is_initialized = False
        layer.update = lambda keys, values, *_, **__: (keys, values)  # type: ignore[method-assign,assignment]
    return cast("LinearAttentionLayer", layer)


class _Passing(DynamicLayer):
    """Keeps nothing, and passes the newest keys and values on to the attention function, which stores them."""

    def __init__(self, decoding: SharedPrompts, keys: Keys) -> None:
        super().__init__()
        self.decoding, self.shared = decoding, keys

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return what is given."""
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Return the columns of the prompts and the tokens of the oldest response."""
        return self.shared.columns + max(self.decoding.ages, default=0)
