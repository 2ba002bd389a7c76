"""Chat messages to prompt token ids, the same way for student and teacher."""

import warnings

from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import PreTrainedTokenizerBase

from pgpo_lightning.core.types import Message, Question, Rollout
from pgpo_lightning.rollout.chat_template import QUESTION, check_chat_template
from pgpo_lightning.rollout.thinking import Thinking


class PromptEncoder:
    """Encodes conversations with the tokenizer's chat template, thinking mode always explicit.

    A tokenizer without a chat template is fine for plain text: its turns are joined by blank lines.

    Args:
        tokenizer: Of the policy.
        enable_thinking: Handed to the chat template, which may ignore it. Qwen3's opens an empty think block if false.

    Raises:
        MisconfigurationException: If the chat template cannot be used; see
            :func:`~pgpo_lightning.rollout.chat_template.check_chat_template`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, enable_thinking: bool) -> None:
        check_chat_template(tokenizer, enable_thinking)
        self.tokenizer = tokenizer
        self.enable_thinking = enable_thinking
        self.thinking = Thinking(tokenizer)
        self.rows: int | None = None
        """Rows of the model's embeddings, once it is loaded."""
        self._highest = (-1, "")
        self._before = _put_before(tokenizer)
        self._system_checked = False
        if self.messages([{"role": "user", "content": QUESTION}])[-1:] == [tokenizer.eos_token_id]:
            warnings.warn(
                f"The chat template of `{tokenizer.name_or_path}` ends a prompt with the end-of-sequence token "
                f"{tokenizer.eos_token!r}, so that answers start after the end. Make it honour `add_generation_prompt`.",
                stacklevel=2,
            )

    def question(self, question: Question) -> list[int]:
        """Return the student's prompt.

        Raises:
            MisconfigurationException: If the question is a list of messages and the tokenizer has no chat template, if the
                template raises, or if the prompt has a token that the model does not know.
        """
        where = question.source or f"question {question.index}"
        if not isinstance(question.prompt, str) and self.tokenizer.chat_template is None:
            raise MisconfigurationException(
                f"Expected a tokenizer with a chat template, because the prompt of {question.source or question.index} is a "
                f"list of messages, but `{self.tokenizer.name_or_path}` has none. Give prompts as text, or set "
                "`model.tokenizer` to one with a template."
            )
        ids = self.messages(question.messages(), where)
        if question.system and not self._system_checked:
            self._system_checked = True
            if ids == self.messages(question.messages()[1:], where):
                warnings.warn(
                    f"The chat template of `{self.tokenizer.name_or_path}` leaves out the system message of {where}, so that no "
                    "model reads any. Put it into the prompt, or set `model.tokenizer` to one with another template.",
                    stacklevel=2,
                )
        return ids

    def messages(self, messages: list[Message], where: str = "a prompt") -> list[int]:
        """Return the token ids of a conversation, up to where the assistant's answer starts.

        Args:
            messages: The conversation.
            where: What it is, for error messages.

        Raises:
            MisconfigurationException: If the chat template raises, or a token is unknown to the model.
        """
        if self.tokenizer.chat_template is None:
            text = "\n\n".join(message["content"] for message in messages)
            return self._known([*self._before, *self.tokens(text)], where)
        try:
            ids = self.tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                enable_thinking=self.enable_thinking,
            )["input_ids"]
        except Exception as error:  # templates are programs
            _check_text("".join(str(message.get("content")) for message in messages), where)
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise MisconfigurationException(
                f"Expected the chat template of `{self.tokenizer.name_or_path}` to take the turns of {where} ({roles}), but it "
                f"raises {type(error).__name__}: {error}. Change the row, or set `model.tokenizer` to one with another template."
            ) from error
        return self._known(ids, where)

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of plain text, without any special token added."""
        try:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        except TypeError:
            _check_text(text, "a text")
            raise
        return self._known(ids, "a text")

    def text(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def answer(self, rollout: Rollout) -> str:
        """Return the text of a response without its thinking."""
        return self.thinking.remove(rollout.text, rollout.response_ids, rollout.prompt_ids)

    def know_rows(self, rows: int) -> None:
        """Take note of how many tokens the model knows.

        Args:
            rows: Of its embeddings and its head, whichever has less.

        Raises:
            MisconfigurationException: If the tokenizer's own vocabulary has more, or a prompt was encoded to more.
        """
        vocabulary, added = self.tokenizer.get_vocab(), self.tokenizer.get_added_vocab()
        named = {"pad_token": self.tokenizer.pad_token_id, "eos_token": self.tokenizer.eos_token_id}
        # Added tokens above the rows do no harm while no text has them: Gemma 3 has one for images.
        highest = max((i for token, i in vocabulary.items() if token not in added), default=-1)
        for name, place in (*named.items(), ("vocabulary", highest)):
            if place is not None and place >= rows:
                what = f"{len(vocabulary)} tokens up to number {place}" if name == "vocabulary" else f"`{name}` {place}"
                raise MisconfigurationException(
                    f"Expected the tokens of `{self.tokenizer.name_or_path}` to have rows in the model's embeddings, but it has "
                    f"{what}, and they have {rows} rows (0 to {rows - 1}). Set `model.tokenizer` to the model's own, or save the "
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
    """Raise if a text holds half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MisconfigurationException(
            f"Expected whole characters in {where}, but got the lone surrogate {text[error.start]!a} behind "
            f"{text[max(0, error.start - 20) : error.start]!a}. Take it out of the text."
        ) from None


def _put_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before a text, such as a beginning-of-sequence token.

    What it puts behind, such as an end-of-sequence token, must not stand before an answer.
    """
    plain = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    whole = tokenizer(QUESTION)["input_ids"]
    places = range(len(whole) - len(plain) + 1)
    return whole[: next((i for i in places if whole[i : i + len(plain)] == plain), 0)]
