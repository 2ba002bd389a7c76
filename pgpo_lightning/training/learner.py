"""From samples to gradients to weights, without a Trainer: the forward passes of student and teacher, and the optimizer step."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pgpo_lightning.core.devices import moved
from pgpo_lightning.core.types import Sample
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.distributed.fsdp import FullySharded, Placement, Replicated, full_tensor
from pgpo_lightning.losses.fused import Source, TokenStatistics, linear_distillation, linear_statistics
from pgpo_lightning.losses.step_statistics import StepStatistics
from pgpo_lightning.models.lm_head import head, source
from pgpo_lightning.models.loading import evaluating
from pgpo_lightning.models.packing import PackedSequences, Packing, Sequences
from pgpo_lightning.teachers.base import Teacher
from pgpo_lightning.training.configs import UpdateConfig
from pgpo_lightning.training.mini_batches import Pass, TokenInputs, micro_batches, prompts_of, student_prompt
from pgpo_lightning.training.objective import Objective, Route
from pgpo_lightning.training.rates import ScaledRates


@dataclass
class Step:
    """What one optimizer step is made of. The gradients are in the parameters.

    Attributes:
        loss: Summed over micro-batches, averaged over ranks.
        statistics: One row per sequence in the loss, of all ranks.
        scalars: To log.
    """

    loss: float
    statistics: StepStatistics
    scalars: dict[str, float] = field(default_factory=dict)


class Learner:
    """Computes gradients of an objective and applies them.

    Args:
        model: The student.
        objective: What the loss is.
        update: Limits of passes, and how losses are averaged.
        teacher: The self-teacher, if the objective has one.
        placement: Where the weights are.
        temperature: Logits of student and teacher are divided by it: the temperature that the rollouts were sampled at.
        importance_weight_cap: Upper bound of a token's importance weight, trainer over sampler; null for no weight.
        pad_token_id: Any valid token id.
        packings: Layouts of the student's sequences and of the teacher's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        update: UpdateConfig | None = None,
        *,
        teacher: Teacher | None = None,
        placement: Placement | None = None,
        temperature: float = 1.0,
        importance_weight_cap: float | None = 2.0,
        pad_token_id: int = 0,
        packings: tuple[Packing, Packing] = (Packing(), Packing()),
    ) -> None:
        self.model = model
        self.objective = objective
        self.update = update or UpdateConfig()
        self.teacher = teacher
        self.placement = placement or Replicated()
        self.temperature = temperature
        self.importance_weight_cap = importance_weight_cap
        self.pad_token_id = pad_token_id
        self._packings = packings
        self.rates = ScaledRates()
        self.skipped = 0
        """Optimizer steps that were skipped because loss or gradient were not finite."""
        self.skipped_in_a_row = 0

    def accumulate(
        self,
        samples: list[Sample],
        backward: Callable[[Tensor], Any] = Tensor.backward,
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Step:
        """Run forward and backward passes over the samples of one optimizer step, in micro-batches.

        Args:
            samples: Prepared by the objective; this rank's.
            backward: Adds the gradients of a loss to the parameters.
            no_sync: Context in which gradients are not exchanged between ranks; all backward passes but the last run in it.
        """
        if self.update.loss_agg_mode == "token-mean":
            tokens = gather(self.objective.normalizer(samples))
            scale = len(tokens) / max(1, sum(tokens))  # ranks' gradients are averaged, not summed
        else:
            scale = 1 / len(samples)
        step = Step(0.0, StepStatistics.empty())
        parts = []
        try:
            for route in self.objective.routes(samples):
                contexts = None if route.taught else student_prompt
                passes = self.passes(route.samples, samples, contexts, route.taught, route.contrasted)
                loss, statistics, weights = self._accumulate(route, passes, scale, backward, no_sync)
                if self.objective.token_weights is not None and route.taught:  # before other routes add to the gradient
                    mean = self._normalize_token_weights(weights)
                    loss = loss / mean
                    step.scalars["information/allocation_mean"] = mean
                step.loss = step.loss + loss
                parts.append(statistics)
        finally:
            if self.teacher is not None:
                self.teacher.release()
        step.statistics = StepStatistics.concatenate(parts)
        return step

    def _accumulate(
        self,
        route: Route,
        passes: list[Pass],
        scale: float,
        backward: Callable[[Tensor], Any],
        no_sync: Callable[[], AbstractContextManager[Any]],
    ) -> tuple[float, StepStatistics, Tensor]:
        """Return loss and statistics of some passes of all ranks, and their coefficients with and without token weights."""
        total: Tensor | float = 0.0
        statistics, weights = [], torch.zeros(2, device=self.model.device)
        if isinstance(self.placement, FullySharded):
            no_sync = self.placement.between_passes(self.update.reduce_every_pass)
        for i, group in enumerate(passes):
            with nullcontext() if i == len(passes) - 1 else no_sync():
                weight = scale if group.counts else 0.0
                loss, part, part_weights = self.placement.run(partial(self._micro_batch, route, group.samples, weight))
                backward(loss)
            if group.counts:
                statistics.append(part)
                weights += part_weights
            total = total + loss.detach()
        everyone = gather((StepStatistics.concatenate(statistics).table().cpu(), float(total), weights.cpu()))
        seen = StepStatistics.from_table(torch.cat([table for table, *_ in everyone]))
        mean_loss = sum(value for _, value, _ in everyone) / len(everyone)
        return mean_loss, seen, reduce(torch.add, [coefficients for *_, coefficients in everyone])

    def _normalize_token_weights(self, weights: Tensor) -> float:
        """Divide the gradient by the mean weight of all weighted tokens of the step, known only now, and return it."""
        mean = float(weights[0] / weights[1]) if weights[1] > 0 else 1.0
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(mean)
        return mean

    def _micro_batch(self, route: Route, samples: list[Sample], scale: float) -> tuple[Tensor, StepStatistics, Tensor]:
        """Return the loss of some samples, their statistics, and their coefficients with and without token weights."""
        sequences = self.pack([(sample.rollout.prompt_ids, sample.rollout.response_ids) for sample in samples])
        by_sequence = self.update.loss_agg_mode == "seq-mean-token-mean"
        given = TokenInputs.from_samples(samples, sequences.lengths, scale, by_sequence=by_sequence)
        if route.contrasted:  # before the student's activations take memory
            given = replace(given, contrast=self.contrast_log_probs(samples))
        token_weights = self.objective.token_weights if route.taught else None
        divergence = self.objective.divergence

        def weighted(tokens: TokenStatistics, part: slice) -> Tensor:
            inputs = given[part]
            loss = route.token_loss(tokens, inputs) * self.importance_weight(tokens, inputs) * inputs.coefficient
            if token_weights is not None and token_weights.unit == "token":
                loss = loss * token_weights.weights(tokens)
            return loss

        student = source(self.model, sequences)
        teacher = self.teacher_sources(samples) if route.taught else []
        by_response = None if token_weights is None or token_weights.unit == "token" else token_weights
        if by_response is not None or route.factors is not None:
            tokens = linear_statistics(student, teacher, sequences.targets, divergence, self.temperature)
            if route.factors is not None:
                given = replace(given, advantage=given.advantage * route.factors(tokens, sequences.lengths))
            losses = weighted(tokens, slice(None))
            loss = losses.sum() if by_response is None else losses @ by_response.weights(tokens, sequences.lengths)
            tokens = TokenStatistics(*(values.detach() for values in tokens))
        else:
            loss, tokens = linear_distillation(
                student, teacher, sequences.targets, weighted, divergence, self.temperature
            )
        values, weight = route.token_loss(tokens, given), self.importance_weight(tokens, given)
        device = self.model.device
        judged = [[s.verdict.reward for s in samples], [s.rollout.question.index for s in samples]]
        rewards, questions = moved([torch.tensor(values, dtype=torch.float32) for values in judged], device)
        statistics = StepStatistics.from_tokens(
            tokens, values, given.sampler, weight, sequences.lengths, rewards, questions, bool(teacher)
        )
        if given.demonstration is not None:  # statistics are of what the student sampled
            own = [i for i, sample in enumerate(samples) if not sample.demonstration]
            statistics = StepStatistics.from_table(statistics.table()[own])
        shared_out = given.coefficient
        if token_weights is not None:
            shared_out = shared_out * token_weights.weights(tokens, sequences.lengths)
        return loss, statistics, torch.stack([shared_out.sum(), given.coefficient.sum()])

    def importance_weight(self, tokens: TokenStatistics, given: TokenInputs) -> Tensor:
        """Return the importance weight of every token, ``(n,)``: the trainer's probability over the sampler's, without gradient.

        Capped from above only. 1 for tokens of demonstrations, which no sampler drew.
        """
        if self.importance_weight_cap is None:
            return torch.ones_like(given.sampler)
        ratio = (given.old_log_probs(tokens) - given.sampler).clamp(-20, 20).exp()
        weight = ratio.clamp(max=self.importance_weight_cap)
        return weight if given.demonstration is None else torch.where(given.demonstration, 1.0, weight)

    def teacher_sources(self, samples: list[Sample]) -> list[Source]:
        """Run the teacher on (reprompt, response), or return what it said in an earlier pass over the batch."""
        teacher = self.teacher
        if teacher is None:
            return []
        keeps = self._keeps_teacher
        known = [sample.teacher_hidden for sample in samples if sample.teacher_hidden is not None]
        if keeps and len(known) == len(samples):
            return [Source(torch.cat(known), teacher.head(self.model))]
        pairs = [(s.reprompt_ids, s.rollout.response_ids) for s in samples if s.reprompt_ids is not None]
        sources = teacher.sources(self.model, self.pack(pairs, for_teacher=True))
        if keeps:
            hidden = sources[0].hidden.split([sample.length for sample in samples])
            for sample, states in zip(samples, hidden, strict=True):
                sample.teacher_hidden = states
        return sources

    @property
    def _keeps_teacher(self) -> bool:
        """Whether what the teacher says is kept for later passes over the batch.

        Under sharded weights all ranks run the teacher equally often, whatever samples they have.
        """
        moves = self.teacher is None or self.teacher.moves_with_student
        return self.update.num_iterations > 1 and not moves and not self.placement.sharded

    @torch.no_grad()
    def contrast_log_probs(self, samples: list[Sample]) -> Tensor:
        """Return the teacher's log-probabilities (nats) of the responses after their second prompt, ``(N,)``."""
        known = [sample.contrast_log_probs for sample in samples if sample.contrast_log_probs is not None]
        if self.teacher is None or (self._keeps_teacher and len(known) == len(samples)):
            return torch.cat(known)
        pairs = [(s.contrast_ids, s.rollout.response_ids) for s in samples if s.contrast_ids is not None]
        sequences = self.pack(pairs, for_teacher=True)
        sources = self.teacher.sources(self.model, sequences)
        # With the student's head, if it fits, products have the precision of the first pass, and equal prompts give no evidence.
        first, own = sources[0], head(self.model)
        student = Source(first.hidden, own if own.weight.size(1) == first.hidden.size(1) else first.head)
        tokens = linear_statistics(student, sources, sequences.targets, temperature=self.temperature)
        found = tokens.log_p_teacher
        if self._keeps_teacher:
            for sample, log_probs in zip(samples, found.split(sequences.lengths.tolist()), strict=True):
                sample.contrast_log_probs = log_probs
        return found

    def gradients(
        self, samples: list[Sample], backward: Callable[[Tensor], Any] = Tensor.backward, scaler: Any = None
    ) -> list[Tensor]:
        """Return the gradients of what the objective routes now, and leave none in the parameters.

        Args:
            samples: Samples of the optimizer step.
            backward: As for :meth:`accumulate`.
            scaler: The gradient scaler that `backward` uses, if there is one.
        """
        scale = 1.0 if scaler is None else scaler.get_scale()
        self.accumulate(samples, backward)
        found = [p.grad / scale for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad()
        return found

    @torch.no_grad()
    def log_probs(
        self, samples: list[Sample], batch: list[Sample], temperature: float | None = None, of_teacher: bool = False
    ) -> list[tuple[Sample, Tensor]]:
        """Return samples with the log-probabilities of their response tokens under the student as it is now, without dropout.

        Under sharded weights all ranks have to call it together.

        Args:
            samples: Whose responses; there may be none.
            batch: All samples of this rank.
            temperature: Logits are divided by it; null for that of the rollouts.
            of_teacher: Of the teacher in place of the student, after the student's prompt.

        Returns:
            Every sample with a tensor of shape ``(len(response_ids),)``, in nats.
        """
        found: list[tuple[Sample, Tensor]] = []
        if not any(gather(len(samples)) if self.placement.sharded else [len(samples)]):
            return found
        with evaluating(self.model):
            for group in self.passes(samples, batch, student_prompt):
                parts = self.placement.run(
                    partial(self._log_probs, group.samples, temperature or self.temperature, of_teacher)
                )
                found += zip(group.samples, parts, strict=True) if group.counts else ()
        return found

    def _log_probs(self, samples: list[Sample], temperature: float, of_teacher: bool) -> tuple[Tensor, ...]:
        sequences = self.pack([(sample.rollout.prompt_ids, sample.rollout.response_ids) for sample in samples])
        teacher = self.teacher if of_teacher else None
        states = source(self.model, sequences) if teacher is None else teacher.sources(self.model, sequences)[0]
        tokens = linear_statistics(states, [], sequences.targets, temperature=temperature)
        return tokens.log_p_student.split(sequences.lengths.tolist())

    def passes(
        self,
        samples: list[Sample],
        batch: list[Sample],
        contexts: Callable[[Sample], list[list[int]]] | None = None,
        taught: bool = True,
        contrasted: bool = False,
    ) -> list[Pass]:
        """Return the forward passes over some samples; at least one, and under sharded weights as many on every rank.

        Args:
            samples: In the loss; there may be none.
            batch: All samples of this rank. The first stands in where a rank has to make a dummy pass.
            contexts: The prompts that a pass puts before a sample's response; by default the student's and the teacher's.
            taught: Whether a dummy pass has a teacher.
            contrasted: Whether its teacher has a second prompt.
        """
        budget, sharded = self.update.micro_batch_tokens, self.placement.sharded
        groups = micro_batches(samples, budget, contexts or prompts_of, self.packings, sharded)
        passes = [Pass(group, counts=True) for group in groups]
        wanted = max(gather(len(passes))) if self.placement.sharded else 1
        return passes + [Pass([batch[0].stand_in(taught, contrasted)], counts=False)] * (max(1, wanted) - len(passes))

    def pack(self, pairs: list[tuple[list[int], list[int]]], for_teacher: bool = False) -> PackedSequences:
        """Lay out (prompt, response) pairs on the model's device."""
        return Sequences.pack(pairs, self.pad_token_id, self.model.device, self.packings[for_teacher])

    @property
    def packings(self) -> tuple[Packing, Packing]:
        """Layouts of student and teacher. Under sharded weights no rank may decide alone to run a model twice."""
        student, teacher = self._packings
        return (student.on_all_ranks(), teacher.on_all_ranks()) if self.placement.sharded else self._packings

    def apply(
        self,
        optimizer: Any,
        step: Step,
        scalars: dict[str, float] | None = None,
        scaler: Any = None,
        number: int = 0,
    ) -> bool:
        """Clip the gradients and take the optimizer step, unless loss or gradient are not finite.

        Args:
            optimizer: Optimizer of the model's parameters.
            step: What :meth:`accumulate` returned.
            scalars: Gets loss, gradient norm and learning rate before the step is taken, for hooks of the optimizer.
            scaler: A gradient scaler of half precision, if there is one.
            number: Batches trained on so far, for messages.

        Returns:
            Whether the step was taken.

        Raises:
            RuntimeError: After `update.max_skipped_steps` skipped steps in a row.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        limit = float("inf") if self.update.max_grad_norm is None else self.update.max_grad_norm
        scale = 1.0 if scaler is None else scaler.get_scale()
        norm = float(full_tensor(torch.nn.utils.clip_grad_norm_(parameters, limit * scale))) / scale
        if scalars is not None:
            rate = float(optimizer.param_groups[0]["lr"])
            scalars |= {"actor/pg_loss": step.loss, "actor/grad_norm": norm, "lr/base": rate}
        if torch.isfinite(torch.tensor([step.loss, norm])).all():
            try:
                optimizer.step()
            finally:
                self.rates.restore()
            optimizer.zero_grad()  # not before the next backward: generation needs the memory
            self.skipped_in_a_row = 0
            return True
        if scaler is not None and scale > 1:  # half precision looks for its scale: that is no failure of the run
            scaler.unscale_(getattr(optimizer, "optimizer", optimizer))  # notes what is not finite
            scaler.update()
            self.skipped_in_a_row -= 1
        optimizer.zero_grad()
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.update.max_skipped_steps:
            raise RuntimeError(
                f"Expected finite losses and gradients, but {self.skipped_in_a_row} optimizer steps in a row had none "
                f"(loss {step.loss}, gradient norm {norm} at step {number}); the weights were left as they were before them. "
                "Lower the learning rate, or raise `update.max_skipped_steps`. The last checkpoint is good."
            )
        return False

    def move_teacher(self) -> None:
        """Let the teacher follow the student. Called once per batch, if at least one optimizer step was taken."""
        if self.teacher is not None:
            self.teacher.update(self.model)
