"""A teacher with the weights of another model (on-policy distillation), of any architecture, with the student's tokenizer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pgpo_lightning.losses.logits import Head, Source
from pgpo_lightning.models.layouts import packings
from pgpo_lightning.models.lm_head import check_head
from pgpo_lightning.models.loading import load_model, load_tokenizer, positions
from pgpo_lightning.models.packing import PackedSequences
from pgpo_lightning.models.shards import gathered
from pgpo_lightning.models.soundness import check_padding
from pgpo_lightning.teachers.configs import TeacherConfig
from pgpo_lightning.teachers.frozen import FrozenTeacher


class ExternalTeacher(FrozenTeacher):
    """Another model, which never moves. It is not saved: the checkpoint holds only its fingerprint.

    Its hidden states and its head have sizes of their own. Rows of its head beyond the student's are padding of the vocabulary,
    which the student cannot sample; they are left out.

    Args:
        model: The teacher's model, which is not copied.
        rows: Rows of the student's head, V.
        offload: See :class:`OwnWeights`.
        keeps_dtype: Whether the weights keep their type where the trainer's precision changes the student's.
        longest: Most tokens of prompt and response together in this run.

    Raises:
        MisconfigurationException: If the model has fewer rows than the student, cannot hold the longest sequence, or computes
            something else in the layouts of a batch; names `teacher.model`.
    """

    external = True
    field = "model.teacher.model` to the teacher of the interrupted run, loaded as it was"

    def __init__(
        self, model: PreTrainedModel, rows: int, *, offload: bool = False, keeps_dtype: bool = False, longest: int = 1
    ) -> None:
        with gathered(model.eval()):
            check_head(model)
            check_size(model, rows, longest)
            check_padding(model, longest)
            packing = packings(model, longest, None)[1]
        super().__init__(model, offload, copies=False)
        self.rows, self.keeps_dtype, self.packing = rows, keeps_dtype, packing

    def own(self, sequences: PackedSequences, weight: float = 1.0) -> Source:
        """See :meth:`OwnWeights.own`."""
        found = super().own(sequences, weight)
        return replace(found, head=self._known(found.head))

    def head(self, student: PreTrainedModel) -> Head:
        """See :meth:`Teacher.head`."""
        return self._known(super().head(student))

    def _known(self, head: Head) -> Head:
        return head if len(head.weight) == self.rows else replace(head, weight=head.weight[: self.rows])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if not self.keeps_dtype:
            return super()._apply(fn, recurse)
        if self.device_copy is not None:
            return self  # stays on the host
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)


def check_size(model: PreTrainedModel, rows: int, longest: int) -> None:
    """Check that a teacher has a row for every token of the student, and positions for the longest sequence.

    Args:
        model: The teacher's model.
        rows: Rows of the student's head.
        longest: Most tokens of prompt and response together.

    Raises:
        MisconfigurationException: Names `teacher.model`.
    """
    own, available = len(model.get_output_embeddings().weight), positions(model.config)
    if own < rows:
        raise MisconfigurationException(
            f"Expected `teacher.model` to predict the {rows} tokens of `model`, but {type(model).__name__} has {own} rows in its "
            f"head. Save it after `model.resize_token_embeddings({rows})`, or choose another teacher."
        )
    if available is not None and longest > available:
        raise MisconfigurationException(
            f"Expected prompt and response to fit into the {available} positions of `teacher.model`, but the limits allow "
            f"{longest} tokens. Lower `max_response_length`, `max_prompt_length` or `reprompt.max_reprompt_len`."
        )


def load_external(
    config: TeacherConfig, tokenizer: PreTrainedTokenizerBase, rows: int, loading: dict[str, Any], longest: int
) -> ExternalTeacher:
    """Load the teacher of a configuration.

    Args:
        config: With a `model`.
        tokenizer: The student's.
        rows: Rows of the student's head.
        loading: How the student was loaded, as the arguments of :func:`~pgpo_lightning.models.loading.load_model`.
        longest: Most tokens of prompt and response together in this run.

    Raises:
        MisconfigurationException: If its tokenizer or its model does not go with the student; names `teacher.model`.
    """
    name = config.model or ""
    trusts = loading.get("trust_remote_code", False)
    check_tokenizer(name, load_tokenizer(name, config.revision, trusts), tokenizer)
    model = load_model(
        name,
        dtype=config.dtype or loading.get("dtype", "float32"),
        attn_implementation=loading.get("attn_implementation"),
        revision=config.revision,
        trust_remote_code=trusts,
        quantization=config.quantization,
        mesh=loading.get("mesh"),
    )
    keeps = config.dtype is not None or config.quantization is not None
    return ExternalTeacher(model, rows, offload=config.offload, keeps_dtype=keeps, longest=longest)


def check_tokenizer(name: str, theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase) -> None:
    """Check that a teacher reads the student's tokens as the student does.

    Args:
        name: Folder or Hub id of the teacher.
        theirs: The teacher's tokenizer.
        ours: The student's.

    Raises:
        MisconfigurationException: If a token has another number, or only one of them has it; names `teacher.model` and the
            first difference.
    """
    known, wanted = theirs.get_vocab(), ours.get_vocab()
    different = {i for _, i in known.items() ^ wanted.items()}
    if different:
        first = min(different)
        has, needs = ({i: token for token, i in each.items()}.get(first) for each in (known, wanted))
        raise MisconfigurationException(
            f"Expected `teacher.model` to have the vocabulary of `model`, because it reads the student's tokens, but `{name}` "
            f"has {len(known)} tokens and `model` {len(wanted)}, {len(different)} numbers differ, and number {first} is "
            f"{_token(has)} instead of {_token(needs)}. Choose a teacher with the same tokenizer."
        )
    if theirs.eos_token_id != ours.eos_token_id:
        rank_zero_warn(
            f"`teacher.model` ({name}) ends a response with {theirs.eos_token!r}, the student with {ours.eos_token!r}: the "
            "student learns to end as the teacher does, and its responses may run to the limit."
        )


def _token(token: str | None) -> str:
    return "no token" if token is None else f"{token!r:.40}"
