"""Removal of the thinking from responses, for all known pairs of tags, also if the prompt opens the block."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from pgpo_lightning.models.loading import decode

PAIRS = (
    ("<think>", "</think>"),  # Qwen, DeepSeek, GLM, Nemotron, SmolLM, Phi reasoning, MiniMax, OLMo
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),  # Reka
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<longcat_think>", "</longcat_think>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi-VL
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
)
"""Known opening and closing tags of thinking."""

Span = tuple[int, int]
Tag = tuple[int, int, int, bool]
"""Start, end, index of its pair, and whether it opens the block."""


def remove_thinking(text: str, opened: bool = False, pairs: Sequence[tuple[str, str]] = PAIRS[:1]) -> str:
    r"""Remove every think block and the white space after it.

    A closing tag without an opening tag closes a block that began before the text, for example in the chat template. Then
    everything up to that tag is removed. A block that is never closed extends to the end of the text.

    Args:
        text: A response.
        opened: Whether the prompt ends inside a block.
        pairs: Opening and closing tags.

    Example:
        >>> remove_thinking("First I try 2, no.</think>\n\nThe answer is 3.")
        'The answer is 3.'
    """
    tags = [
        (found.start(), found.end(), i, opens)
        for i, pair in enumerate(pairs)
        for tag, opens in zip(pair, (True, False), strict=True)
        for found in re.finditer(re.escape(tag) + ("" if opens else r"\s*"), text)
    ]
    return "".join(text[start:end] for start, end in _outside(len(text), tags, opened))


def _outside(length: int, tags: list[Tag], opened: bool) -> list[Span]:
    """Return the spans outside of blocks, from the positions of all tags in a sequence."""
    kept: list[Span] = []
    inside: int | None = -1 if opened else None  # the pair of the open block; -1 if any pair may close it
    at = 0
    for start, end, pair, opens in sorted(tags):
        if opens and inside is None:
            kept.append((at, start))
            inside = pair
        elif not opens and inside in (pair, -1):
            inside, at = None, end
        elif not opens and inside is None:
            kept, at = [], end
    return kept if inside is not None else [*kept, (at, length)]


class Thinking:
    """The tags of thinking of a model: those in the chat template or the vocabulary of its tokenizer.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        known = "\0".join([str(tokenizer.chat_template or ""), *tokenizer.get_added_vocab()])
        self.tokenizer = tokenizer
        self.pairs = [pair for pair in PAIRS if pair == PAIRS[0] or any(_head(tag) in known for tag in pair)]
        """Pairs of tags. `<think>` is always among them, because prompts ask models to use it."""
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        tags = [[tokenizer(tag, add_special_tokens=False)["input_ids"] for tag in pair] for pair in self.pairs]
        self.special = [
            (ids[0], ids[1])
            for ids, pair in zip(tags, self.pairs, strict=True)
            if all(
                special.intersection(each) and tokenizer.decode(each) == tag
                for each, tag in zip(ids, pair, strict=True)
            )
        ]
        """Token ids of the tags that are special tokens, which decoded text does not contain."""

    def opened_by(self, prompt_ids: list[int]) -> bool:
        """Return whether a prompt ends with an opening tag, so that the response starts inside a block."""
        end = decode(self.tokenizer, prompt_ids[-32:]).rstrip()
        return any(end.endswith(opening) for opening, _ in self.pairs)

    def continued(self, text: str, prompt_ids: list[int]) -> str:
        """Return a text as the answer to a prompt: without its opening tag if the prompt ends with one already."""
        if self.opened_by(prompt_ids):
            for opening, _ in self.pairs:
                if text.lstrip().startswith(opening):
                    return text.lstrip().removeprefix(opening).lstrip("\n")
        return text

    def remove(self, text: str, response_ids: list[int], prompt_ids: list[int]) -> str:
        """Return a response without its thinking.

        Args:
            text: The response without special tokens.
            response_ids: Tokens of the response, in which tags that are special tokens are found. They are ignored if `text` is
                not their text.
            prompt_ids: Tokens of its prompt.
        """
        if text != decode(self.tokenizer, response_ids, skip_special_tokens=True):
            return remove_thinking(text, pairs=self.pairs)  # truncated, or not sampled: it may start outside of a block
        opened = self.opened_by(prompt_ids)
        tags = [
            (start, start + len(tag), i, opens)
            for i, pair in enumerate(self.special)
            for tag, opens in zip(pair, (True, False), strict=True)
            for start in range(len(response_ids) - len(tag) + 1)
            if response_ids[start : start + len(tag)] == tag
        ]
        if tags:
            spans = _outside(len(response_ids), tags, opened)
            parts = [decode(self.tokenizer, response_ids[start:end], skip_special_tokens=True) for start, end in spans]
            text = "".join(part.lstrip() if start else part for part, (start, _) in zip(parts, spans, strict=True))
            opened = False
        return remove_thinking(text, opened, self.pairs)


def _head(tag: str) -> str:
    """Return the first part of a tag, because a tag of several tokens is not in one piece in a vocabulary."""
    return tag.split("|>")[0] + "|>" if tag.startswith("<|") else tag
