"""Groups of settings of the self-teacher: whose weights it has, and what it reads (SDPO, arXiv 2601.20802)."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from pgpo_lightning.core.run_settings import ConfigGroup
from pgpo_lightning.core.settings import Count, Fraction, Text, checked
from pgpo_lightning.models.loading import Dtype
from pgpo_lightning.models.quantization import Quantization
from pgpo_lightning.teachers.base import TeacherKind, TeacherRegularization
from pgpo_lightning.teachers.context_kinds import ContextMixture
from pgpo_lightning.teachers.reprompt import (
    FEEDBACK_TEMPLATE,
    REPROMPT_TEMPLATE,
    SOLUTION_TEMPLATE,
    DemonstrationChoice,
    DemonstrationSource,
)
from pgpo_lightning.teachers.schedules import RefreshGate

_PLAIN_TEMPLATE = "{prompt}"
_MOVING = ("ema", "trust-region", "restart")


@partial(checked, prefix="teacher.")
@dataclass(frozen=True)
class TeacherConfig(ConfigGroup):
    """Whose weights the teacher has, and how they follow the student.

    Args:
        regularization: ``ema`` (moving average of the student), ``frozen`` (the start), ``live`` (the student),
            ``trust-region`` (a mixture of the start's and the student's logits), ``restart`` (moves every `period` steps by
            what the average would have moved), ``gated`` (CGTR: a copy of the student, taken when the student has become
            better, see `gate`). Null for ``ema``; with a `model`, whose weights never move, null or ``frozen``.
        update_rate: Of the average (for ``restart`` per step; 1 is a hard copy), or weight of the student in the mixture.
            Default 0.05.
        offload: Keep the teacher's own weights in the host's memory; the device gets a copy while gradients are computed.
        period: Steps between two moves of the ``restart`` teacher. Default 10.
        gate: When the ``gated`` teacher is renewed. Default as in the paper.
        preflight: Before the first optimizer step, sample an answer of the teacher from every reprompt of the batch and as many
            of the student from the plain prompts, and warn if the teacher succeeds significantly less often. Logs
            `self_distillation/net_gap` and its standard error.
        model: Folder or Hub id of another model that is the teacher, ``toy`` for the shipped one. It has the student's tokenizer,
            and any architecture and size. Checkpoints hold only its fingerprint. Null for a teacher made of the student.
        revision: Branch, tag or commit of `model` on the Hub.
        dtype: Type of the weights of `model`, whatever the trainer's precision makes of the student's; null for the student's. Of
            an average (``ema``): ``bfloat16`` for two bytes a weight, with updates in fp32 that are rounded stochastically; null
            for ``float32``.
        quantization: Store the weights of `model` in 4 or 8 bits. Needs bitsandbytes.

    Raises:
        ValueError: If a setting is out of range, or has no effect on this kind of teacher; names the field.
    """

    regularization: TeacherRegularization | None = None
    update_rate: Fraction | None = None
    offload: bool = False
    period: Count | None = None
    gate: RefreshGate | None = None
    preflight: bool = False
    model: Text | None = None
    revision: str | None = None
    dtype: Dtype | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        """Refuse settings that this kind of teacher does not read."""
        self._check_model()
        for name, value, kinds in (
            ("update_rate", self.update_rate, _MOVING),
            ("period", self.period, ("restart",)),
            ("gate", self.gate, ("gated",)),
        ):
            if value is not None and self.kind not in kinds:
                raise ValueError(
                    f"Expected no `teacher.{name}` with the {self.kind} teacher: it would have no effect. Set it to null."
                )
        if self.offload and self.kind == "live":
            raise ValueError(
                "Expected no `teacher.offload` with a teacher that has no weights but the student's. Set it to false."
            )

    def _check_model(self) -> None:
        if self.model is None:
            for name in ("revision", "quantization"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"Expected `teacher.model` with `teacher.{name}`, which is about another model, but got none."
                    )
            self._check_dtype()
            return
        if self.regularization not in (None, "frozen"):
            raise ValueError(
                "Expected no `teacher.regularization` with `teacher.model`, whose weights never move, but got "
                f"{self.regularization}. Set it to frozen."
            )
        if self.preflight:
            raise ValueError(
                "Expected no `teacher.preflight` with `teacher.model`, because it samples from the student's weights, but got "
                "true. Set it to false."
            )
        if self.offload and self.quantization is not None:
            raise ValueError(
                "Expected only one of `teacher.offload` and `teacher.quantization`, because quantised weights stay on the "
                "device, but got both. Set `teacher.offload` to false."
            )

    def _check_dtype(self) -> None:
        if self.dtype is None:
            return
        if self.kind != "ema":
            raise ValueError(
                f"Expected no `teacher.dtype` with the {self.kind} teacher made of the student, but got {self.dtype}. Set it to "
                "null, or `teacher.regularization` to ema."
            )
        if self.dtype == "float16":
            raise ValueError(
                "Expected `teacher.dtype` to be float32 or bfloat16 with the ema teacher, because small weights are zero in "
                "float16, but got float16. Set it to bfloat16."
            )

    @property
    def kind(self) -> TeacherKind:
        """Whose weights the teacher has: the regularization, with its default, or ``external``."""
        return "external" if self.model is not None else self.regularization or "ema"

    @property
    def rate(self) -> float:
        """The update rate, with its default."""
        return 0.05 if self.update_rate is None else self.update_rate

    @property
    def steps(self) -> int:
        """The period, with its default."""
        return 10 if self.period is None else self.period

    def settled(self) -> dict[str, Any]:
        """See :meth:`ConfigGroup.settled`."""
        dtype = None if self.kind == "ema" and self.dtype == "float32" else self.dtype
        known = {"regularization": self.kind, "update_rate": self.rate, "period": self.steps, "dtype": dtype}
        return super().settled() | known


@partial(checked, prefix="reprompt.")
@dataclass(frozen=True)
class RepromptConfig(ConfigGroup):
    """What the self-teacher reads.

    Args:
        demonstration_choice: ``shared``: one success, drawn at random, is shown to all rollouts of a group except itself, which
            is shown a second one (the reference's rule; the teacher reads it once for all of them). ``independent``: a draw
            for every rollout; less correlated, and the teacher's forward pass costs up to twice as much.
        dont_reprompt_on_self_success: Never show a response its own text as demonstration.
        remove_thinking_from_demonstration: Drop thinking blocks from demonstrations, also one that the chat template opens. A
            block that is never closed extends to the end; a response that is all thinking is no demonstration.
        include_environment_feedback: Show feedback, the verifier's or else the question's `privileged_context`.
        environment_feedback_only_without_solution: Show it only where there is no demonstration.
        max_reprompt_len: Longest teacher prompt in tokens. The demonstration is cut to fit, then the feedback; never the
            question or the template.
        reprompt_template: The teacher's user turn; placeholders {prompt}, and {solution} and {feedback} unless there is none.
        solution_template: What goes into {solution}; placeholder {successful_previous_attempt}.
        feedback_template: What goes into {feedback}; placeholder {feedback_raw}.
        demonstration_source: Whose successes are shown: ``siblings``, as above; ``own``, a response's own text if it is right
            (set `dont_reprompt_on_self_success` false); ``column``, a worked solution in the data, to every response;
            ``none``, feedback alone.
        reprompt_without_context: Give a teacher also to rollouts with neither demonstration nor feedback; it reads the reprompt
            template with both left empty, so that the context is the template itself, or nothing.
        contexts: Give batches other kinds of contexts in turn, for controls whose answer is known; null for the above in every
            batch.
        demonstration_column: Column of the data with the worked solutions, as the student would write them, thinking included.
            Null for ``solution``.

    Raises:
        ValueError: If a setting is out of range; names the field.
    """

    demonstration_choice: DemonstrationChoice = "shared"
    dont_reprompt_on_self_success: bool = True
    remove_thinking_from_demonstration: bool = True
    include_environment_feedback: bool = True
    environment_feedback_only_without_solution: bool = True
    max_reprompt_len: Count = 10240
    reprompt_template: str = REPROMPT_TEMPLATE
    solution_template: str = SOLUTION_TEMPLATE
    feedback_template: str = FEEDBACK_TEMPLATE
    demonstration_source: DemonstrationSource = "siblings"
    reprompt_without_context: bool = False
    contexts: ContextMixture | None = None
    demonstration_column: Text | None = None

    @property
    def adds_nothing(self) -> bool:
        """Whether the teacher reads the student's prompt."""
        return self.reprompt_template == _PLAIN_TEMPLATE

    def builder_settings(self) -> dict[str, Any]:
        """Return the fields that :class:`RepromptBuilder` has."""
        return {name: value for name, value in vars(self).items() if name != "contexts"}


def plain_prompt(max_prompt_length: int) -> RepromptConfig:
    """Return the settings of a teacher that reads the student's prompt, for every response.

    Args:
        max_prompt_length: Longest student prompt in tokens.
    """
    return RepromptConfig(
        include_environment_feedback=False,
        max_reprompt_len=max_prompt_length,
        reprompt_template=_PLAIN_TEMPLATE,
        demonstration_source="none",
        reprompt_without_context=True,
    )
