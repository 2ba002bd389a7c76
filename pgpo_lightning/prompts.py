"""Chat messages to prompt token ids, the same way for student and teacher."""

from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import PreTrainedTokenizerBase

from pgpo_lightning.records import Message, Question


class PromptEncoder:
    """Encodes conversations with the tokenizer's chat template, thinking mode always explicit.

    A tokenizer without a chat template is fine for plain text: its turns are joined by blank lines.

    Args:
        tokenizer: Of the policy.
        enable_thinking: Handed to the chat template, which may ignore it. Qwen3's opens an empty think block if false.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, enable_thinking: bool) -> None:
        self.tokenizer = tokenizer
        self.enable_thinking = enable_thinking

    def question(self, question: Question) -> list[int]:
        """Return the student's prompt.

        Raises:
            MisconfigurationException: If the question is a list of messages and the tokenizer has no chat template.
        """
        if not isinstance(question.prompt, str) and self.tokenizer.chat_template is None:
            raise MisconfigurationException(
                f"Expected a tokenizer with a chat template, because the prompt of {question.source or question.index} is a "
                f"list of messages, but `{self.tokenizer.name_or_path}` has none. Give prompts as text, or set "
                "`model.tokenizer` to one with a template."
            )
        return self.messages(question.messages())

    def messages(self, messages: list[Message]) -> list[int]:
        """Return the token ids of a conversation, up to where the assistant's answer starts."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"]
        return self.tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            enable_thinking=self.enable_thinking,
        )["input_ids"]

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of plain text, without any special token added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def text(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)
