"""The teacher of one run (SDPO, arXiv 2601.20802): its settings, its prompts, and the making of its weights."""

import random
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from transformers import PreTrainedModel

from pgpo_lightning.core.types import Question, Sample
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.models.loading import fingerprint
from pgpo_lightning.rewards.grade import Verifier
from pgpo_lightning.rollout.prompts import PromptEncoder
from pgpo_lightning.teachers.base import Teacher
from pgpo_lightning.teachers.build import make_teacher
from pgpo_lightning.teachers.configs import RepromptConfig, TeacherConfig
from pgpo_lightning.teachers.context_kinds import read_by_teacher
from pgpo_lightning.teachers.external import load_external
from pgpo_lightning.teachers.frozen import FrozenTeacher
from pgpo_lightning.teachers.reprompt import COLUMN, RepromptBuilder, fill


class SelfTeaching:
    """Shows the model what became of its own responses, so that it can teach itself.

    Args:
        config: Whose weights the teacher has.
        reprompt: What it reads.
        encoder: Encodes its prompts.
        num_generations: Rollouts per question.
        max_prompt_length: Longest student prompt in tokens.
        success_threshold: Rewards of at least this count as success.
        adapter: Whether an adapter is trained, so that the teacher has no weights of its own.
        verifier: Judges parts of responses, for `reprompt.contexts` with `answer`.

    Raises:
        ValueError: If settings contradict each other; names the field.
    """

    def __init__(
        self,
        config: TeacherConfig,
        reprompt: RepromptConfig,
        encoder: PromptEncoder,
        *,
        num_generations: int,
        max_prompt_length: int,
        success_threshold: float,
        adapter: bool = False,
        verifier: Verifier | None = None,
    ) -> None:
        kinds = () if reprompt.contexts is None else reprompt.contexts.kinds
        if verifier is None and "answer" in kinds:
            raise ValueError("Expected a `verifier` for `reprompt.contexts.kinds` with answer, but got none.")
        changing = set(kinds) - {"sibling", "other-feedback", "template"}
        if reprompt.demonstration_source == "none" and reprompt.include_environment_feedback:
            changing -= {"other"}  # its responses bring their feedback along
        if reprompt.demonstration_source != "siblings" and changing:
            raise ValueError(
                f"Expected `reprompt.demonstration_source` siblings with `reprompt.contexts.kinds` {', '.join(kinds)}, which "
                f"change the demonstration, but got {reprompt.demonstration_source}."
            )
        if "other-feedback" in kinds and not reprompt.include_environment_feedback:
            raise ValueError(
                "Expected `reprompt.include_environment_feedback` true with `reprompt.contexts.kinds` other-feedback, but got "
                "false."
            )
        if config.offload and adapter and config.model is None:
            raise ValueError(
                "Expected no `teacher.offload` with a teacher that has an adapter, which is small. Set it to false."
            )
        if config.dtype is not None and adapter and config.model is None:
            raise ValueError(
                "Expected no `teacher.dtype` with a teacher that has an adapter, which is small and stays in fp32, but got "
                f"{config.dtype}. Set it to null."
            )
        if reprompt.max_reprompt_len < max_prompt_length + (not reprompt.adds_nothing):
            raise ValueError(
                f"Expected `reprompt.max_reprompt_len` to exceed `max_prompt_length` ({max_prompt_length}), because the teacher "
                f"sees the question and more, but got {reprompt.max_reprompt_len}."
            )
        siblings = reprompt.demonstration_source != "column"
        alone = num_generations == 1 and reprompt.dont_reprompt_on_self_success and siblings
        if alone and not reprompt.include_environment_feedback and not reprompt.reprompt_without_context:
            raise ValueError(
                "Expected `num_generations` to be at least 2 without `reprompt.include_environment_feedback`, but got 1: no "
                "rollout has a sibling or feedback to learn from, so nothing would ever be learnt."
            )
        self.config = config
        self.encoder = encoder
        self.builder = RepromptBuilder(success_reward_threshold=success_threshold, **reprompt.builder_settings())
        self.contexts = reprompt.contexts
        self.verifier = verifier
        self.start: str | None = None
        """Fingerprint of the weights that the teacher keeps outside of checkpoints, if it does."""

    def check_questions(self, questions: list[Question]) -> None:
        """Check that there is a worked solution to show, where the data are to have them.

        Raises:
            ValueError: If no question has one; names the column.
        """
        if self.builder.demonstration_source != "column" or not questions:
            return
        if not any(self.builder.solution(question) for question in questions):
            there = ", ".join(questions[0].columns) or "none"
            raise ValueError(
                "Expected `reprompt.demonstration_column` to name a column with worked solutions as text, but no training "
                f"question has one in `{self.builder.demonstration_column or COLUMN}`. The columns beside prompt and answer: "
                f"{there}."
            )

    def check_template(self) -> None:
        """Check that the reprompt leaves room for a question.

        Raises:
            MisconfigurationException: If the template alone fills the limit.
        """
        limit = self.builder.max_reprompt_len
        bare = fill(self.builder.reprompt_template, prompt="", solution="", feedback="")
        taken = len(self.encoder.messages([{"role": "user", "content": bare}], "`reprompt.reprompt_template`"))
        if taken >= limit:
            raise MisconfigurationException(
                f"Expected `reprompt.reprompt_template` to leave room for a question, but it takes {taken} of "
                f"`reprompt.max_reprompt_len`={limit} tokens by itself, so that no rollout would have a teacher. Raise "
                "`reprompt.max_reprompt_len`, or shorten the template."
            )

    def make(self, student: PreTrainedModel, loading: dict[str, Any] | None = None, longest: int = 1) -> Teacher:
        """Return the teacher, made from the student's weights (or its adapter) as they are now, or loaded.

        Args:
            student: The model being trained.
            loading: How it was loaded, as the arguments of :func:`~pgpo_lightning.models.loading.load_model`.
            longest: Most tokens of prompt and response together in this run.

        Raises:
            MisconfigurationException: If the model of `teacher.model` does not go with the student.
        """
        config = self.config
        if config.model is not None:
            rows = len(student.get_output_embeddings().weight)
            external = load_external(config, self.encoder.tokenizer, rows, loading or {}, longest)
            self.start = external.identity
            return external
        kind = config.regularization or "ema"
        narrow = config.dtype == "bfloat16"
        teacher = make_teacher(kind, student, config.rate, config.steps, config.gate, config.offload, narrow)
        if isinstance(teacher, FrozenTeacher):
            self.start = fingerprint(student)
        return teacher

    def attach(
        self,
        samples: list[Sample],
        teacher: Teacher,
        rng: random.Random,
        *,
        seed: int = 0,
        step: int = 0,
        order: Callable[[list[Sample]], None] | None = None,
    ) -> dict[str, float]:
        """Give every sample that has a demonstration or feedback its teacher's prompt, in place.

        Args:
            samples: This rank's, whole groups.
            teacher: Sees the rollouts of the step.
            rng: Source of the choice of demonstrations.
            seed: Of the run; with `step` it decides the kind of context, if there are several.
            step: Batches trained on so far.
            order: Sorts the successes of a group, the demonstration first; null for a random order.

        Returns:
            Scalars to log.
        """
        encoder = self.encoder
        teacher.observe(samples)
        scalars: dict[str, float] = {}
        read, shows = samples, True
        if self.contexts is not None:
            kind = self.contexts.kind(seed, step)
            read, shows = self.read(kind, samples), kind != "template"
            scalars |= {f"context/{each}": float(each == kind) for each in self.contexts.kinds}
        scalars |= self.builder.attach(
            read, encoder.messages, encoder.tokens, encoder.text, rng, encoder.answer, shows, order
        )
        for sample, source in zip(samples, read, strict=True):
            sample.reprompt_ids, sample.reprompt = source.reprompt_ids, source.reprompt
        empty = not any(gather(any(sample.reprompt_ids is not None for sample in samples)))
        scalars["self_distillation/empty_target_batch"] = float(empty)
        return scalars

    def read(self, kind: str, samples: list[Sample]) -> list[Sample]:
        """Return what the teacher's prompts are made from; see :func:`read_by_teacher`."""
        builder = self.builder
        answer = self.encoder.answer if builder.remove_thinking_from_demonstration else None
        # Only `answer` asks the verifier, and the constructor has seen to it that there is one.
        verifier: Verifier = self.verifier  # type: ignore[assignment]
        return read_by_teacher(kind, samples, builder.success_reward_threshold, verifier, answer)

    def saved(self, teacher: Teacher | None) -> dict[str, Any]:
        """Return what a checkpoint needs beside weights."""
        # FSDP2 loads a single file weight by weight, and nothing else of a module's state.
        beside = None
        if teacher is not None and type(teacher).get_extra_state is not nn.Module.get_extra_state:
            beside = teacher.get_extra_state()
        return {"teacher": self.config.kind, "teacher_state": beside, "start": self.start}

    def restore(self, saved: dict[str, Any], teacher: Teacher | None) -> None:
        """Check that a checkpoint was trained with this kind of teacher, and take over its state.

        Args:
            saved: What :meth:`saved` returned.
            teacher: ``None`` where only the student is evaluated.

        Raises:
            MisconfigurationException: If it is another kind, or began with other weights.
        """
        if teacher is not None and saved["teacher"] != self.config.kind:
            raise MisconfigurationException(
                f"Expected a checkpoint with `teacher.regularization` {self.config.kind}, but it has {saved['teacher']}."
            )
        check_start(saved.get("start"), self.start, self.config.model)
        if teacher is not None and (beside := saved.get("teacher_state")) is not None:
            teacher.set_extra_state(beside)


def check_start(saved: str | None, found: str | None, external: str | None = None) -> None:
    """Compare the weights that a teacher began with, where it keeps them outside of checkpoints.

    Args:
        saved: Their fingerprint in the checkpoint.
        found: That of the model that this run was given.
        external: The `teacher.model` of this run.

    Raises:
        MisconfigurationException: If they differ.
    """
    if saved is None or found is None or saved == found:
        return
    if external is not None:
        raise MisconfigurationException(
            f"Expected `teacher.model` to be the teacher that the run began with, but `{external}` has other weights "
            f"(fingerprint {found}, and it was {saved}). Give the teacher of the run, with its `teacher.dtype` and "
            "`teacher.quantization`."
        )
    raise MisconfigurationException(
        "Expected `model` to be the one that the run began with, because the teacher is made of its weights, but got others "
        f"(fingerprint {found}, and it was {saved}). Give the model of the run."
    )
