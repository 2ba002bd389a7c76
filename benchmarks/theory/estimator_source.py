r"""An autoregressive source whose mutual information with its feedback is known, to check estimators against.

Feedback f is one of m, equally likely. Under feedback f the teacher puts the next token into the upper half of the vocabulary
with probability p_f, and within its half follows a bigram that does not depend on f. What a response says of f is therefore in
the number n of its upper tokens, and every expectation is a finite sum over t and n: nothing is simulated where a sum will do.

A student is a mixture of the teachers with weights from the prefix. With the posterior of f (``calibrated``) it is the
marginal over feedback, and the sum over a response of E[H(S) - H(T)] is the mutual information I(Y; F) of PGPO's Eq. 8
(arXiv 2606.03620), by the chain rule. The others are not calibrated.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

Pairing = Literal["own", "sibling"]
"""Which feedback the teacher of a response is shown: ``own``, drawn from what the response itself says of f, as a verifier's
remark on it would be; ``sibling``, independent of the response given the question, as a sibling's answer is."""

PAIRINGS: tuple[Pairing, ...] = ("own", "sibling")


@dataclass(frozen=True)
class Student:
    """How a student weighs the teachers: prior times likelihood of the prefix to some power.

    Attributes:
        trust: The power; 1 is Bayes, 0 never looks at the prefix.
        skew: The first feedback's prior is this many times as large as each other's; 1 is right.
    """

    trust: float = 1.0
    skew: float = 1.0


STUDENTS = {
    "calibrated": Student(),
    "ignores the prefix": Student(trust=0.0),
    "overconfident": Student(trust=3.0),
    "wrong prior": Student(skew=9.0),
}
"""A calibrated student, and three that are not."""


class Values(NamedTuple):
    """Means per token over an endless batch, in nats: of the three estimators, and the mutual information that there is."""

    entropy_difference: float
    kl: float
    log_ratio: float
    information: float


class Sample(NamedTuple):
    """Sequences with both distributions at every token.

    Attributes:
        student: Log-probabilities, shape ``(N * length, V)``.
        teacher: Likewise.
        tokens: What was sampled, shape ``(N * length,)``.
    """

    student: Tensor
    teacher: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Source:
    """The source.

    Attributes:
        chances: p_f of each feedback, strictly between 0 and 1.
        vocabulary: V, even.
        exponent: Exponent of the power law within a half: the larger, the shorter the tail.
    """

    chances: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    vocabulary: int = 64
    exponent: float = 1.2

    def log_likelihood(self, tokens: int) -> Array:
        """Return log p(prefix | f) but for what f does not change, for n = 0 ... tokens: ``(tokens + 1, m)``."""
        n, p = np.arange(tokens + 1)[:, None], np.array(self.chances)
        return n * np.log(p) + (tokens - n) * np.log1p(-p)

    def weights(self, student: Student, tokens: int) -> Array:
        """Return the student's weights of the teachers after a prefix: ``(tokens + 1, m)``."""
        prior = np.ones(len(self.chances))
        prior[0] = student.skew
        return _normalised(np.log(prior) + student.trust * self.log_likelihood(tokens))

    def upper(self, student: Student, tokens: int) -> Array:
        """Return the student's probability of an upper token after a prefix: ``(tokens + 1,)``."""
        return self.weights(student, tokens) @ np.array(self.chances)

    def feedback(self, student: Student, pairing: Pairing, length: int) -> list[Array]:
        """Return the law of the feedback given a prefix, for every t = 0 ... length: ``(t + 1, m)`` each.

        The response goes on as the student samples it.
        """
        m = len(self.chances)
        if pairing == "sibling":
            return [np.full((t + 1, m), 1 / m) for t in range(length + 1)]
        laws = [_normalised(self.log_likelihood(length))]
        for t in reversed(range(length)):
            s = self.upper(student, t)[:, None]
            laws.append(s * laws[-1][1:] + (1 - s) * laws[-1][:-1])
        return laws[::-1]

    def expectations(self, student: Student, pairing: Pairing, length: int) -> Values:
        """Return exact means per token, with responses sampled by the student.

        Args:
            student: Who samples.
            pairing: Which feedback the teacher sees.
            length: Tokens of a response.
        """
        p = np.array(self.chances)
        laws = self.feedback(student, pairing, length)
        reached = np.ones(1)  # probability of n upper tokens in the prefix
        entropy = kl = ratio = 0.0
        for t in range(length):
            s = self.upper(student, t)
            given_f = reached[:, None] * laws[t]  # (t + 1, m)
            entropy += (given_f * (_entropy(s)[:, None] - _entropy(p))).sum()
            up, down = np.log(p / s[:, None]), np.log((1 - p) / (1 - s[:, None]))
            kl += (given_f * (p * up + (1 - p) * down)).sum()
            rises, stays = reached * s, reached * (1 - s)
            ratio += (rises[:, None] * laws[t + 1][1:] * up + stays[:, None] * laws[t + 1][:-1] * down).sum()
            reached = np.append(stays, 0) + np.append(0, rises)
        feedback = reached @ laws[-1]
        information = _many(feedback) - reached @ _many(laws[-1])
        return Values(*(float(total) / length for total in (entropy, kl, ratio, information)))

    def mutual_information(self, length: int) -> float:
        """Return I(Y; F) of responses that the teachers write (nats, of the whole response): at most log m."""
        return self.expectations(STUDENTS["calibrated"], "own", length).information * length

    def sample(self, student: Student, pairing: Pairing, length: int, sequences: int, seed: int) -> Sample:
        """Sample responses as the student does, their feedback, and both distributions.

        Args:
            student: Who samples.
            pairing: Which feedback the teacher sees.
            length: Tokens of a response.
            sequences: Number of responses.
            seed: Seed of the draws.
        """
        rng = np.random.default_rng(seed)
        half = self.vocabulary // 2
        base = 1 / (1 + np.arange(half)) ** self.exponent
        base /= base.sum()
        n, last = np.zeros(sequences, dtype=int), np.zeros(sequences, dtype=int)
        chance, lasts, tokens = [], [], []
        for t in range(length):
            chance.append(self.upper(student, t)[n])
            lasts.append(last)
            up = rng.random(sequences) < chance[-1]
            last = up * half + (rng.choice(half, sequences, p=base) + last) % half
            tokens.append(last)
            n = n + up
        law = self.feedback(student, pairing, length)[-1][n].cumsum(axis=1)
        f = np.minimum((rng.random((sequences, 1)) > law).sum(axis=1), len(self.chances) - 1)
        order = np.stack(lasts, axis=1).reshape(-1)
        # The bigram: a shift of one power law by the token before, so that its entropy is always the same.
        within = np.log(base)[(np.arange(half) - order[:, None]) % half]  # (N * length, V / 2)
        students = _joined(np.stack(chance, axis=1).reshape(-1), within)
        teachers = _joined(np.array(self.chances)[f].repeat(length), within)
        return Sample(students, teachers, torch.from_numpy(np.stack(tokens, axis=1).reshape(-1)))


def _joined(upper: Array, within: Array) -> Tensor:
    log_p = np.concatenate([np.log1p(-upper)[:, None] + within, np.log(upper)[:, None] + within], axis=1)
    return torch.from_numpy(log_p)


def _normalised(log_weights: Array) -> Array:
    weights = np.exp(log_weights - log_weights.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _entropy(p: Array) -> Array:
    return -p * np.log(p) - (1 - p) * np.log1p(-p)


def _many(p: Array) -> Array:
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)
