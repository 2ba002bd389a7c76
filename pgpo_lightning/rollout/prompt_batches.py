"""Token ids of many conversations at once, for the checks at start-up that look at every question of the data."""

from typing import Any

from transformers import PreTrainedTokenizerBase, TokenizersBackend

from pgpo_lightning.core.types import Question

AT_ONCE = 256
"""Questions that are rendered and encoded in one call."""


def encode_together(
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    enable_thinking: bool,
    template_kwargs: dict[str, Any] | None = None,
) -> list[list[int]] | None:
    """Return the token ids of the questions' conversations, without a tokenizer's prefix; the same as one by one.

    A call per question spends more time in Python around the template and the tokenizer than in them. With the batch
    interface of the `tokenizers` library the start-up takes about half of the CPU seconds.

    Args:
        tokenizer: The policy's tokenizer.
        questions: What is asked.
        enable_thinking: Passed to the chat template.
        template_kwargs: Passed to the chat template too.

    Returns:
        The token ids of each question. ``None`` where one by one is needed: for a tokenizer in Python or with methods of its
        own, for questions with tools, for a question that fails, and for a prompt about whose length the tokenizer would warn.
    """
    if not _is_plain(tokenizer) or any(question.tools for question in questions):
        return None
    templated, most = tokenizer.chat_template is not None, tokenizer.model_max_length
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]  # of TokenizersBackend
    options: Any = {"add_generation_prompt": True, "enable_thinking": enable_thinking, "tokenize": False}
    options |= template_kwargs or {}
    try:
        conversations = [question.messages() for question in questions]
        if not all(turns and all(isinstance(turn, dict) for turn in turns) for turns in conversations):
            return None
        texts: Any = (
            tokenizer.apply_chat_template(conversations, **options)
            if templated
            else ["\n\n".join(turn["content"] for turn in turns) for turns in conversations]
        )
        # An ordinary call first: it sets padding, truncation and special tokens of the backend as every other call does.
        first = tokenizer(texts[0], add_special_tokens=False)["input_ids"]
        found = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception:  # templates are programs; one by one the error names the question
        return None
    return found if found[0] == first and max(map(len, found)) <= most else None


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer encodes as the `tokenizers` library does, with no code of its own around it."""
    kind = type(tokenizer)
    own = {"__call__", "_encode_plus", "apply_chat_template", "get_chat_template"} & vars(tokenizer).keys()
    return (
        isinstance(tokenizer, TokenizersBackend)
        and not own
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is TokenizersBackend._encode_plus
        and kind.apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
        and kind.get_chat_template is PreTrainedTokenizerBase.get_chat_template
    )
