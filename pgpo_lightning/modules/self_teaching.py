"""What all modules with a self-teacher share (SDPO, arXiv 2601.20802): what the teacher reads, and whose weights it has."""

import math
import random
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from pgpo_lightning.core.seeding import seeded
from pgpo_lightning.core.settings import Count, Fraction, checked
from pgpo_lightning.core.types import Sample
from pgpo_lightning.distributed.collectives import gather, together
from pgpo_lightning.losses.fused import Source
from pgpo_lightning.models.loading import fingerprint
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.modules.resuming import check_start
from pgpo_lightning.teachers.base import Teacher, TeacherRegularization
from pgpo_lightning.teachers.build import make_teacher
from pgpo_lightning.teachers.frozen import FrozenTeacher
from pgpo_lightning.teachers.reprompt import (
    FEEDBACK_TEMPLATE,
    REPROMPT_TEMPLATE,
    SOLUTION_TEMPLATE,
    DemonstrationChoice,
    DemonstrationSource,
    RepromptBuilder,
    fill,
)
from pgpo_lightning.teachers.schedules import RefreshGate
from pgpo_lightning.training.preflight import joined, less_successful, net_gap

_MOVING = ("ema", "trust-region", "restart")


def apart(rows: list[Sample]) -> list[list[Sample]]:
    """Return the rows that have a teacher's prompt, and the others."""
    return [[row for row in rows if (row.reprompt_ids is not None) == taught] for taught in (True, False)]


@checked
class SelfTeaching(OnPolicyModule):
    """Shows the model what came of its own responses, so that it can teach itself.

    Args:
        model: See :class:`OnPolicyModule`, as for everything not named here.
        verifier: Judges a response, and may return feedback for the teacher of that very response.
        teacher_regularization: Whose weights the teacher has: ``ema`` (moving average), ``frozen`` (the start), ``live``
            (the student), ``trust-region`` (a mixture of the start's and the student's logits), ``restart`` (moves every
            `teacher_period` steps by what the average would have moved, :class:`~pgpo_lightning.teachers.schedules.Periodic`),
            ``gated``
            (CGTR: a copy of the student taken when that has become better, `teacher_gate`).
        teacher_update_rate: Of the average (for ``restart`` per step; 1 is a hard copy), or weight of the student in the mixture.
            Default 0.05.
        teacher_offload: Keep the teacher's own weights in the host's memory; the device gets a copy while gradients are made.
        teacher_period: Steps between two moves of the ``restart`` teacher. Default 10.
        teacher_gate: When the ``gated`` teacher is renewed. Default as in the paper.
        demonstration_choice: ``shared``: one success, drawn at random, is shown to all rows of a group but itself, which is shown
            a second one (the reference's rule; the teacher reads it once for all of them). ``independent``: a draw for every row;
            less correlated, and the teacher's forward pass costs up to twice as much.
        dont_reprompt_on_self_success: Never show a response its own text as demonstration.
        remove_thinking_from_demonstration: Drop think blocks from demonstrations, also one that the chat template opens. A block
            that is never closed goes to the end; a response that is all thinking is no demonstration.
        include_environment_feedback: Show feedback, the verifier's or else the question's `privileged_context`.
        environment_feedback_only_without_solution: Show it only where there is no demonstration.
        max_reprompt_len: Longest teacher prompt in tokens. The demonstration is cut to fit, then the feedback; never the
            question or the template. Default 10240.
        reprompt_template: The teacher's user turn; placeholders {prompt}, and {solution} and {feedback} unless there is none.
        solution_template: What goes into {solution}; placeholder {successful_previous_attempt}.
        feedback_template: What goes into {feedback}; placeholder {feedback_raw}.
        demonstration_source: Whose successes are shown: ``siblings``, as above; ``own``, a response's own text if it is right
            (set `dont_reprompt_on_self_success` false); ``none``, feedback alone.
        reprompt_without_context: Give a teacher also to rows with neither demonstration nor feedback; it reads the reprompt
            template with both left empty, so that the template itself, or nothing at all, is the context.
        preflight: Before the first optimizer step, sample an answer of the teacher from every reprompt of the batch and as many
            of the student from the plain prompts, and warn if the teacher succeeds significantly less often. Logs
            `self_distillation/net_gap` and its standard error.
        kwargs: See :class:`OnPolicyModule`.
    """

    has_teacher = True
    start: str | None = None
    """Fingerprint of the weights that the teacher keeps outside of checkpoints, if it does."""

    def __init__(
        self,
        *args: Any,
        teacher_regularization: TeacherRegularization = "ema",
        teacher_update_rate: Fraction | None = None,
        teacher_offload: bool = False,
        teacher_period: Count | None = None,
        teacher_gate: RefreshGate | None = None,
        demonstration_choice: DemonstrationChoice = "shared",
        dont_reprompt_on_self_success: bool = True,
        remove_thinking_from_demonstration: bool = True,
        include_environment_feedback: bool = True,
        environment_feedback_only_without_solution: bool = True,
        max_reprompt_len: Count = 10240,
        reprompt_template: str = REPROMPT_TEMPLATE,
        solution_template: str = SOLUTION_TEMPLATE,
        feedback_template: str = FEEDBACK_TEMPLATE,
        demonstration_source: DemonstrationSource = "siblings",
        reprompt_without_context: bool = False,
        preflight: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if teacher_offload and (teacher_regularization == "live" or self.lora is not None):
            why = "an adapter, which is small" if self.lora is not None else "no weights but the student's"
            raise ValueError(f"Expected no `teacher_offload` with a teacher that has {why}. Set it to false.")
        for name, value, kinds in (
            ("teacher_update_rate", teacher_update_rate, _MOVING),
            ("teacher_period", teacher_period, ("restart",)),
            ("teacher_gate", teacher_gate, ("gated",)),
        ):
            if value is not None and teacher_regularization not in kinds:
                raise ValueError(
                    f"Expected no `{name}` with the {teacher_regularization} teacher: it would have no effect."
                )
        self.teacher_update_rate = 0.05 if teacher_update_rate is None else teacher_update_rate
        self.teacher_period = 10 if teacher_period is None else teacher_period
        self.teacher_gate = teacher_gate
        self.preflight = preflight
        if max_reprompt_len <= self.max_prompt_length:
            raise ValueError(
                f"Expected `max_reprompt_len` to exceed `max_prompt_length` ({self.max_prompt_length}), because the teacher "
                f"sees the question and more, but got {max_reprompt_len}."
            )
        alone = self.num_generations == 1 and dont_reprompt_on_self_success
        if alone and not include_environment_feedback and not reprompt_without_context:
            raise ValueError(
                "Expected `num_generations` to be at least 2 without `include_environment_feedback`, but got 1: no rollout has a "
                "sibling to learn from, and none may learn from feedback, so that nothing would ever be learnt."
            )
        self.teacher_regularization, self.teacher_offload = teacher_regularization, teacher_offload
        self.reprompt = RepromptBuilder(
            success_reward_threshold=self.success_reward_threshold,
            demonstration_choice=demonstration_choice,
            dont_reprompt_on_self_success=dont_reprompt_on_self_success,
            remove_thinking_from_demonstration=remove_thinking_from_demonstration,
            include_environment_feedback=include_environment_feedback,
            environment_feedback_only_without_solution=environment_feedback_only_without_solution,
            max_reprompt_len=max_reprompt_len,
            reprompt_template=reprompt_template,
            solution_template=solution_template,
            feedback_template=feedback_template,
            demonstration_source=demonstration_source,
            reprompt_without_context=reprompt_without_context,
        )

    @property
    def shows_feedback(self) -> bool:
        """Whether feedback is part of the reprompt."""
        return self.reprompt.include_environment_feedback

    def setup(self, stage: str) -> None:
        """Check that the reprompt leaves room for a question."""
        super().setup(stage)
        bare = fill(self.reprompt.reprompt_template, prompt="", solution="", feedback="")
        taken = len(self.encoder.messages([{"role": "user", "content": bare}], "`reprompt_template`"))
        if stage == "fit" and taken >= self.reprompt.max_reprompt_len:
            raise MisconfigurationException(
                f"Expected `reprompt_template` to leave room for a question, but it takes {taken} of `max_reprompt_len`="
                f"{self.reprompt.max_reprompt_len} tokens by itself, so that no row would have a teacher. Raise "
                "`max_reprompt_len`, or shorten the template."
            )

    def prepare_rows(self, rows: list[Sample], rng: random.Random) -> dict[str, float]:
        """Give every row that has a demonstration or feedback its teacher's prompt."""
        encoder = self.encoder
        self.teacher.observe(rows)
        scalars = self.reprompt.attach(rows, encoder.messages, encoder.tokens, encoder.text, rng, encoder.answer)
        empty = not any(gather(any(row.reprompt_ids is not None for row in rows)))
        scalars["self_distillation/empty_target_batch"] = float(empty)
        return scalars

    @torch.no_grad()
    def check_answers(self, rows: list[Sample]) -> None:
        """Grade the teacher's own answers, if that is wanted. Before the first step it has the student's weights."""
        if not self.preflight or not self.weights_are_the_start:
            return
        taught = [row for row in rows if row.reprompt_ids is not None]
        asked = [row.rollout.question for row in taught]
        success = []
        with (
            together(),  # what fails on one rank alone ends all of them
            seeded(self.seed, "preflight", self.steps, self.global_rank),
            self.placement.generation(),
        ):
            for prompts in ([row.reprompt_ids for row in taught], [row.rollout.prompt_ids for row in taught]):
                answers = (
                    self.engine.generate(self.model, self.tokenizer, asked, prompts, 1, self._training_sampling)
                    if taught
                    else []
                )
                success.append([verdict.reward >= self.success_reward_threshold for verdict in self.judge(answers)])
        mine = [(q.index, float(t) - float(s)) for q, t, s in zip(asked, *success, strict=True)]
        gains, question = joined(gather(mine))
        if not len(gains):
            return
        gap = net_gap(gains, question)
        self.scalars["self_distillation/net_gap"] = gap.value
        if not math.isnan(gap.standard_error):
            self.scalars["self_distillation/net_gap_standard_error"] = gap.standard_error
        if (harm := less_successful(gap, question.unique().numel())) is not None:
            rank_zero_warn(f"Step {self.steps + 1}: {harm}.")

    def contexts(self, row: Sample) -> list[list[int]]:
        """The student's prompt and, where there is one, the teacher's."""
        mine = [row.rollout.prompt_ids]
        return mine if row.reprompt_ids is None else [*mine, row.reprompt_ids]

    def teacher_sources(self, rows: list[Sample]) -> list[Source]:
        """Run the self-teacher on (reprompt, response), or take what it said in an earlier pass over the batch."""
        # Under sharded weights all ranks run the teacher equally often, whatever rows they have.
        keeps = self.num_iterations > 1 and not self.teacher.moves_with_student and not self.placement.sharded
        if keeps and all(row.teacher_hidden is not None for row in rows):
            return [Source(torch.cat([row.teacher_hidden for row in rows]), self.teacher.head(self.model))]
        sources = self.teacher.sources(
            self.model, self.pack([(row.reprompt_ids, row.rollout.response_ids) for row in rows])
        )
        if keeps:
            for row, hidden in zip(rows, sources[0].hidden.split([row.length for row in rows]), strict=True):
                row.teacher_hidden = hidden
        return sources

    def accumulate_gradients(self, rows: list[Sample]) -> float:
        """See :meth:`OnPolicyModule.accumulate_gradients`. The optimizer's step needs no teacher."""
        try:
            return super().accumulate_gradients(rows)
        finally:
            self.teacher.release()

    def after_update(self) -> None:
        """The teacher follows the student."""
        self.teacher.update(self.model)

    @property
    def longest_prompt(self) -> int:
        """The teacher's prompt is the longest."""
        return self.reprompt.max_reprompt_len

    def make_teacher(self) -> Teacher:
        """Return the self-teacher."""
        teacher = make_teacher(
            self.teacher_regularization,
            self.model,
            self.teacher_update_rate,
            self.teacher_period,
            self.teacher_gate,
            self.teacher_offload,
        )
        if isinstance(teacher, FrozenTeacher):
            self.start = fingerprint(self.model)
        if self.teacher_offload:  # DDP looks after the weights on its device
            tensors = (*teacher.named_parameters(), *teacher.named_buffers())
            self._ddp_params_and_buffers_to_ignore = [f"teacher.{name}" for name, _ in tensors]
        return teacher

    def _check_combination(self, sharded: bool) -> None:
        super()._check_combination(sharded)
        if sharded and self.teacher_offload:
            raise MisconfigurationException(
                "Expected no `teacher_offload` with sharded weights, of which each device holds a share only, but got "
                "ModelParallelStrategy. Set `teacher_offload` to false, or `trainer.strategy` to ddp."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the kind of teacher, and what it keeps beside weights."""
        super().on_save_checkpoint(checkpoint)
        # FSDP2 loads a single file weight by weight, and nothing else of a module's state.
        beside = self.teacher.get_extra_state() if _has_more_than_weights(self.teacher) else None
        checkpoint["pgpo_lightning"] |= {
            "teacher": self.teacher_regularization,
            "teacher_state": beside,
            "start": self.start,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the kind of teacher, or leave its weights aside where only the student is evaluated."""
        super().on_load_checkpoint(checkpoint)
        if self.teacher is None:
            if (state := checkpoint.get("state_dict")) is not None:  # sharded weights were loaded before
                checkpoint["state_dict"] = {
                    name: value for name, value in state.items() if not name.startswith("teacher.")
                }
        elif (theirs := checkpoint["pgpo_lightning"]["teacher"]) != self.teacher_regularization:
            raise MisconfigurationException(
                f"Expected a checkpoint with `teacher_regularization` {self.teacher_regularization}, but it has {theirs}."
            )
        check_start(checkpoint["pgpo_lightning"].get("start"), self.start)
        if self.teacher is not None and (beside := checkpoint["pgpo_lightning"].get("teacher_state")) is not None:
            self.teacher.set_extra_state(beside)


def _has_more_than_weights(teacher: Teacher | None) -> bool:
    return teacher is not None and type(teacher).get_extra_state is not nn.Module.get_extra_state
