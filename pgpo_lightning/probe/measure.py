"""Rollouts of a probe, from the student and from the self-teacher reading its reprompts. Each part is saved when it is done.

A part is one context on one chunk of questions, in a file of its own that is written atomically. A probe that was stopped, or
gets one more context, samples only the missing parts. All random numbers are functions of the seed, the context and the chunk.
The demonstrations are the same in every context that shows siblings.
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

from pgpo_lightning.core.files import write_json
from pgpo_lightning.core.identity import joint_sha256, question_sha256
from pgpo_lightning.core.seeding import derive_seed, seeded
from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.modules import OnPolicyModule
from pgpo_lightning.probe.contexts import Context
from pgpo_lightning.probe.gaps import Table
from pgpo_lightning.rollout.engine import Sampling
from pgpo_lightning.rollout.prompts import PromptEncoder
from pgpo_lightning.teachers.context_kinds import read_by_teacher

Answer = dict[str, Any]
"""A graded response: ``text``, ``reward``, ``length`` (tokens), ``finished``; the student's also ``feedback`` and ``answer``."""


@dataclass(frozen=True)
class Measured:
    """Measurements of one context. Tables are ``(questions, samples)``.

    Attributes:
        reward: Reward of the teacher's response; NaN where the rollout gets no context.
        length: Its length in tokens; NaN likewise.
        example: A student's response, the teacher's prompt and the teacher's response; None if no rollout got the context.
        seconds: Time to sample and grade.
    """

    reward: Table
    length: Table
    example: dict[str, str] | None
    seconds: float


class Prober:
    """Samples student and teacher with the module's own engine, encoder, verifier and reprompts.

    Args:
        module: With its model loaded, on its device.
        questions: The questions.
        samples: Responses of the student per question. The teacher responds once for each of them.
        sampling: Sampling parameters of both.
        chunk: Number of questions in a part.
        seed: Of every random choice.
        folder: Of the parts.
        settings: Everything else that the student's rollouts depend on. Parts with other settings are refused.
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
        self.joint_sha256 = joint_sha256(map(question_sha256, questions))  # as in records of runs
        content = json.dumps(
            [[q.index, q.messages(), q.answer, q.privileged_context, q.other_columns()] for q in questions], default=str
        )
        self.settings = {
            **settings,
            "seed": seed,
            "samples": samples,
            "chunk": chunk,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "questions": len(questions),
            QUESTIONS_HASH: hashlib.sha256(content.encode()).hexdigest(),
        }

    def student(self) -> list[list[Sample]]:
        """Return the student's graded rollouts for each chunk, grouped by question."""
        rows = []
        for number, questions in enumerate(self.chunks):
            content = self._part("student", number, {}, lambda n=number: {"answers": self._ask(n)})
            answers = content["answers"]
            repeated = [question for question in questions for _ in range(self.samples)]
            encoder = self.module.encoder
            rows.append(
                [_sample(encoder, question, answer) for question, answer in zip(repeated, answers, strict=True)]
            )
        return rows

    def teacher(self, context: Context, rows: list[list[Sample]]) -> Measured:
        """Return the self-teacher's responses in a context.

        Args:
            context: The context or control.
            rows: From :meth:`student`; not modified.
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
        return [
            _answer(rollout, verdict) | {"feedback": verdict.feedback, "answer": verdict.answer}
            for rollout, verdict in zip(rollouts, verdicts, strict=True)
        ]

    def _teach(self, context: Context, number: int, student: list[Sample]) -> dict[str, Any]:
        module, encoder, builder = self.module, self.module.encoder, context.builder
        rows = [Sample(row.rollout, row.verdict) for row in student]
        if context.control is not None:
            told = encoder.answer if builder.remove_thinking_from_demonstration else None
            rows = read_by_teacher(context.control, rows, builder.success_reward_threshold, module.actor.verifier, told)
        choice = random.Random(derive_seed(self.seed, "probe", "demonstrations", number))
        builder.attach(rows, encoder.messages, encoder.tokens, encoder.text, choice, encoder.answer)
        with torch.no_grad(), seeded(self.seed, "probe", "teacher", context.name, number):
            rollouts = self._generate(rows)
            verdicts = iter(module.judge([rollout for rollout in rollouts if rollout is not None]))
        answers = [None if rollout is None else _answer(rollout, next(verdicts)) for rollout in rollouts]
        answered = [i for i, answer in enumerate(answers) if answer is not None]
        failed = [i for i in answered if student[i].verdict.reward < builder.success_reward_threshold]
        example = None
        for i in (failed or answered)[:1]:
            if (answer := answers[i]) is not None:
                example = {
                    "student_response": student[i].rollout.text,
                    "teacher_prompt": rows[i].reprompt,
                    "teacher_response": answer["text"],
                }
        return {"answers": answers, "example": example}

    def _generate(self, rows: list[Sample]) -> list[Rollout | None]:
        """Sample a response to every reprompt. Equal reprompts of a question are one prompt with several samples."""
        by_prompt: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            if row.reprompt_ids is not None:
                by_prompt[(row.rollout.question.index, *row.reprompt_ids)].append(i)
        by_count: dict[int, list[list[int]]] = defaultdict(list)
        for indices in by_prompt.values():
            by_count[len(indices)].append(indices)
        result: list[Rollout | None] = [None] * len(rows)
        module = self.module
        if module.model is None:
            raise RuntimeError("Expected the module to have its model loaded.")
        for count, groups in sorted(by_count.items()):
            first = [rows[group[0]] for group in groups]
            questions = [row.rollout.question for row in first]
            prompts = [ids for row in first if (ids := row.reprompt_ids) is not None]
            rollouts = module.actor.generate(module.model, questions, prompts, count, self.sampling)
            for index, rollout in zip((i for group in groups for i in group), rollouts, strict=True):
                result[index] = rollout
        return result

    def _part(self, name: str, number: int, more: dict[str, Any], make: Any) -> dict[str, Any]:
        """Return the content of a part, from its file if it exists."""
        path = self.folder / "parts" / name / f"{number:04d}.json"
        settings = json.loads(json.dumps(self.settings | more))
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                recorded = with_present_names(content["settings"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"Expected {path} to be a part of a probe, but reading it failed: {error!r}. Delete it to have it made again."
                ) from None
            check_settings(recorded, settings, path)
            return content
        start = time.perf_counter()
        content = make()
        content |= {"seconds": round(time.perf_counter() - start, 2), "settings": settings}
        write_json(path, content, ensure_ascii=False)
        print(f"{name}: {number + 1} of {len(self.chunks)} chunks, {content['seconds']:.1f} s", flush=True)
        return content


QUESTIONS_HASH = "question_columns_sha256"
"""The setting with the hash of everything that questions contain; `joint_sha256` is that of records of runs."""


def with_present_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings of a probe under their present names: earlier versions wrote `questions_sha256`."""
    return {QUESTIONS_HASH if name == "questions_sha256" else name: value for name, value in settings.items()}


def check_settings(recorded: dict[str, Any], settings: dict[str, Any], path: Path) -> None:
    """Check that a part was made with these settings.

    Raises:
        ValueError: If not; names the file and the settings that differ.
    """
    if recorded != settings:
        differ = differing(recorded, settings)
        raise ValueError(
            f"Expected {path} to be made with the settings of this probe, but `{'`, `'.join(differ)}` differ. Choose another "
            "`--output`, or delete the folder that contains it."
        )


def differing(first: dict[str, Any], second: dict[str, Any], within: str = "") -> list[str]:
    """Return the dotted names of the settings that differ."""
    found = []
    for name in sorted({*first, *second}):
        a, b = first.get(name), second.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differing(a, b, f"{within}{name}.")
        elif a != b:
            found.append(f"{within}{name}")
    return found


def _answer(rollout: Rollout, verdict: Verdict) -> Answer:
    return {
        "text": rollout.text,
        "reward": verdict.reward,
        "length": len(rollout.response_ids),
        "finished": rollout.finished,
    }


def _sample(encoder: PromptEncoder, question: Question, answer: Answer) -> Sample:
    """Return a rollout with its verdict, from which reprompts are made."""
    text = answer["text"]
    rollout = Rollout(
        question, encoder.question(question), encoder.tokens(text), torch.zeros(0), text, answer["finished"]
    )
    return Sample(rollout, Verdict(answer["reward"], answer["feedback"], answer["answer"]))
