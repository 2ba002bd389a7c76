"""What every way of decoding is built on: the logits of the next token, and an interface of responses while they grow."""

import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from pgpo_lightning.models.lm_head import decoder
from pgpo_lightning.models.sampling_weights import wide_logits


class Decoding(ABC):
    """Responses to some prompts while they grow. Responses to the same prompt are adjacent.

    Attributes:
        logits: Logits of the next token of every response, shape ``(responses, V)``.
    """

    logits: Tensor

    @abstractmethod
    def append(self, tokens: Tensor) -> None:
        """Append a token to each response, ``(responses,)``, and set :attr:`logits` for the token after it."""

    @abstractmethod
    def keep(self, rows: list[int]) -> None:
        """Keep only the responses with these indices. Logits are undefined until the next :meth:`append`."""

    def join(self, responses: list[int]) -> None:
        """Start the next responses, indices among all. Their :attr:`logits` come after those of the others.

        Raises:
            NotImplementedError: If this decoding starts all responses at once.
        """
        raise NotImplementedError


class NextToken:
    """Logits of the next token, ``(sequences, V)``: the model's own or, where those are in 16 bits, fp32 ones."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.wide = wide_logits(model)
        self.run = model if self.wide is None else decoder(model)
        self.known = inspect.signature(self.run.forward).parameters

    def __call__(self, ids: Tensor, positions: Tensor, mask: Any, cache: Cache) -> Tensor:
        """Run the model on token ids, with those of the other inputs that it knows.

        Args:
            ids: ``(sequences, tokens)``.
            positions: Of the same shape.
            mask: The attention mask, in a form that the model takes.
            cache: Of earlier tokens; it takes up these.
        """
        inputs: dict[str, Any] = {
            "attention_mask": mask,
            "position_ids": positions,
            "cache_params" if "cache_params" in self.known else "past_key_values": cache,
        }
        inputs = {name: value for name, value in inputs.items() if name in self.known} | {"use_cache": True}
        if self.wide is not None:
            return self.wide(self.run(input_ids=ids, **inputs).last_hidden_state[:, -1])
        few = {"logits_to_keep": 1} if "logits_to_keep" in self.known else {}
        return self.run(input_ids=ids, **inputs, **few).logits[:, -1]


def padded_prompts(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return prompts in one tensor, padded on the left, so that all responses begin in the same column.

    Args:
        prompts: Token ids.
        device: Where they are wanted.

    Returns:
        Token ids, positions, and the mask (null without padding), ``(prompts, longest)`` each.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    padding = torch.tensor([[width - len(prompt)] for prompt in prompts], device=device)
    columns = torch.arange(width, device=device)
    unequal = any(len(prompt) < width for prompt in prompts)
    return ids, (columns - padding).clamp(min=0), (columns >= padding).long() if unequal else None
