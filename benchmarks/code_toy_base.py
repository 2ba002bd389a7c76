r"""Rebuild the base model of the embedded programming task: ``python -m benchmarks.code_toy_base --seed 0 --output DIR``.

The result is shipped in ``pgpo_lightning/assets/toy_code``; only those who want another base model need this file. A Qwen3
of 0.6 million parameters is supervised on examples of two kinds. In the first the question stands alone, and each step of the
program has a reading of its words that is drawn with the rates in ``data/toy_code.py``, right or wrong. In the second what is
meant is drawn for every example, an attempt with other readings fails, and SDPO's template shows the verifier's feedback on it,
or a solution; the response is what is meant. So the model learns how likely each reading is, and to infer from feedback which
one it is, not which readings are right in the task. Everything random follows from the seed.
"""

import argparse
import itertools
import random
import re
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.toy_base import chat, reprompt, save, train, word_level
from pgpo_lightning.core.types import Question
from pgpo_lightning.data.toy_code import (
    BASE_CODE_MODEL,
    CONSTANTS,
    FAULTY,
    PUBLIC,
    WORDS,
    Readings,
    held_out,
    inputs,
    output,
    prompt,
    questions,
    solution,
)
from pgpo_lightning.rewards import CodeExecution
from pgpo_lightning.rewards.code.feedback import CUT_OFF, NO_PROGRAM, Level, feedback
from pgpo_lightning.rewards.code.outcomes import Outcome

RUNS = ["()))", "().", "(*[", "])", "[::-", "```"]
"""Runs of punctuation that are one token."""

PIECES = r"\n\n?| ?-?[0-9]{1,2}|" + "|".join(map(re.escape, RUNS)) + r"| ?[A-Za-z]+|."
"""What a token is: a line break or two, a number of one or two digits with its sign, some punctuation, a word, a character."""

FEEDBACK, DEMONSTRATION = 0.55, 0.1
"""Shares of examples with feedback and with a demonstration."""

LEVELS: dict[Level, float] = {"full": 0.7, "no_expected": 0.15, "verdict": 0.15}
EVEN = 0.5
"""Share of guided examples in which all readings are equally likely to be meant; in the others they have their rates."""

STEPS, EXAMPLES, ALONE = 1200, 32, 0.2
"""Optimizer steps, examples of each, and the share of the steps, the first ones, whose questions all stand alone: they are short,
and teach the form of programs at half the cost."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer; it reproduces every text of the task exactly, spaces and newlines included."""
    rng = random.Random(0)
    texts = [NO_PROGRAM, CUT_OFF, *(text for _ in range(2000) for text in example(rng))]
    characters = {chr(code) for code in range(32, 127)} | {"\n", "\n\n"}
    pieces = characters.union(*(re.findall(PIECES, text) for text in texts))
    numbers = {f"{space}{number}" for space in ("", " ") for number in range(-10, 100)}
    words = {piece.strip(" ") for piece in pieces} - {""}
    words |= {" " + word for word in words if word.isalpha()}
    return word_level(pieces | words | numbers, PIECES)


def example(rng: random.Random, alone: bool = False) -> tuple[str, str]:
    """Return one supervised example, the user's text and the response, never with words that are held out together.

    Args:
        rng: Source of all choices.
        alone: Only questions that stand alone.
    """
    while held_out(words := tuple(rng.choice(list(step)) for step in WORDS)):
        pass
    c = rng.choice(list(CONSTANTS))
    text, kind = prompt(words, c), rng.random()
    if alone or kind >= FEEDBACK + DEMONSTRATION:
        return text, solution(read(words, rng), c)
    meant = read(words, rng, even=rng.random() < EVEN, faulty=False)
    if kind < DEMONSTRATION:
        return reprompt(text, solution(meant, c)), solution(meant, c)
    while (attempt := read(words, rng)) == meant:
        pass
    level = rng.choices(list(LEVELS), list(LEVELS.values()))[0]
    return reprompt(text, feedback=told(attempt, meant, inputs(rng, PUBLIC), c, level)), solution(meant, c)


def read(words: Sequence[str], rng: random.Random, even: bool = False, faulty: bool = True) -> Readings:
    """Return a reading of each step.

    Args:
        words: Of the two steps.
        rng: Source of the choice.
        even: All readings are equally likely, instead of by their rates.
        faulty: Whether the step that raises an error is among them.
    """
    chosen = []
    for step, each in enumerate(words):
        rates = WORDS[step][each].rates
        readings = [reading for reading in sorted(rates) if faulty or reading != FAULTY]
        chosen.append(rng.choices(readings, None if even else [rates[reading] for reading in readings])[0])
    return Readings(*chosen)


def told(attempt: Readings, meant: Readings, numbers: list[list[int]], c: int, level: Level = "full") -> str:
    """Return the verifier's feedback on an attempt, without running it.

    Args:
        attempt: Its readings.
        meant: The right readings.
        numbers: Inputs of the tests.
        c: Constant of the question.
        level: Of the feedback.
    """
    outcomes = []
    for index, each in enumerate(numbers):
        found = Outcome(index, "wrong", expected=output(meant, each, c), given=" ".join(map(str, each)))
        if attempt.order == FAULTY:
            line = solution(attempt, c).split("\n")[3]
            found.kind = "error"
            found.error = [
                "TypeError: 'NoneType' object is not iterable",
                f"  {line}",
                "Line 3 in <module> (Solution.py)",
            ]
        else:
            found.actual = output(attempt, each, c)
            found.kind = "passed" if found.actual == found.expected else "wrong"
        outcomes.append(found)
    return feedback(outcomes, (True,) * len(outcomes), "strict", level)


def build(output: str | Path, steps: int, seed: int = 0) -> None:
    """Train the base model and save it with its tokenizer, in bfloat16.

    Args:
        output: Folder for the files.
        steps: Optimizer steps.
        seed: Seed of the weights and of the examples.
    """
    tokenizer = build_tokenizer()
    first = itertools.count()
    drawn = partial(_lesson, first, ALONE * steps * EXAMPLES)
    save(train(steps, seed, tokenizer, drawn, EXAMPLES), tokenizer, output)


def _lesson(drawn: Iterator[int], alone: float, rng: random.Random) -> tuple[str, str]:
    return example(rng, alone=next(drawn) < alone)


@torch.no_grad()
def sample(folder: str | Path, texts: Sequence[str], temperature: float = 1.0, seed: int = 0) -> list[str]:
    """Sample one response to each text.

    Args:
        folder: A saved model.
        texts: Of the user.
        temperature: Sampling temperature, with the whole vocabulary.
        seed: Seed of the sampling.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batch = tokenizer([chat(tokenizer, text) for text in texts], padding=True, return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = model.generate(**batch, do_sample=True, temperature=temperature, top_p=1.0, top_k=0, max_new_tokens=48)
    return tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


CONTEXTS = ("failed again", *LEVELS, "another question's", "solution")
"""What a failure is followed by: the plain question; feedback, by level; the feedback on another question; the right program."""


def rates(
    folder: str | Path, asked: Sequence[Question], samples: int = 8, contexts: Sequence[str] = CONTEXTS, seed: int = 0
) -> dict[str, Tensor]:
    """Measure the student, and the teacher on the student's failures with several contexts.

    Args:
        folder: A saved model.
        asked: Questions of the task.
        samples: Responses per question.
        contexts: Some of ``CONTEXTS``.
        seed: Seed of the sampling.

    Returns:
        Rewards: ``student`` of shape ``(questions * samples,)``, and by context as many as there are failures.
    """
    rows = [question for question in asked for _ in range(samples)]
    responses = sample(folder, [str(question.prompt) for question in rows], seed=seed)
    graded = _grade(rows, responses, "full")
    found = {"student": torch.tensor([reward for reward, _ in graded])}
    failed = [i for i, (reward, _) in enumerate(graded) if reward < 1]
    again, attempts = [rows[i] for i in failed], [responses[i] for i in failed]
    for name in contexts:
        shown: list[str | None] = [None] * len(failed)
        if name in LEVELS:
            shown = [text for _, text in _grade(again, attempts, name)]
        elif name == "another question's":
            shift = len(failed) // 2  # the failures of a question stand together
            shown = [graded[i][1] for i in failed[shift:] + failed[:shift]]
        texts = [
            str(question.prompt)
            if name == "failed again"
            else reprompt(str(question.prompt), question.columns["solution"] if name == "solution" else None, text)
            for question, text in zip(again, shown, strict=True)
        ]
        answers = sample(folder, texts, seed=seed + 1)
        found[name] = torch.tensor([reward for reward, _ in _grade(again, answers, "none")])
    return found


def _grade(asked: Sequence[Question], responses: Sequence[str], level: Any) -> list[tuple[float, str | None]]:
    verifier = CodeExecution(feedback=level)
    verdicts = verifier.judge([(question, text, False) for question, text in zip(asked, responses, strict=True)])
    return [(verdict.reward, verdict.feedback) for verdict in verdicts]


def main() -> None:
    """Build the model, then measure the files that were written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(BASE_CODE_MODEL))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--measure", action="store_true", help="build nothing: measure the files that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the order of the sums, and with it the file, must not depend on the machine's load
    if not arguments.measure:
        start = time.process_time()
        build(arguments.output, arguments.steps, arguments.seed)
        print(f"trained in {time.process_time() - start:.0f} CPU s")
    for name, asked in {
        "held out": questions("test"),
        "very hard, held out": questions("test", very_hard=True),
    }.items():
        found = rates(arguments.output, asked)
        print(name, {key: (round(values.mean().item(), 3), len(values)) for key, values in found.items()})


if __name__ == "__main__":
    main()
