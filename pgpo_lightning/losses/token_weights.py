"""Per-token and per-sequence loss weights from information gain, and per-question weights from success rates.

PGPO (arXiv 2606.03620) scales the whole step and leaves weights within a step to future work. Here the size of the step is
unchanged: tokens or responses get weights ``exp(sensitivity * I)``, divided by their mean. So the effects of allocation and of
dose can be separated. The weights of DW-SDPO (SRPO, arXiv 2604.02288) have the same form: they are large where the teacher is
certain.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from pgpo_lightning.core.settings import AtLeastOne, checked
from pgpo_lightning.losses.fused import TokenStatistics


@partial(checked, prefix="token_weights.")
@dataclass(frozen=True)
class TokenWeights:
    """Weights of tokens or responses within a step.

    Args:
        unit: ``token``: I of each token. ``sequence``: the mean of I over the response, which costs one more product with each
            head.
        sensitivity: How fast the weight grows with I; 0 gives equal weights.
        maximum: Upper bound of a weight before the division by the mean, at least 1. Its reciprocal is the lower bound. Null for
            no bounds.
        signal: What I is: ``information``, H(student) - H(teacher), or ``teacher-certainty``, -H(teacher). The latter with
            `sensitivity` 1 and no `maximum` is DW-SDPO.

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
            tokens: Statistics of ``n`` tokens; for the unit ``sequence`` those of whole responses, one after the other.
            lengths: Tokens of each response, for the unit ``sequence``.

        Raises:
            ValueError: If the unit is ``sequence`` and there are no lengths.
        """
        information = -tokens.entropy_teacher.detach()
        if self.signal == "information":
            information = information + tokens.entropy_student.detach()
        if self.unit == "sequence":
            if lengths is None:
                raise ValueError("Expected `lengths` for the unit `sequence`, but got None.")
            sequence = torch.arange(len(lengths), device=lengths.device)
            sequence = sequence.repeat_interleave(lengths, output_size=information.numel())
            sums = torch.zeros(len(lengths), dtype=information.dtype, device=lengths.device)
            information = (sums.index_add(0, sequence, information) / lengths)[sequence]
        # exp() overflows above 80.
        weights = (self.sensitivity * information).clamp(-80, 80).exp()
        return weights if self.maximum is None else weights.clamp(1 / self.maximum, self.maximum)


def question_weights(rates: Tensor, everyone: Tensor, exponent: float) -> Tensor:
    """Return SC-SDPO's weights of questions (arXiv 2605.27765), largest for a success rate of one half.

    ``(p (1 - p))^exponent``, divided by its mean over the questions of the step with 0 < p < 1; 0 for the others.

    Args:
        rates: p, the success rate of each question of this rank, shape ``(questions,)``.
        everyone: The success rates of all ranks' questions, shape ``(all questions,)``.
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
