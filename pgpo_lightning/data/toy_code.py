r"""The embedded programming task: ambiguous questions whose tests say what was meant, on a CPU and without a download.

Every question asks for a program of three lines that reads integers, orders them and changes each. The words for each of the
two steps can be read in several ways, as those of real questions can. What was meant is the same in all questions with the same
words. The model that belongs to the task, in ``pgpo_lightning/assets/toy_code``, knows how often a reading is meant, and can
infer from the verifier's feedback which one is. ``benchmarks/code_toy_base.py`` rebuilds it.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from pgpo_lightning.core.settings import checked
from pgpo_lightning.core.types import Question
from pgpo_lightning.data.questions import QuestionData
from pgpo_lightning.data.toy import stable_hash

BASE_CODE_MODEL = Path(__file__).parent.parent / "assets" / "toy_code"
"""Folder of the shipped base model and its tokenizer, in the format of transformers."""

ORDERS: dict[str, Callable[[list[int]], list[int]]] = {
    "sorted(a)": sorted,
    "sorted(a, reverse=True)": lambda a: sorted(a, reverse=True),
    "a[::-1]": lambda a: a[::-1],
}
"""Programs of the first step, each with its effect on the integers ``a``."""

CHANGES: dict[str, Callable[[int, int], int]] = {
    "x + {c}": lambda x, c: x + c,
    "x - {c}": lambda x, c: x - c,
    "x * {c}": lambda x, c: x * c,
}
"""Programs of the second step, each with its effect on one integer ``x`` and the constant ``c``."""

FAULTY = "a.sort()"
"""A first step that no question means: it gives ``None``, and the next line raises a TypeError."""

CONSTANTS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}
"""Values of ``c``, with the words for them in questions."""


@dataclass(frozen=True)
class Words:
    """The words for one step.

    Attributes:
        meant: The program that they mean.
        rate: How often the base model's examples read them so.
        misread: The other readings, the most frequent first: each gets twice as much of the rest as the next.
    """

    meant: str
    rate: float
    misread: tuple[str, ...]

    @property
    def rates(self) -> dict[str, float]:
        """Return every reading with its rate."""
        shares = [2.0**-place for place in range(len(self.misread))]
        rest = {each: (1 - self.rate) * share / sum(shares) for each, share in zip(self.misread, shares, strict=True)}
        return {self.meant: self.rate} | rest


UP, DOWN, BACK = ORDERS
PLUS, MINUS, TIMES = CHANGES

WORDS: tuple[dict[str, Words], dict[str, Words]] = (
    {
        "in order": Words(UP, 0.95, (FAULTY, DOWN, BACK)),
        "from the top": Words(DOWN, 0.9, (UP, BACK, FAULTY)),
        "turned round": Words(BACK, 0.85, (DOWN, UP, FAULTY)),
        "by size": Words(UP, 0.7, (FAULTY, DOWN, BACK)),
        "as a ranking": Words(DOWN, 0.6, (UP, BACK, FAULTY)),
        "from behind": Words(BACK, 0.4, (DOWN, UP, FAULTY)),
        "in steps": Words(UP, 0.25, (BACK, FAULTY, DOWN)),
        "back to front": Words(DOWN, 0.12, (BACK, UP, FAULTY)),
        "as a stack": Words(BACK, 0.06, (UP, DOWN, FAULTY)),
    },
    {
        "plus {c}": Words(PLUS, 0.95, (TIMES, MINUS)),
        "times {c}": Words(TIMES, 0.9, (PLUS, MINUS)),
        "minus {c}": Words(MINUS, 0.85, (PLUS, TIMES)),
        "lowered by {c}": Words(MINUS, 0.7, (PLUS, TIMES)),
        "scaled by {c}": Words(TIMES, 0.6, (PLUS, MINUS)),
        "raised by {c}": Words(TIMES, 0.4, (PLUS, MINUS)),
        "grown by {c}": Words(PLUS, 0.25, (TIMES, MINUS)),
        "moved by {c}": Words(PLUS, 0.12, (MINUS, TIMES)),
        "shifted by {c}": Words(MINUS, 0.06, (PLUS, TIMES)),
    },
)
"""The words for the two steps, from clear ones to ones that hardly ever are read as they are meant."""

VERY_HARD = 0.03
"""Very hard is what the rates of the words let succeed less often than this."""

COUNT, LARGEST, PUBLIC, HIDDEN = 4, 11, 3, 3
"""Integers of an input, the largest of them, and numbers of tests."""


class Readings(NamedTuple):
    """What stands in a program for the two steps, with `{c}` in place of the constant."""

    order: str
    change: str


def prompt(words: Sequence[str], c: int) -> str:
    """Return the text of a question.

    Args:
        words: For the two steps, keys of ``WORDS``.
        c: Constant of the second step.

    Example:
        >>> prompt(("in order", "plus {c}"), 3)
        'Read integers. Print them in order, each plus three.'
    """
    order, change = words
    return f"Read integers. Print them {order}, each {change}.".format(c=CONSTANTS[c])


def solution(readings: Readings, c: int) -> str:
    """Return the response with the program that has these readings.

    Example:
        >>> print(solution(Readings("sorted(a)", "x + {c}"), 3).replace("`", "'"))
        '''python
        a = list(map(int, input().split()))
        b = sorted(a)
        print(*[x + 3 for x in b])
        '''
    """
    first, last = f"b = {readings.order}", f"print(*[{readings.change} for x in b])".format(c=c)
    return f"```python\na = list(map(int, input().split()))\n{first}\n{last}\n```"


def output(readings: Readings, numbers: list[int], c: int) -> str:
    """Return what the program prints.

    Args:
        readings: Of its steps; not the faulty one, which prints nothing.
        numbers: The integers that it reads.
        c: Constant of the second step.
    """
    return " ".join(str(CHANGES[readings.change](x, c)) for x in ORDERS[readings.order](numbers))


def inputs(rng: random.Random, count: int) -> list[list[int]]:
    """Return inputs of tests, each of ``COUNT`` different integers from 1 to ``LARGEST``."""
    return [rng.sample(range(1, LARGEST + 1), COUNT) for _ in range(count)]


def held_out(words: Sequence[str]) -> bool:
    """Return whether questions with these words for the two steps are held out: a quarter of all, whatever their constant."""
    return stable_hash("/".join(words)) % 4 == 0


def rate(words: Sequence[str]) -> float:
    """Return how often both readings were right in the base model's examples."""
    order, change = words
    return WORDS[0][order].rate * WORDS[1][change].rate


def questions(split: str, very_hard: bool = False, hidden_tests: bool = False) -> list[Question]:
    """Return all questions of a split in a fixed, shuffled order: its first ``n`` are a fair sample of it.

    Args:
        split: ``"train"``; or ``"validation"`` or ``"test"``, which are both the held-out questions.
        very_hard: Only those whose words succeed in less than 3 % of the base model's examples.
        hidden_tests: Give training questions the hidden tests too, as the held-out questions have them.

    Raises:
        ValueError: If ``split`` does not exist.

    Example:
        >>> questions("test")[0].prompt
        'Read integers. Print them turned round, each scaled by six.'
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"Expected `split` to be 'train', 'validation' or 'test', but got {split!r}.")
    chosen = [words for words in product(*WORDS) if held_out(words) == (split != "train")]
    chosen = [words for words in chosen if not very_hard or rate(words) < VERY_HARD]
    rows = sorted(product(chosen, CONSTANTS), key=lambda row: stable_hash(str(row)))
    found = []
    for index, (words, c) in enumerate(rows):
        order, change = words
        meant = Readings(WORDS[0][order].meant, WORDS[1][change].meant)
        columns = {
            "tests": made_tests(words, meant, c, hidden_tests or split != "train"),
            "solution": solution(meant, c),
            "rate": rate(words),
        }
        source = f"toy programs {split}:{index}"
        found.append(Question(prompt(words, c), "", index=index, source=source, columns=columns))
    return found


def made_tests(words: Sequence[str], meant: Readings, c: int, hidden: bool) -> str:
    """Return the tests of a question as JSON.

    Args:
        words: Of the question.
        meant: The right readings.
        c: Constant of the second step.
        hidden: Whether to add the hidden tests, which feedback does not show.
    """
    drawn = inputs(random.Random(stable_hash(f"{words} {c}")), PUBLIC + HIDDEN)[: None if hidden else PUBLIC]
    record: dict[str, Any] = {
        "testtype": "stdin",
        "inputs": [" ".join(map(str, numbers)) for numbers in drawn],
        "outputs": [output(meant, numbers, c) for numbers in drawn],
        "time_limit": 1,
    }
    return json.dumps(record | ({"public": [i < PUBLIC for i in range(len(drawn))]} if hidden else {}))


@checked
class ToyPrograms(QuestionData):
    """The embedded programming task as a data module, for :class:`~pgpo_lightning.rewards.CodeExecution`.

    The column `tests` holds the tests of a question: three public ones in the training split; three public and three hidden ones
    in the others, whose words for the two steps do not occur together in training. The column `solution` holds the right program.

    Args:
        very_hard: Take only questions that the shipped base model was made to answer correctly in less than 3 % of samples.
        hidden_tests: Give training questions the hidden tests too. They then decide about the reward, and feedback still shows
            the public ones alone: for attempts at one question (`pgpo discover`).
        **kwargs: Batch sizes, seed and limits, see :class:`QuestionData`.
    """

    def __init__(self, very_hard: bool = False, hidden_tests: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.very_hard, self.hidden_tests = very_hard, hidden_tests

    def held_out_questions(self) -> int | None:
        """Return the number of validation questions, which are computed and not read."""
        return len(self.load("validation")[: self.limits["validation"]])

    def load(self, split: str) -> list[Question]:
        """Return the questions of ``split``: see ``questions``."""
        return questions(split, self.very_hard, self.hidden_tests)
