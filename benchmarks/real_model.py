"""Short rules for a real model, as chat turns of a few examples and a question, and supervised steps to compare with.

A rule such as "the last of three words" is shown by examples alone. Training, tuning and held-out questions are disjoint: the
same words or numbers in another order are in the same split. `configs/real_model.yaml` uses these classes.
"""

import random
from collections.abc import Callable
from typing import Any, Literal

from pgpo_lightning import OnPolicyModule, PolicyGradientObjective, QuestionData
from pgpo_lightning.core.settings import Count, Natural, checked
from pgpo_lightning.core.types import Question, Sample
from pgpo_lightning.data.toy import stable_hash
from pgpo_lightning.training.objective import Preparation


def _words(text: str) -> list[str]:
    return text.split()


VERBS = _words(
    "walk jump play call talk look work help ask turn open visit offer listen answer paint count wait need want start end "
    "add land plant learn clean cook wash watch pull push kick pick fill miss pass dress cross reach touch guess mix fix "
    "carry study cry try marry worry copy hurry reply apply move like love use live change close dance smile bake hope save "
    "race share taste vote wipe blame stop plan drop shop clap rub beg hug nod trip grab chat step slip tap wrap zip"
)
DOUBLED = _words("stop plan drop shop clap rub beg hug nod trip grab chat step slip tap wrap zip")
NOUNS = _words(
    "city baby lady story party berry fly army country family fox box bus glass dish church brush class dress bench wife "
    "leaf wolf knife life half shelf thief dog cat tree car book pen cup hat key toy boy day cow table house river cloud "
    "stone road lamp door"
)
WORDS = _words(
    "red dog cup sun tree book rain fish hat moon car bird milk door leaf star king shoe gold salt wind road ship bell"
)


def past(verb: str) -> str:
    """Return the past tense of a regular verb.

    Example:
        >>> past("walk"), past("bake"), past("carry"), past("stop")
        ('walked', 'baked', 'carried', 'stopped')
    """
    if verb.endswith("e"):
        return f"{verb}d"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return f"{verb[:-1]}ied"
    return f"{verb}{verb[-1] if verb in DOUBLED else ''}ed"


def plural(noun: str) -> str:
    """Return the plural of a noun of the list.

    Example:
        >>> plural("city"), plural("fox"), plural("knife"), plural("leaf"), plural("day")
        ('cities', 'foxes', 'knives', 'leaves', 'days')
    """
    if noun.endswith("fe"):
        return f"{noun[:-2]}ves"
    if noun.endswith("f"):
        return f"{noun[:-1]}ves"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}{'es' if noun.endswith(('s', 'x', 'sh', 'ch')) else 's'}"


def _numbers(rng: random.Random, n: int, low: int = 10, high: int = 99) -> list[int]:
    return rng.sample(range(low, high + 1), n)


def _of(draw: Callable[[random.Random], list[Any]], answer: Callable[[list[Any]], Any], sign: str = " ") -> Any:
    """Return a function that draws the parts of a question and returns question and answer."""

    def rule(rng: random.Random) -> tuple[str, str]:
        parts = draw(rng)
        told = answer(parts)
        return sign.join(map(str, parts)), " ".join(map(str, told)) if isinstance(told, list) else str(told)

    return rule


RULES: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "larger": _of(lambda r: _numbers(r, 2), max),
    "largest of three": _of(lambda r: _numbers(r, 3), max),
    "sort two": _of(lambda r: _numbers(r, 2), sorted),
    "sort three digits": _of(lambda r: _numbers(r, 3, 1, 9), sorted),
    "reverse three digits": _of(lambda r: _numbers(r, 3, 1, 9), lambda a: a[::-1]),
    "add digits": _of(lambda r: [r.randint(1, 9), r.randint(1, 9)], sum, " + "),
    "add": _of(lambda r: [r.randint(10, 49), r.randint(10, 49)], sum, " + "),
    "next number": _of(lambda r: [r.randint(10, 998)], lambda a: a[0] + 1),
    "previous number": _of(lambda r: [r.randint(10, 998)], lambda a: a[0] - 1),
    "even or odd": _of(lambda r: [r.randint(10, 998)], lambda a: ("even", "odd")[a[0] % 2]),
    "past tense": _of(lambda r: [r.choice(VERBS)], lambda a: past(a[0])),
    "plural": _of(lambda r: [r.choice(NOUNS)], lambda a: plural(a[0])),
    "capitals": _of(lambda r: [r.choice(VERBS)], lambda a: a[0].upper()),
    "last word": _of(lambda r: r.sample(WORDS, 3), lambda a: a[-1]),
    "middle word": _of(lambda r: r.sample(WORDS, 3), lambda a: a[1]),
    "swap words": _of(lambda r: r.sample(WORDS, 2), lambda a: a[::-1]),
    "reverse words": _of(lambda r: r.sample(WORDS, 3), lambda a: a[::-1]),
}
"""Name to a function that draws a question and its answer."""

Split = Literal["train", "tuning", "held-out"]


def part(question: str) -> Split:
    """Return the split of a question: held out and tuning have a sixth each. The order of its words makes no difference.

    Example:
        >>> part("48 93") == part("93 48")
        True
    """
    names: list[Split] = ["held-out", "tuning", "train", "train", "train", "train"]
    return names[stable_hash(" ".join(sorted(question.split()))) % 6]


def rows(
    rule: str, shots: int, split: Split, size: int, draw: int = 0
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the examples of a rule, which belong to no split, and at most `size` different questions with their answers."""
    rng = random.Random(f"{rule}/{draw}")
    drawn = dict(RULES[rule](rng) for _ in range(40 * size + 1000))
    pairs = list(drawn.items())
    return pairs[:shots], [pair for pair in pairs[shots:] if part(pair[0]) == split][:size]


@checked
class Rule(QuestionData):
    """Questions of a rule as conversations: an empty system message, a few examples as turns, the question.

    Args:
        rule: A key of :data:`RULES`.
        shots: Number of examples.
        tuning: Validate on the tuning questions, in place of the held-out ones.
        size: Questions of a split, or as many as there are.
        draw: Other numbers give other examples and questions.
        **kwargs: Batch sizes, seed and limits, see :class:`QuestionData`.

    Raises:
        ValueError: If there is no such rule.
    """

    def __init__(
        self,
        rule: str = "last word",
        shots: Count = 2,
        tuning: bool = False,
        size: Count = 400,
        draw: Natural = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if rule not in RULES:
            raise ValueError(f"Expected `rule` to be among {', '.join(RULES)}, but got {rule}.")
        self.rule, self.shots, self.tuning, self.size, self.draw = rule, shots, tuning, size, draw

    def load(self, split: str) -> list[Question]:
        """Return the questions of a split; `test` has the held-out ones. The column `solution` holds the answer."""
        tuned: Split = "tuning" if self.tuning and split == "validation" else "held-out"
        examples, pairs = rows(self.rule, self.shots, "train" if split == "train" else tuned, self.size, self.draw)
        turns = [{"role": "system", "content": ""}]
        for asked, told in examples:
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
        return [
            Question([*turns, {"role": "user", "content": asked}], told, index=i, columns={"solution": told})
            for i, (asked, told) in enumerate(pairs)
        ]


def exact(question: Question, response: str) -> float:
    """Return 1 for a response that is the answer, whatever the white space around it, else 0."""
    return float(response.strip() == question.answer)


class CorrectSamples(PolicyGradientObjective):
    """Supervised learning on the student's own correct answers: GRPO's loss with advantage 1, and 0 for failures."""

    def __init__(self, threshold: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = threshold

    def prepare(self, samples: list[Sample], given: Preparation) -> dict[str, float]:
        """See :class:`PolicyGradientObjective`."""
        scalars = super().prepare(samples, given)
        for sample in samples:
            sample.advantage = float(sample.verdict.reward >= self.threshold)
        return scalars


@checked
class Supervised(OnPolicyModule):
    """Samples as GRPO does, and learns correct answers as examples (rejection sampling fine-tuning).

    Args:
        **kwargs: The arguments of :class:`OnPolicyModule`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = CorrectSamples(
            self.reward.success_threshold,
            num_generations=self.num_generations,
            updates=self.update.steps_per_batch,
        )
