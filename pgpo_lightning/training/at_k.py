r"""Metrics over several samples per question: avg@k, pass@k, majority@k, lengths.

Samples are grouped by the index of their question. So the order of the samples and their distribution over ranks do not matter,
and a question that a distributed sampler repeats to pad ranks counts once. If its samples are repeated too, drop them before the
update: as additional samples they would count in pass@k and in the majority.
"""

import hashlib
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

_NO_ANSWER = -1


class PerQuestionMean(Metric):
    r"""Mean over questions of the mean over the samples of each question.

    .. math:: \frac{1}{|Q|} \sum_{q \in Q} \frac{1}{n_q} \sum_{i=1}^{n_q} v_{q,i}

    ``update`` takes ``question`` (``(N,)``, int64, the question of each sample) and ``value`` (``(N,)``). ``compute`` returns a
    scalar, NaN before the first update. Subclasses override :meth:`per_question`.

    Example:
        >>> metric = PerQuestionMean()
        >>> metric.update(torch.tensor([7, 7, 9]), torch.tensor([0.0, 1.0, 1.0]))
        >>> metric.compute(), metric.standard_error()
        (tensor(0.7500), tensor(0.2500))
    """

    is_differentiable = False
    full_state_update = False
    question: list[Tensor]
    value: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("question", default=[], dist_reduce_fx="cat")
        self.add_state("value", default=[], dist_reduce_fx="cat")

    def update(self, question: Tensor, value: Tensor) -> None:
        """Add samples.

        Args:
            question: Index of each sample's question, shape ``(N,)``.
            value: Value of each sample, shape ``(N,)``.

        Raises:
            ValueError: If the two are not vectors of the same length.
        """
        if question.ndim != 1 or question.shape != value.shape:
            raise ValueError(
                "Expected `question` and `value` to be vectors of the same length, "
                f"but got shapes {tuple(question.shape)} and {tuple(value.shape)}."
            )
        self.question.append(question.to(torch.int64))
        self.value.append(value.to(torch.float32))

    def compute(self) -> Tensor:
        """Return the mean over questions."""
        scores = self.per_question()
        mean = math.fsum(scores) / len(scores) if scores else math.nan
        return torch.tensor(mean, dtype=torch.float32, device=self.device)

    def standard_error(self) -> Tensor:
        r"""Return the standard error of the mean, clustered by question; NaN with fewer than two questions.

        Samples of one question are correlated, so only the questions' scores :math:`s_q` vary independently:
        :math:`\sqrt{\operatorname{Var}(s_q) / |Q|}`. It covers the samples of this process; with several, gather them before.
        """
        scores = self.per_question()
        error = math.sqrt(statistics.variance(scores) / len(scores)) if len(scores) > 1 else math.nan
        return torch.tensor(error, dtype=torch.float32, device=self.device)

    def per_question(self) -> list[float]:
        """Return the score of every question."""
        question, value = self._gathered("question").to(torch.int64), self._gathered("value")
        unique, group, count = question.unique(return_inverse=True, return_counts=True)
        total = torch.zeros(len(unique), dtype=torch.float64, device=value.device)
        total.index_add_(0, group, value.double())  # (questions,)
        return (total / count).tolist()

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all ranks."""
        # torchmetrics gives a rank without samples an empty float32 state. Gathered with the int64 states of other ranks, the
        # bytes would be interpreted as the wrong type.
        for name, dtype in self._dtypes().items():
            if isinstance(state := getattr(self, name), list) and not state:
                setattr(self, name, [torch.zeros(0, dtype=dtype, device=self.device)])
        super().sync(*args, **kwargs)

    def _dtypes(self) -> dict[str, torch.dtype]:
        return {name: torch.float32 if name == "value" else torch.int64 for name in self._defaults}

    def _gathered(self, name: str) -> Tensor:
        state = getattr(self, name)
        return torch.zeros(0, device=self.device) if isinstance(state, list) and not state else dim_zero_cat(state)

    def _samples(self, *names: str) -> dict[int, list[tuple[Any, ...]]]:
        """Return the samples of each question in the order of their arrival."""
        samples = defaultdict(list)
        for question, *values in zip(*(self._gathered(name).tolist() for name in ("question", *names)), strict=True):
            samples[int(question)].append(tuple(values))
        return samples


class AvgAtK(PerQuestionMean):
    """Mean reward, "avg@k" with k samples per question: ``value`` is the reward of each sample."""

    higher_is_better = True


class MeanLength(PerQuestionMean):
    """Mean length of the responses: ``value`` is the number of tokens of each, end-of-sequence included."""


class CutOffFraction(PerQuestionMean):
    """Fraction of responses that were truncated at the length limit: ``value`` is 1 for those and 0 for the others."""

    higher_is_better = False


class PassAtK(PerQuestionMean):
    r"""Probability that at least one of ``k`` samples succeeds, estimated without bias from ``n >= k`` samples.

    .. math:: \frac{1}{|Q|} \sum_{q \in Q} 1 - \binom{n_q - c_q}{k} \Big/ \binom{n_q}{k}

    Args:
        k: Number of attempts.
        threshold: A sample with at least this ``value`` is one of the :math:`c_q` successes.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``k`` is smaller than 1, or, in ``per_question``, if a question has fewer than ``k`` samples.

    Example:
        >>> metric = PassAtK(k=2)
        >>> metric.update(torch.tensor([0, 0, 0]), torch.tensor([1.0, 0.0, 0.0]))
        >>> metric.compute()
        tensor(0.6667)
    """

    higher_is_better = True

    def __init__(self, k: int, threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"Expected argument `k` to be at least 1, but got {k}.")
        self.k = k
        self.threshold = threshold

    def per_question(self) -> list[float]:
        """Return the score of every question."""
        scores = []
        threshold = torch.tensor(self.threshold, dtype=torch.float32).item()  # rounded as the values were
        for question, samples in self._samples("value").items():
            n, failures = len(samples), sum(value < threshold for (value,) in samples)
            if n < self.k:
                raise ValueError(f"Expected at least k={self.k} samples of question {question}, but got {n}.")
            # Integers are exact, also where the two binomials are huge or nearly equal.
            scores.append((math.comb(n, self.k) - math.comb(failures, self.k)) / math.comb(n, self.k))
        return scores


class MajorityAtK(PerQuestionMean):
    """Reward of the most frequent answer to each question, "majority@k" with k samples per question.

    Ties are broken in favour of the earliest sample, in the order of ranks. Samples without an answer have no vote. A question
    without votes scores 0.

    Example:
        >>> metric = MajorityAtK()
        >>> metric.update(torch.tensor([0, 0, 0]), torch.tensor([0.0, 1.0, 1.0]), ["7", "8", "8"])
        >>> metric.compute()
        tensor(1.)
    """

    higher_is_better = True
    answer: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("answer", default=[], dist_reduce_fx="cat")

    def update(self, question: Tensor, value: Tensor, answers: Sequence[str | None]) -> None:  # type: ignore[override]
        """Add samples.

        Raises:
            ValueError: If the three do not have one length.
        """
        if len(answers) != len(question):
            raise ValueError(f"Expected one answer per sample ({len(question)}), but got {len(answers)}.")
        super().update(question, value)
        votes = [_NO_ANSWER if answer is None else _stable_hash(answer) for answer in answers]
        self.answer.append(torch.tensor(votes, dtype=torch.int64, device=value.device))

    def per_question(self) -> list[float]:
        """Return the score of every question."""
        scores = []
        for samples in self._samples("answer", "value").values():
            votes = Counter(answer for answer, _ in samples if answer != _NO_ANSWER)
            winner = max(votes, key=votes.__getitem__, default=None)  # the first of several
            scores.append(next((value for answer, value in samples if answer == winner), 0.0))
        return scores


def _stable_hash(text: str) -> int:
    """Return a hash of 63 bits that is the same on every rank, unlike Python's ``hash``."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
