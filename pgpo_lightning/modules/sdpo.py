"""Self-Distilled Policy Optimisation (SDPO, arXiv 2601.20802). PGPO (arXiv 2606.03620) is this module plus a callback.

The student answers a question. The same model, shown what came of it (a correct sibling answer, an error message), is the
self-teacher; token by token the student is pulled towards it, on the very responses that it sampled.
"""

import random
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pgpo_lightning.allocation import Allocation
from pgpo_lightning.batching import TokenInputs
from pgpo_lightning.distillation import Source, TokenStatistics
from pgpo_lightning.divergence import Divergence
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.modules.settings import at_least, either, one_of
from pgpo_lightning.records import Row
from pgpo_lightning.reprompt import (
    FEEDBACK_TEMPLATE,
    REPROMPT_TEMPLATE,
    SOLUTION_TEMPLATE,
    DemonstrationChoice,
    RepromptBuilder,
    check_template,
)
from pgpo_lightning.teacher import FrozenTeacher, Teacher, TeacherRegularization, make_teacher


class SDPO(OnPolicyModule):
    """Distils the feedback-conditioned self-teacher into the student.

    The loss of a step with B rollouts is ``1/B sum_i 1/L_i sum_t w_it D(S_it, T_it)``, over the rollouts that
    have a teacher: a successful sibling's answer, feedback of their own, or both.

    Args:
        model: See :class:`OnPolicyModule`, as for everything not named here.
        verifier: Judges a response, and may return feedback for the teacher of that very response.
        divergence_alpha: 0 is the forward KL(T||S), 1 the reverse KL(S||T), between them the generalised Jensen-Shannon
            divergence. Default 0.5.
        alpha: SDPO's own name of `divergence_alpha`.
        full_logit_distillation: Compare distributions; if false only the sampled token's log-probabilities (needs alpha 1).
        distillation_topk: Compare over the student's k likeliest tokens only; null for the full vocabulary.
        distillation_add_tail: With top-k, put the rest into one bucket (default) instead of renormalising.
        teacher_regularization: Whose weights the teacher has: ``ema`` (moving average), ``frozen`` (the start), ``live``
            (the student), ``trust-region`` (a mixture of the start's and the student's logits).
        teacher_offload: Keep the teacher's own weights in the host's memory; the device gets a copy while gradients are made.
        teacher_update_rate: Of the average, or weight of the student in the mixture. Default 0.05.
        allocation: Information weights of tokens or responses, of mean 1; null for equal weights.
        demonstration_choice: ``shared``: one success, drawn at random, is shown to all rows of a group but itself, which is shown
            a second one (the reference's rule; the teacher reads it once for all of them). ``independent``: a draw for every row;
            less correlated, and the teacher's forward pass costs up to twice as much.
        dont_reprompt_on_self_success: Never show a response its own text as demonstration.
        remove_thinking_from_demonstration: Drop closed think blocks from demonstrations.
        include_environment_feedback: Show feedback, the verifier's or else the question's `privileged_context`.
        environment_feedback_only_without_solution: Show it only where there is no demonstration.
        max_reprompt_len: Longest teacher prompt in tokens. The demonstration is cut to fit, then the feedback; never the
            question or the template. Default 10240.
        reprompt_template: The teacher's user turn; placeholders {prompt}, {solution}, {feedback}.
        solution_template: What goes into {solution}; placeholder {successful_previous_attempt}.
        feedback_template: What goes into {feedback}; placeholder {feedback_raw}.
        kwargs: See :class:`OnPolicyModule`.
    """

    has_teacher = True

    def __init__(
        self,
        *args: Any,
        divergence_alpha: float | None = None,
        alpha: float | None = None,
        full_logit_distillation: bool = True,
        distillation_topk: int | None = None,
        distillation_add_tail: bool | None = None,
        teacher_regularization: TeacherRegularization = "ema",
        teacher_update_rate: float | None = None,
        teacher_offload: bool = False,
        allocation: Allocation | None = None,
        demonstration_choice: DemonstrationChoice = "shared",
        dont_reprompt_on_self_success: bool = True,
        remove_thinking_from_demonstration: bool = True,
        include_environment_feedback: bool = True,
        environment_feedback_only_without_solution: bool = True,
        max_reprompt_len: int = 10240,
        reprompt_template: str = REPROMPT_TEMPLATE,
        solution_template: str = SOLUTION_TEMPLATE,
        feedback_template: str = FEEDBACK_TEMPLATE,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.divergence_alpha = either("divergence_alpha", divergence_alpha, "alpha", alpha, default=0.5)
        if not 0 <= self.divergence_alpha <= 1:
            raise ValueError(f"Expected `divergence_alpha` to lie in [0, 1], but got {self.divergence_alpha}.")
        if not full_logit_distillation and self.divergence_alpha != 1:
            raise ValueError(
                "Expected `divergence_alpha` 1 with `full_logit_distillation` false, because sampled tokens only give the "
                f"reverse KL, but got {self.divergence_alpha}."
            )
        if distillation_topk is not None and not full_logit_distillation:
            raise ValueError(
                "Expected no `distillation_topk` with `full_logit_distillation` false: it would have no effect."
            )
        if distillation_add_tail is not None and distillation_topk is None:
            raise ValueError("Expected `distillation_topk` with `distillation_add_tail`: without it there is no tail.")
        at_least(1, distillation_topk=distillation_topk)
        one_of(("shared", "independent"), demonstration_choice=demonstration_choice)
        one_of(("ema", "frozen", "live", "trust-region"), teacher_regularization=teacher_regularization)
        if teacher_offload and (teacher_regularization == "live" or self.lora is not None):
            why = "an adapter, which is small" if self.lora is not None else "no weights but the student's"
            raise ValueError(f"Expected no `teacher_offload` with a teacher that has {why}. Set it to false.")
        if teacher_update_rate is not None and teacher_regularization in ("frozen", "live"):
            raise ValueError(
                f"Expected no `teacher_update_rate` with the {teacher_regularization} teacher: it would have no effect."
            )
        self.teacher_update_rate = 0.05 if teacher_update_rate is None else teacher_update_rate
        if not 0 <= self.teacher_update_rate <= 1:
            raise ValueError(f"Expected `teacher_update_rate` to lie in [0, 1], but got {teacher_update_rate}.")
        if max_reprompt_len <= self.max_prompt_length:
            raise ValueError(
                f"Expected `max_reprompt_len` to exceed `max_prompt_length` ({self.max_prompt_length}), because the teacher "
                f"sees the question and more, but got {max_reprompt_len}."
            )
        check_template("reprompt_template", reprompt_template, ("prompt", "solution", "feedback"))
        check_template("solution_template", solution_template, ("successful_previous_attempt",))
        check_template("feedback_template", feedback_template, ("feedback_raw",))
        self.allocation = allocation
        self.full_logit_distillation = full_logit_distillation
        if full_logit_distillation:
            self.divergence = Divergence(self.divergence_alpha, distillation_topk, distillation_add_tail is not False)
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
        )

    def prepare_rows(self, rows: list[Row], rng: random.Random) -> dict[str, float]:
        """Give every row that has a demonstration or feedback its teacher's prompt."""
        encoder = self.encoder
        scalars = self.reprompt.attach(rows, encoder.messages, encoder.tokens, encoder.text, rng)
        scalars["self_distillation/empty_target_batch"] = float(not any(self.in_loss(row) for row in rows))
        return scalars

    def in_loss(self, row: Row) -> bool:
        """Whether the row has a teacher."""
        return row.reprompt_ids is not None

    def loss_tokens(self, rows: list[Row]) -> int:
        """Tokens of the rows that have a teacher."""
        return sum(row.length for row in rows if self.in_loss(row))

    def contexts(self, row: Row) -> list[list[int]]:
        """The student's prompt and the teacher's."""
        return [row.rollout.prompt_ids, row.reprompt_ids]

    def teacher_sources(self, rows: list[Row]) -> list[Source]:
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

    def accumulate_gradients(self, rows: list[Row]) -> float:
        """See :meth:`OnPolicyModule.accumulate_gradients`. The optimizer's step needs no teacher."""
        try:
            return super().accumulate_gradients(rows)
        finally:
            self.teacher.release()

    def objective(self, tokens: TokenStatistics, given: TokenInputs) -> Tensor:
        """Return the divergence of every token, shape ``(n,)``, or the policy-gradient form of it.

        The latter has the per-token advantage log T - log S; its expected gradient is that of KL(S||T).
        """
        if self.full_logit_distillation:
            return tokens.divergence
        return (tokens.log_p_student - tokens.log_p_teacher).detach() * tokens.log_p_student

    def after_update(self) -> None:
        """The teacher follows the student."""
        self.teacher.update(self.model)

    @property
    def longest_prompt(self) -> int:
        """The teacher's prompt is the longest."""
        return self.reprompt.max_reprompt_len

    def make_teacher(self) -> Teacher:
        """Return the self-teacher."""
        teacher = make_teacher(self.teacher_regularization, self.model, self.teacher_update_rate, self.teacher_offload)
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
        """Add the kind of teacher, and what weights it stands still at."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["pgpo_lightning"] |= {"teacher": self.teacher_regularization, "start": _start(self.teacher)}

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
        elif start := checkpoint["pgpo_lightning"].get("start"):  # where no state of the teacher is loaded
            self.teacher.set_extra_state({"identity": start})


def _start(teacher: Teacher | None) -> str | None:
    return teacher.identity if isinstance(teacher, FrozenTeacher) else None
