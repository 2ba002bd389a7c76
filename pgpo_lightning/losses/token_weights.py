"""How much of a step each token or response gets, by its information: what PGPO (arXiv 2606.03620) leaves to future work.

PGPO scales the whole step. Here the size of the step stays what it is, and its parts share it: weights
``exp(sensitivity * I)`` of tokens or responses, divided by their mean. So allocation and dose can be told apart. The weights of
DW-SDPO (SRPO, arXiv 2604.02288) are of the same kind: they trust the teacher where it is certain.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from pgpo_lightning.core.settings import AtLeastOne, checked
from pgpo_lightning.losses.fused import TokenStatistics


@partial(checked, prefix="allocation.")
@dataclass(frozen=True)
class Allocation:
    """Weights of tokens or responses within a step.

    Args:
        unit: ``token``: I is that of the token; ``sequence``: its mean over the response, which costs two more products with
            each head.
        sensitivity: Of the weight to I; 0 gives every token the same.
        maximum: Bound of a weight before the division by the mean, at least 1; its reciprocal bounds it from below. Null for
            no bounds.
        signal: What I is: ``information``, H(student) - H(teacher), or ``teacher-certainty``, -H(teacher); with the latter,
            `sensitivity` 1 and no `maximum`, this is DW-SDPO.

    Raises:
        ValueError: If a setting is out of range.
    """

    unit: Literal["token", "sequence"] = "token"
    sensitivity: float = 1.0
    maximum: AtLeastOne | None = 5.0
    signal: Literal["information", "teacher-certainty"] = "information"

    def weights(self, tokens: TokenStatistics, lengths: Tensor | None = None) -> Tensor:
        """Return weights, shape ``(n,)``, without gradient, not yet divided by their mean.

        Args:
            tokens: Of some tokens; for the unit ``sequence`` of whole responses, one after the other.
            lengths: Tokens of each response, for that unit.
        """
        information = -tokens.entropy_teacher.detach()
        if self.signal == "information":
            information = information + tokens.entropy_student.detach()
        if self.unit == "sequence":
            of = torch.arange(len(lengths), device=lengths.device)
            of = of.repeat_interleave(lengths, output_size=information.numel())
            sums = torch.zeros(len(lengths), dtype=information.dtype, device=lengths.device).index_add(
                0, of, information
            )
            information = (sums / lengths)[of]
        # exp() of more than 80 overflows; the bound holds anyway.
        weights = (self.sensitivity * information).clamp(-80, 80).exp()
        return weights if self.maximum is None else weights.clamp(1 / self.maximum, self.maximum)


def question_weights(rates: Tensor, everyone: Tensor, exponent: float) -> Tensor:
    """Return SC-SDPO's weights of questions (arXiv 2605.27765): most for those that are answered half of the time.

    ``(p (1 - p))^exponent``, divided by its mean over the questions of the step with 0 < p < 1; 0 for the others.

    Args:
        rates: p, the share of successes, of this rank's questions, shape ``(questions,)``.
        everyone: That of all ranks' questions.
        exponent: The paper's a.

    Returns:
        Shape ``(questions,)``.

    Example:
        >>> rates = torch.tensor([0.5, 0.1, 1.0])
        >>> question_weights(rates, rates, 0.5)
        tensor([1.2500, 0.7500, 0.0000])
    """
    mixed = everyone[(everyone > 0) & (everyone < 1)]
    mean = (mixed * (1 - mixed)).pow(exponent).mean()
    return torch.where((rates > 0) & (rates < 1), (rates * (1 - rates)).pow(exponent) / mean, 0.0)
