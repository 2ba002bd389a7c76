"""From chat messages to prompt token ids, in the same way for student and teacher."""

import warnings
from collections.abc import Iterator
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import PreTrainedTokenizerBase

from pgpo_lightning.core.types import Message, Question, Rollout
from pgpo_lightning.models.loading import decode
from pgpo_lightning.rollout.chat_template import QUESTION, check_chat_template
from pgpo_lightning.rollout.prompt_batches import AT_ONCE, encode_together
from pgpo_lightning.rollout.thinking import Thinking


class PromptEncoder:
    """Encodes conversations with the tokenizer's chat template, with an explicit thinking mode.

    Without a chat template, turns are joined by blank lines.

    Args:
        tokenizer: The policy's tokenizer.
        enable_thinking: Passed to the chat template, which may ignore it. If false, Qwen3's opens an empty think block.
        template_kwargs: Passed to the chat template too.

    Raises:
        MisconfigurationException: If the chat template cannot be used; see
            :func:`~pgpo_lightning.rollout.chat_template.check_chat_template`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        enable_thinking: bool,
        template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.template_kwargs = template_kwargs or {}
        if self.template_kwargs and tokenizer.chat_template is None:
            raise MisconfigurationException(
                f"Expected a tokenizer with a chat template for `model_config.chat_template_kwargs`, but "
                f"`{tokenizer.name_or_path}` has none. Remove the setting."
            )
        check_chat_template(tokenizer, enable_thinking, self.template_kwargs)
        self.tokenizer = tokenizer
        self.enable_thinking = enable_thinking
        self.thinking = Thinking(tokenizer)
        self.rows: int | None = None
        """Number of token ids with an embedding; ``None`` until the model is loaded."""
        self._highest = (-1, "")
        self._prefix = _prefix(tokenizer)
        self._system_checked = self._tools_checked = False
        if self.messages([{"role": "user", "content": QUESTION}])[-1:] == [tokenizer.eos_token_id]:
            warnings.warn(
                f"The chat template of `{tokenizer.name_or_path}` ends a prompt with the end-of-sequence token "
                f"{tokenizer.eos_token!r}, so answers start after the end. Make it support `add_generation_prompt`.",
                stacklevel=2,
            )

    def questions(self, questions: list[Question]) -> Iterator[list[int]]:
        """Yield what :meth:`question` returns for each question, with its warnings and errors in the same order.

        Many are encoded at once, where that gives the same; see :mod:`pgpo_lightning.rollout.prompt_batches`.
        """
        for start in range(0, len(questions), AT_ONCE):
            part = questions[start : start + AT_ONCE]
            together = encode_together(self.tokenizer, part, self.enable_thinking, self.template_kwargs)
            for i, question in enumerate(part):
                yield self.question(question, together[i] if together else None)

    def question(self, question: Question, ids: list[int] | None = None) -> list[int]:
        """Return the student's prompt.

        Args:
            question: What is asked.
            ids: Its token ids from :func:`~pgpo_lightning.rollout.prompt_batches.encode_together`, if they are known.

        Raises:
            MisconfigurationException: If the question is a list of messages and the tokenizer has no chat template, if the
                template raises, or if the prompt has a token without an embedding.
        """
        where = question.source or f"question {question.index}"
        if not isinstance(question.prompt, str) and self.tokenizer.chat_template is None:
            raise MisconfigurationException(
                f"Expected a tokenizer with a chat template, because the prompt of {question.source or question.index} is a "
                f"list of messages, but `{self.tokenizer.name_or_path}` has none. Give prompts as text, or set "
                "`model.model_config.tokenizer` to one with a template."
            )
        tools = question.tools
        ids = self.messages(question.messages(), where, tools) if ids is None else self._complete(ids, where)
        self._check_tools(question, ids, where)
        if question.system and not self._system_checked:
            self._system_checked = True
            if ids == self.messages(question.messages()[1:], where, question.tools):
                warnings.warn(
                    f"The chat template of `{self.tokenizer.name_or_path}` omits the system message of {where}, so the model "
                    "does not see it. Put it into the prompt, or set `model.model_config.tokenizer` to one with "
                    "another template.",
                    stacklevel=2,
                )
        return ids

    def _check_tools(self, question: Question, ids: list[int], where: str) -> None:
        """Raise if the chat template omits the tools or the tool calls of the first question that has any."""
        messages = question.messages()
        calls = any(message.get("tool_calls") for message in messages)
        if self._tools_checked or not (question.tools or calls):
            return
        bare = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
        for what, there, without in (
            ("tools", question.tools, (messages, None)),
            ("tool calls", calls, (bare, question.tools)),
        ):
            if there and (self.tokenizer.chat_template is None or ids == self.messages(without[0], where, without[1])):
                raise MisconfigurationException(
                    f"Expected a chat template that shows the {what} of {where}, but that of `{self.tokenizer.name_or_path}` "
                    f"omits them. Set `model.model_config.tokenizer` to one with another template, or remove the {what} from "
                    "the data (another `data.tools_column` ignores the column)."
                )
        self._tools_checked = True

    def messages(
        self, messages: list[Message], where: str = "a prompt", tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Return the token ids of a conversation, up to the start of the assistant's answer.

        Args:
            messages: The conversation.
            where: Its source, for error messages.
            tools: JSON schemas of tools, for the chat template.

        Raises:
            MisconfigurationException: If the chat template raises, or a token has no embedding.
        """
        if self.tokenizer.chat_template is None:
            text = "\n\n".join(message["content"] for message in messages)
            return self._complete(self._encoded(text), where)
        try:
            encoding: Any = self.tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                enable_thinking=self.enable_thinking,
                tools=tools,  # type: ignore[arg-type]  # a list is invariant
                **self.template_kwargs,
            )
            ids: list[int] = encoding["input_ids"]
        except Exception as error:  # templates are programs
            _check_text("".join(str(message.get("content")) for message in messages), where)
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise MisconfigurationException(
                f"Expected the chat template of `{self.tokenizer.name_or_path}` to take the turns of {where} ({roles}), but it "
                f"raises {type(error).__name__}: {error}. Change the row, or set `model.model_config.tokenizer` to one "
                f"with another template."
            ) from error
        return self._complete(ids, where)

    def _complete(self, ids: list[int], where: str) -> list[int]:
        """Return a conversation's token ids with the tokenizer's prefix, which a chat template writes itself."""
        if self.tokenizer.chat_template is None:
            ids = [*self._prefix, *self._known(ids, "a text")]
        return self._known(ids, where)

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of plain text, without special tokens."""
        return self._known(self._encoded(text), "a text")

    def _encoded(self, text: str) -> list[int]:
        try:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        except TypeError:
            _check_text(text, "a text")
            raise
        return ids

    def text(self, ids: list[int]) -> str:
        """Return the text of token ids without special tokens."""
        return decode(self.tokenizer, ids, skip_special_tokens=True)

    def answer(self, rollout: Rollout) -> str:
        """Return the text of a response without its thinking."""
        return self.thinking.remove(rollout.text, rollout.response_ids, rollout.prompt_ids)

    def know_rows(self, rows: int) -> None:
        """Set the number of token ids that the model has embeddings for.

        Args:
            rows: Rows of its embeddings or of its head, whichever has fewer.

        Raises:
            MisconfigurationException: If the tokenizer's vocabulary, or a prompt encoded earlier, has a higher token id.
        """
        vocabulary, added = self.tokenizer.get_vocab(), self.tokenizer.get_added_vocab()
        named = {"pad_token": self.tokenizer.pad_token_id, "eos_token": self.tokenizer.eos_token_id}
        # Added tokens without an embedding are harmless if no text contains them: Gemma 3 has one for images.
        highest = max((i for token, i in vocabulary.items() if token not in added), default=-1)
        for name, token_id in (*named.items(), ("vocabulary", highest)):
            if token_id is not None and token_id >= rows:
                whole = f"{len(vocabulary)} tokens up to number {token_id}"
                what = whole if name == "vocabulary" else f"`{name}` {token_id}"
                raise MisconfigurationException(
                    f"Expected the tokens of `{self.tokenizer.name_or_path}` to have rows in the model's embeddings, but it has "
                    f"{what}, and they have {rows} rows (0 to {rows - 1}). Set `model.model_config.tokenizer` to the "
                    f"model's own, or save the "
                    "model after `model.resize_token_embeddings(len(tokenizer))`."
                )
        self.rows = rows
        self._known([self._highest[0]], self._highest[1])

    def _known(self, ids: list[int], where: str) -> list[int]:
        highest = max(ids, default=-1)
        if self.rows is None:
            self._highest = max(self._highest, (highest, where))
        elif highest >= self.rows:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise MisconfigurationException(
                f"Expected tokens that have rows in the model's embeddings, but {where} has {token!r}, number {highest}, and "
                f"they have {self.rows} rows. Take it out of the text, or save the model after "
                "`model.resize_token_embeddings(len(tokenizer))`."
            )
        return ids


def _check_text(text: str, where: str) -> None:
    """Raise if a text contains half of a character, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MisconfigurationException(
            f"Expected whole characters in {where}, but got the lone surrogate {text[error.start]!a} behind "
            f"{text[max(0, error.start - 20) : error.start]!a}. Take it out of the text."
        ) from None


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer adds before a text, such as a beginning-of-sequence token.

    Tokens that it adds after the text, such as an end-of-sequence token, must not precede an answer.
    """
    plain = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    whole = tokenizer(QUESTION)["input_ids"]
    starts = range(len(whole) - len(plain) + 1)
    return whole[: next((i for i in starts if whole[i : i + len(plain)] == plain), 0)]
