"""Rows to micro-batches: the one place where padding is decided."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pgpo_lightning.distillation import TokenStatistics
from pgpo_lightning.records import Row


def micro_batches(rows: list[Row], token_budget: int, length: Callable[[Row], int]) -> list[list[Row]]:
    """Group rows of similar length so that no group costs more than `token_budget` padded tokens.

    Args:
        rows: The rows of one optimizer step, in any order.
        token_budget: Most padded tokens of one forward pass. A single row that is longer makes a group of its own.
        length: The tokens that one row puts through its longest forward pass.

    Returns:
        Groups of rows, longest first, so that a run that is going to be out of memory is so at once.
    """
    groups: list[list[Row]] = []
    widest = 0
    for row in sorted(rows, key=length, reverse=True):
        if groups and (len(groups[-1]) + 1) * widest <= token_budget:
            groups[-1].append(row)
        else:
            groups.append([row])
            widest = length(row)
    return groups


@dataclass
class Sequences:
    """Prompts with their responses, padded on the right, and where the responses are.

    Padding on the right needs no attention mask: in a causal model no real token ever looks at what follows it.

    Attributes:
        input_ids: Shape ``(rows, longest)``, int64.
        row: For every response token, its row; shape ``(N,)``.
        position: For every response token, the position whose output predicts it; shape ``(N,)``.
        targets: The response tokens, the rows one after the other; shape ``(N,)``.
        lengths: Response tokens of each row, shape ``(rows,)``.
    """

    input_ids: Tensor
    row: Tensor
    position: Tensor
    targets: Tensor
    lengths: Tensor

    @classmethod
    def pack(cls, pairs: list[tuple[list[int], list[int]]], pad_id: int, device: torch.device) -> "Sequences":
        """Lay out (prompt, response) pairs of token ids.

        Args:
            pairs: At least one pair; prompts and responses are not empty.
            pad_id: Any valid token id.
            device: Where the tensors are to live.
        """
        longest = max(len(prompt) + len(response) for prompt, response in pairs)
        ids = torch.full((len(pairs), longest), pad_id)
        row, position, targets = [], [], []
        for i, (prompt, response) in enumerate(pairs):
            ids[i, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
            row.append(torch.full((len(response),), i))
            position.append(torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1))
            targets.append(torch.tensor(response))
        lengths = torch.tensor([len(response) for _, response in pairs])
        parts = (ids, torch.cat(row), torch.cat(position), torch.cat(targets), lengths)
        return cls(*(part.to(device) for part in parts))


@dataclass
class TokenInputs:
    """What is known about each response token before the forward pass; shape ``(N,)`` each, fp32.

    Attributes:
        sampler: Log-probability under the sampler (nats).
        coefficient: Factor of the token's loss in the loss of the step.
        advantage: Of its response.
        old: Log-probability under the policy before the first of several updates; ``None`` where that is the current one.
    """

    sampler: Tensor
    coefficient: Tensor
    advantage: Tensor
    old: Tensor | None

    @classmethod
    def of(cls, rows: list[Row], lengths: Tensor, scale: float, by_sequence: bool) -> "TokenInputs":
        """Collect what the rows know.

        Args:
            rows: In the order of the packed sequences.
            lengths: Their response tokens, shape ``(rows,)``, on the device of the model.
            scale: Factor of a sequence's mean over its tokens, or of a token.
            by_sequence: Which of the two.
        """
        device = lengths.device
        sampler = torch.cat([row.rollout.log_probs for row in rows]).to(device)

        def spread(values: Tensor) -> Tensor:
            return values.repeat_interleave(lengths, output_size=sampler.numel())

        coefficient = (
            scale / lengths if by_sequence else torch.full(lengths.shape, scale, dtype=torch.float32, device=device)
        )
        advantage = torch.tensor([row.advantage for row in rows], dtype=torch.float32, device=device)
        known = rows[0].old_log_probs is not None
        old = torch.cat([row.old_log_probs for row in rows]).to(device) if known else None
        return cls(sampler, spread(coefficient), spread(advantage), old)

    def __getitem__(self, part: slice) -> "TokenInputs":
        """Return the same for some of the tokens."""
        old = None if self.old is None else self.old[part]
        return TokenInputs(self.sampler[part], self.coefficient[part], self.advantage[part], old)

    def old_log_probs(self, tokens: TokenStatistics) -> Tensor:
        """Return log-probabilities under the policy that the batch was sampled from, as the trainer sees it."""
        return tokens.log_p_student.detach() if self.old is None else self.old


def shares(rows: list[Row], count: int) -> Iterator[list[Row]]:
    """Split rows into `count` shares for that many updates, whole questions each, in the order of the batch.

    Raises:
        ValueError: If there are fewer questions than shares.
    """
    questions = list(dict.fromkeys(row.rollout.question.index for row in rows))
    if len(questions) < count:
        raise ValueError(
            f"Expected at least one question for each of {count} updates, but the batch has {len(questions)}."
        )
    for i in range(count):
        mine = set(questions[i * len(questions) // count : (i + 1) * len(questions) // count])
        yield [row for row in rows if row.rollout.question.index in mine]
