r"""The embedded task: two-step arithmetic in four domains, which needs no download and learns in minutes on a CPU.

Every question asks for ``a * b + c`` in the wording of one domain. A good response shows both steps and boxes the
result, ``8*6=48;48+31=79 \boxed{79}``. The model that belongs to the task, in ``pgpo_lightning/assets/toy``, gets half
of the questions wrong and can use a demonstration: a large model before post-training, in miniature. ``benchmarks/toy_base.py``
rebuilds it.
"""

from collections.abc import Sequence
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

from pgpo_lightning.core.settings import checked
from pgpo_lightning.core.types import Question
from pgpo_lightning.data.questions import QuestionData
from pgpo_lightning.data.toy_hard import hard as is_hard

BASE_MODEL = Path(__file__).parent.parent / "assets" / "toy"
"""Folder of the shipped base model and its tokenizer, in the format of transformers."""

WORDINGS = {
    "physics": "Speed {a} m/s for {b} s from {c} m. Place?",
    "chemistry": "Mix {a} moles of {b} g with {c} g. Mass?",
    "biology": "Seed {a} plates with {b} cells, add {c}. Cells?",
    "material": "Stack {a} layers of {b} mm, coat {c} mm. Height?",
}
"""The wording of each domain."""

FACTORS = range(2, 13)
"""Values of ``a`` and ``b``."""

SUMMANDS = range(1, 51)
"""Values of ``c``."""


def solution(a: int, b: int, c: int, error: int = 0) -> str:
    r"""Return the response that solves a question.

    Args:
        a: First factor.
        b: Second factor.
        c: Summand.
        error: What to add to the product. The sum then follows from the wrong product.

    Example:
        >>> print(solution(8, 6, 31))
        8*6=48;48+31=79 \boxed{79}
    """
    first, result = a * b + error, a * b + error + c
    return f"{a}*{b}={first};{first}+{c}={result} \\boxed{{{result}}}"


def prompt(domain: str, a: int, b: int, c: int) -> str:
    """Return the text of a question.

    Args:
        domain: A key of ``WORDINGS``.
        a: First factor.
        b: Second factor.
        c: Summand.

    Example:
        >>> prompt("physics", 8, 6, 31)
        'Speed 8 m/s for 6 s from 31 m. Place?'
    """
    return WORDINGS[domain].format(a=a, b=b, c=c)


def held_out(a: int, b: int, c: int) -> bool:
    """Return whether the numbers belong to the held-out tenth, which is the same one in every domain."""
    return stable_hash(f"{a},{b},{c}") % 10 == 0


def questions(split: str, domains: Sequence[str] | None = None, hard: bool = False) -> list[Question]:
    """Return all questions of a split in a fixed, shuffled order: its first ``n`` are a fair sample of it.

    Args:
        split: ``"train"``; or ``"validation"`` or ``"test"``, which are both the held-out questions.
        domains: Domains to take, all by default.
        hard: Only those that the base model answers correctly in less than 5 % of samples: see ``toy_hard.py``.

    Raises:
        ValueError: If ``split`` or a domain does not exist.

    Example:
        >>> question = questions("test")[0]
        >>> question.prompt, question.answer
        ('Seed 9 plates with 2 cells, add 44. Cells?', '62')
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"Expected `split` to be 'train', 'validation' or 'test', but got {split!r}.")
    domains = list(WORDINGS if domains is None else domains)
    if unknown := [domain for domain in domains if domain not in WORDINGS]:
        raise ValueError(f"Expected `domains` to be among {list(WORDINGS)}, but got {unknown}.")
    numbers = [n for n in product(FACTORS, FACTORS, SUMMANDS) if held_out(*n) == (split != "train")]
    if hard:
        numbers = [n for n in numbers if is_hard(*n)]
    rows = sorted(product(domains, numbers), key=lambda row: stable_hash(f"{row[0]}:{row[1]}"))
    return [
        Question(
            prompt=prompt(domain, a, b, c),
            answer=str(a * b + c),
            index=index,
            source=f"toy {split}:{index}",
            columns={"domain": domain, "a": a, "b": b, "c": c, "solution": solution(a, b, c)},
        )
        for index, (domain, (a, b, c)) in enumerate(rows)
    ]


@checked
class ToyArithmetic(QuestionData):
    """The embedded arithmetic task as a data module. The column `solution` holds the worked solution of each question.

    Args:
        domains: Domains to take, among physics, chemistry, biology and material; all by default.
        hard: Take only questions that the shipped base model answers correctly in less than 5 % of samples at temperature 1: with
            all domains 316 for training and 60 held out.
        **kwargs: Batch sizes, seed and limits, see :class:`QuestionData`.
    """

    def __init__(self, domains: list[str] | None = None, hard: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.domains = domains
        self.hard = hard

    def held_out_questions(self) -> int | None:
        """Return the number of validation questions, which are computed and not read."""
        return len(self.load("validation")[: self.limits["validation"]])

    def load(self, split: str) -> list[Question]:
        """Return the questions of ``split``: see ``questions``."""
        return questions(split, self.domains, self.hard)


def stable_hash(text: str) -> int:
    """Return a number that is the same in every process, which ``hash`` is not."""
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big")
