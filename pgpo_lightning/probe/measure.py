"""The rollouts of a probe: the student's, and those of the self-teacher sampling from its reprompts, each part kept as it comes.

A part is one context on one chunk of questions, a file of its own that is written all at once. A probe that was stopped, or is
asked for one more context, makes the missing parts only. All random numbers are functions of the seed, the context and the
chunk; the demonstrations are the same in every context that shows siblings.
"""

import hashlib
import json
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pgpo_lightning.core.identity import joint_sha256, question_sha256
from pgpo_lightning.core.seeding import derive_seed, seeded
from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.modules import OnPolicyModule
from pgpo_lightning.probe.contexts import CONTROLS, Context
from pgpo_lightning.probe.gaps import Table
from pgpo_lightning.rollout.engine import Sampling
from pgpo_lightning.rollout.prompts import PromptEncoder

Answer = dict[str, Any]
"""A judged response: ``text``, ``reward``, ``length`` (tokens), ``finished``; the student's also ``feedback`` and ``answer``."""


@dataclass(frozen=True)
class Measured:
    """What one context gave, each ``(questions, samples)``.

    Attributes:
        reward: Of the teacher's response; NaN where the rollout gets no context.
        length: Its tokens; NaN likewise.
        example: A question, what the teacher read and what it said; None if no rollout got the context.
        seconds: That it took to sample and judge.
    """

    reward: Table
    length: Table
    example: dict[str, str] | None
    seconds: float


class Prober:
    """Samples student and teacher with the module's own engine, encoder, verifier and reprompts.

    Args:
        module: With its model loaded, on its device.
        questions: To ask.
        samples: Of the student per question; the teacher answers once for every one of them.
        sampling: How both are sampled.
        chunk: Questions at a time.
        seed: Of every random choice.
        folder: For the parts.
        settings: What the student's rollouts depend on beside the arguments above; parts made with others are not used.
    """

    def __init__(
        self,
        module: OnPolicyModule,
        questions: list[Question],
        samples: int,
        sampling: Sampling,
        chunk: int,
        seed: int,
        folder: Path,
        settings: dict[str, Any],
    ) -> None:
        self.module = module
        self.samples = samples
        self.sampling = sampling
        self.seed = seed
        self.folder = folder
        self.chunks = [questions[start : start + chunk] for start in range(0, len(questions), chunk)]
        self.joint_sha256 = joint_sha256(map(question_sha256, questions))  # as records of runs have it
        asked = json.dumps(
            [[q.index, q.messages(), q.answer, q.privileged_context, q.columns] for q in questions], default=str
        )
        self.settings = {
            **settings,
            "seed": seed,
            "samples": samples,
            "chunk": chunk,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "questions": len(questions),
            "questions_sha256": hashlib.sha256(asked.encode()).hexdigest(),
        }

    def student(self) -> list[list[Sample]]:
        """Return the student's judged rollouts, those to one question next to each other, chunk by chunk."""
        rows = []
        for number, questions in enumerate(self.chunks):
            content = self._part("student", number, {}, lambda n=number: {"answers": self._ask(n)})
            answers = content["answers"]
            of = [question for question in questions for _ in range(self.samples)]
            encoder = self.module.encoder
            rows.append([_row(encoder, question, answer) for question, answer in zip(of, answers, strict=True)])
        return rows

    def teacher(self, context: Context, rows: list[list[Sample]]) -> Measured:
        """Return what the self-teacher says in a context.

        Args:
            context: Or a control.
            rows: From :meth:`student`; left as they are.
        """
        answers: list[Answer | None] = []
        seconds, examples = 0.0, []
        for number, chunk in enumerate(rows):
            make = lambda n=number, c=chunk: self._teach(context, n, c)  # noqa: E731
            content = self._part(context.name, number, {"context": context.settings}, make)
            answers += content["answers"]
            seconds += content["seconds"]
            examples.append(content["example"])
        shape = (-1, self.samples)
        return Measured(
            np.array([np.nan if a is None else a["reward"] for a in answers]).reshape(shape),
            np.array([np.nan if a is None else float(a["length"]) for a in answers]).reshape(shape),
            next((example for example in examples if example), None),
            seconds,
        )

    def _ask(self, number: int) -> list[Answer]:
        module = self.module
        with torch.no_grad(), seeded(self.seed, "probe", "student", number):
            rollouts = module.sample(self.chunks[number], self.samples, self.sampling)
            verdicts = module.judge(rollouts)
        told = [{"feedback": verdict.feedback, "answer": verdict.answer} for verdict in verdicts]
        return [_answer(*pair) | more for pair, more in zip(zip(rollouts, verdicts, strict=True), told, strict=True)]

    def _teach(self, context: Context, number: int, student: list[Sample]) -> dict[str, Any]:
        module, encoder, builder = self.module, self.module.encoder, context.builder
        rows = [Sample(row.rollout, row.verdict) for row in student]
        if context.control is not None:
            rows = CONTROLS[context.control](rows, builder.success_reward_threshold, module.actor.verifier)
        choice = random.Random(derive_seed(self.seed, "probe", "demonstrations", number))
        builder.attach(rows, encoder.messages, encoder.tokens, encoder.text, choice, encoder.answer)
        with torch.no_grad(), seeded(self.seed, "probe", "teacher", context.name, number):
            rollouts = self._generate(rows)
            verdicts = iter(module.judge([rollout for rollout in rollouts if rollout is not None]))
        answers = [None if rollout is None else _answer(rollout, next(verdicts)) for rollout in rollouts]
        places = [i for i, answer in enumerate(answers) if answer is not None]
        failed = [i for i in places if student[i].verdict.reward < builder.success_reward_threshold]
        example = None
        if places:
            i = (failed or places)[0]
            example = {
                "attempt": student[i].rollout.text,
                "teacher reads": rows[i].reprompt,
                "teacher says": answers[i]["text"],
            }
        return {"answers": answers, "example": example}

    def _generate(self, rows: list[Sample]) -> list[Rollout | None]:
        """Sample a response to every reprompt. Rows with the same one are samples of one prompt, which is then run once."""
        places: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            if row.reprompt_ids is not None:
                places[(row.rollout.question.index, *row.reprompt_ids)].append(i)
        by_count: dict[int, list[list[int]]] = defaultdict(list)
        for same in places.values():
            by_count[len(same)].append(same)
        found: list[Rollout | None] = [None] * len(rows)
        module = self.module
        for count, groups in sorted(by_count.items()):
            first = [rows[group[0]] for group in groups]
            questions, prompts = [row.rollout.question for row in first], [row.reprompt_ids for row in first]
            made = module.actor.generate(module.model, questions, prompts, count, self.sampling)
            for place, rollout in zip((i for group in groups for i in group), made, strict=True):
                found[place] = rollout
        return found

    def _part(self, name: str, number: int, more: dict[str, Any], make: Any) -> dict[str, Any]:
        """Read a part, or make it and write it."""
        path = self.folder / "parts" / name / f"{number:04d}.json"
        settings = json.loads(json.dumps(self.settings | more))
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                theirs = content["settings"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"Expected {path} to be a part of a probe, but reading it failed: {error!r}. Delete it, and it is made again."
                ) from None
            check_settings(theirs, settings, path)
            return content
        start = time.perf_counter()
        content = make()
        content |= {"seconds": round(time.perf_counter() - start, 2), "settings": settings}
        write(path, json.dumps(content, ensure_ascii=False))
        print(f"{name}: {number + 1} of {len(self.chunks)} chunks, {content['seconds']:.1f} s", flush=True)
        return content


def check_settings(theirs: dict[str, Any], mine: dict[str, Any], path: Path) -> None:
    """Raise unless a part was made with these settings.

    Raises:
        ValueError: Names the file and what differs.
    """
    if theirs != mine:
        differ = _differing(theirs, mine)
        raise ValueError(
            f"Expected {path} to be made with the settings of this probe, but `{'`, `'.join(differ)}` differ. Choose another "
            "`--output`, or delete the folder that it stands in."
        )


def _differing(theirs: dict[str, Any], mine: dict[str, Any], within: str = "") -> list[str]:
    """Return the dotted names of what differs, as deep as both have it."""
    found = []
    for name in sorted({*theirs, *mine}):
        a, b = theirs.get(name), mine.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differing(a, b, f"{within}{name}.")
        elif a != b:
            found.append(f"{within}{name}")
    return found


def write(path: Path, text: str) -> None:
    """Write a file all at once: a reader never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def _answer(rollout: Rollout, verdict: Verdict) -> Answer:
    return {
        "text": rollout.text,
        "reward": verdict.reward,
        "length": len(rollout.response_ids),
        "finished": rollout.finished,
    }


def _row(encoder: PromptEncoder, question: Question, answer: Answer) -> Sample:
    """Return a rollout with what reprompts are made of."""
    text = answer["text"]
    rollout = Rollout(
        question, encoder.question(question), encoder.tokens(text), torch.zeros(0), text, answer["finished"]
    )
    return Sample(rollout, Verdict(answer["reward"], answer["feedback"], answer["answer"]))
