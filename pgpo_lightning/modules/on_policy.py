"""The step that every module of the collection shares: sample, judge, learn (PGPO's Algorithm 1, arXiv 2606.03620).

A subclass says what a row of the loss is and what its loss is. The size of the step is none of its business: a callback may
rescale the learning rate of this one step, from :attr:`OnPolicyModule.step_statistics`.
"""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pgpo_lightning.core.seeding import seeded
from pgpo_lightning.core.settings import Count, Natural, Nucleus, Positive, Range, Seed, Temperature, checked
from pgpo_lightning.core.types import Question, Sample
from pgpo_lightning.distributed.collectives import gather, together
from pgpo_lightning.distributed.fsdp import Replicated
from pgpo_lightning.losses.divergence import Divergence
from pgpo_lightning.losses.fused import Source, TokenStatistics, linear_distillation, linear_statistics
from pgpo_lightning.losses.step_statistics import StepStatistics
from pgpo_lightning.losses.token_weights import Allocation
from pgpo_lightning.models.lm_head import source
from pgpo_lightning.models.loading import Dtype, checked_tokenizer, evaluating, fp32_by_default, load_tokenizer
from pgpo_lightning.models.lora import LoRA, check_settings
from pgpo_lightning.models.packing import PromptSharing, Sequences, SharedSequences
from pgpo_lightning.models.quantization import Quantization
from pgpo_lightning.modules.reports import Reporting
from pgpo_lightning.rewards.grade import Verifier
from pgpo_lightning.rollout.checks import check_batch
from pgpo_lightning.rollout.engine import Engine, Sampling
from pgpo_lightning.rollout.mismatch import check_sampler
from pgpo_lightning.rollout.prompts import PromptEncoder
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from pgpo_lightning.teachers.base import Teacher
from pgpo_lightning.training.mini_batches import Pass, TokenInputs, micro_batches, mini_batches

LossAggregation = Literal["seq-mean-token-mean", "token-mean"]


@checked
class OnPolicyModule(Reporting):
    """Trains a language model on its own samples, one optimizer step (or a few) per batch of questions.

    Args:
        model: Folder or Hub id of a causal language model, ``toy`` for the shipped one, or a model object.
        verifier: Judges a response: any callable ``(question, response) -> reward``, ``(reward, feedback)`` or
            :class:`~pgpo_lightning.core.types.Verdict`, by its import path.
        tokenizer: Folder, Hub id or object; by default the model's.
        engine: What samples the rollouts; by default the model's own ``generate``.
        num_generations: Rollouts per question.
        max_prompt_length: Longest prompt in tokens; longer ones are dropped from the data, counted and reported.
        max_response_length: Longest response in tokens.
        temperature: Of the rollouts, 0.0001 to 100; logits of student and teacher are divided by it too.
        enable_thinking: Thinking mode of the chat template.
        eval_samples: k of avg@k, pass@k and majority@k.
        eval_temperature: Temperature in evaluation.
        eval_top_p: Nucleus in evaluation, 0.001 to 1.
        optimizer: From parameters to an optimizer.
        scheduler: From an optimizer to a schedule, stepped once per batch, also where no optimizer step was taken.
        max_grad_norm: Gradients are clipped to this norm; null for no clipping.
        updates_per_batch: Optimizer steps per batch, each on its share of the questions. Lightning's `max_steps` counts
            optimizer steps, those that are left out because no rollout of any rank is in the loss included; curves,
            checkpoints and schedule count batches.
        num_iterations: Passes over each batch, each with `updates_per_batch` optimizer steps. A teacher that stands still
            within a batch is run in the first one only.
        micro_batch_tokens: Most padded tokens of one forward pass. A prompt that several rows share counts, and is run, once.
        loss_agg_mode: ``seq-mean-token-mean``: mean over each response's tokens, then over *all* rollouts of the optimizer step,
            those without a loss counting as zero, as SDPO's code effectively does; ``token-mean``: mean over all tokens in the
            loss of the optimizer step. Both are over all ranks and micro-batches, and with `updates_per_batch` over the share
            of the batch that the step is on, as in verl.
        is_clip: Upper bound of the importance weight between trainer and sampler; null for no weight.
        max_sampler_gap: Stop the run when trainer and sampler differ by more than this in the log-probability of a sampled token
            (mean size, nats per token, first update of a batch); null never stops.
        success_reward_threshold: Rewards from here on count as success.
        on_verifier_error: What happens when the verifier raises or returns no finite number: ``raise`` stops the run,
            ``zero`` gives that response a reward of 0 and counts it.
        max_skipped_steps: Steps in a row that may be skipped because of a loss or gradient that is not finite.
        gradient_checkpointing: Recompute activations in the backward pass.
        dtype: Type of the weights; keep float32 for mixed precision.
        attn_implementation: As in transformers.
        revision: Branch, tag or commit of model and tokenizer on the Hub.
        trust_remote_code: Run Python code that comes with model or tokenizer.
        lora: Train an adapter and leave the model's weights as they are; null for training all weights. Needs peft.
        quantization: Store the weights under the adapter in 4 or 8 bits; null for `dtype`.
        seed: Of every random choice of the run: sampling, adapters, evaluation. Null takes the one that
            ``lightning.seed_everything`` (on the command line `seed_everything`) was given, else 0, when a Trainer starts.

    Raises:
        ValueError: If a setting is out of range or contradicts another; names the field.
    """

    step_statistics: StepStatistics
    """One row per sequence in the loss of the current optimizer step, of all ranks. Set before ``optimizer.step()``."""

    def __init__(
        self,
        model: str | PreTrainedModel,
        verifier: Verifier,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        engine: Engine | None = None,
        num_generations: Count = 8,
        max_prompt_length: Count = 2048,
        max_response_length: Count = 8192,
        temperature: Temperature = 1.0,
        enable_thinking: bool = False,
        eval_samples: Count = 16,
        eval_temperature: Temperature = 0.6,
        eval_top_p: Nucleus = 0.95,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.01),
        scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: Annotated[float, Range(least=1e-6, most=1e6)] | None = 1.0,
        updates_per_batch: Count = 1,
        num_iterations: Count = 1,
        micro_batch_tokens: Count = 16384,
        loss_agg_mode: LossAggregation = "seq-mean-token-mean",
        is_clip: Positive | None = 2.0,
        max_sampler_gap: Positive | None = 0.1,
        success_reward_threshold: float = 0.5,
        on_verifier_error: Literal["raise", "zero"] = "raise",
        max_skipped_steps: Natural = 5,
        gradient_checkpointing: bool = False,
        dtype: Dtype = "float32",
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        lora: LoRA | None = None,
        quantization: Quantization | None = None,
        seed: Seed | None = None,
    ) -> None:
        super().__init__()
        check_settings(model, lora, quantization)
        self.automatic_optimization = False
        self.verifier = verifier
        self.engine = engine or TransformersEngine()
        self.num_generations = num_generations
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self.temperature = temperature
        self.eval_samples = eval_samples
        self.eval_sampling = Sampling(max_response_length, eval_temperature, eval_top_p)
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.max_grad_norm = max_grad_norm
        self.updates_per_batch = updates_per_batch
        self.num_iterations = num_iterations
        self.micro_batch_tokens = micro_batch_tokens
        self.loss_agg_mode = loss_agg_mode
        self.is_clip = is_clip
        self.max_sampler_gap = max_sampler_gap
        self.success_reward_threshold = success_reward_threshold
        self.on_verifier_error = on_verifier_error
        self.max_skipped_steps = max_skipped_steps
        self.gradient_checkpointing = gradient_checkpointing
        self.given_seed = seed

        self.model: PreTrainedModel | None = None
        self.teacher: Teacher | None = None
        self.placement = Replicated()
        object.__setattr__(self, "given_model", model)  # or a checkpoint would hold a model object twice
        self.lora = lora
        self.base_identity = None
        hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.loading = {**hub, "dtype": dtype, "attn_implementation": attn_implementation, "quantization": quantization}
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            self.tokenizer = checked_tokenizer(tokenizer)
        else:
            name = tokenizer or (model if isinstance(model, str) else model.config._name_or_path)
            self.tokenizer = load_tokenizer(name, **hub)
        self.encoder = PromptEncoder(self.tokenizer, enable_thinking)

        self.steps = 0  # batches trained on; unlike Lightning's global_step it counts skipped optimizer steps too
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.steps_without_signal = 0
        self.verifier_errors = self._new_verifier_errors = 0
        self.step_statistics = StepStatistics.empty()
        self.scalars = {}
        self._rates = []
        self.training_run = True
        self._timing: dict[str, float] = defaultdict(float)

    # ------------------------------------------------------------------------------------------------ the step

    def training_step(self, questions: list[Question], batch_idx: int) -> None:
        """One pass of Algorithm 1 over a batch of questions."""
        check_batch(questions)
        with seeded(self.seed, "train", self.steps, self.global_rank) as rng, fp32_by_default(), self._timed("step"):
            with together():  # what fails on one rank alone ends all of them
                with self._timed("gen"):
                    rollouts = self.sample(questions, self.num_generations, self._training_sampling)  # y ~ π(·|x)
                with self._timed("reward"):
                    verdicts = self.judge(rollouts)
                with self._timed("adv"):
                    rows = [Sample(rollout, verdict) for rollout, verdict in zip(rollouts, verdicts, strict=True)]
                    self.scalars = self.prepare_rows(rows, rng)  # f: demonstrations, feedback; or advantages
            with self._timed("adv"):
                self.check_answers(rows)
            with self._timed("update_actor"):
                updated, seen, missed = False, [], []
                learned = [row.replaced_by or row for row in rows]  # a demonstration may stand in for a failure
                for share in [*mini_batches(learned, self.updates_per_batch)] * self.num_iterations:
                    if not any(gather(any(self.in_loss(row) for row in share))):
                        missed.append(share)
                        self.leave_out()
                        continue
                    loss = self.accumulate_gradients(share)  # g, and H(y|x), H(y|x,f) of every row
                    if not seen:  # later updates find a policy that has moved
                        self.scalars |= check_sampler(self.step_statistics, self.max_sampler_gap, self.steps)
                        self.check_information()
                    updated |= self.update(loss)  # a callback reads I, scales the step by ρ
                    seen.append(self.step_statistics)
                if updated:
                    self.after_update()  # the teacher follows
                for row in rows:
                    row.teacher_hidden = None
                self._advance_schedule()
        self.steps += 1
        self.tell_of_missing_signal(missed)
        self.report(rows, seen[0] if seen else StepStatistics.empty())

    @abstractmethod
    def prepare_rows(self, rows: list[Sample], rng: Any) -> dict[str, float]:
        """Give rows what their loss needs, in place; return scalars to report.

        Args:
            rows: All rows of the batch, those to one question next to each other.
            rng: Source of random choices.
        """

    @abstractmethod
    def in_loss(self, row: Sample) -> bool:
        """Whether a row takes part in the loss. The others cost no forward pass."""

    @abstractmethod
    def loss_tokens(self, rows: list[Sample]) -> int:
        """Return the number of tokens that ``token-mean`` divides by."""

    def contexts(self, row: Sample) -> list[list[int]]:
        """Return the prompts that the row's forward passes put before its response, the student's first."""
        return [row.rollout.prompt_ids]

    def teacher_sources(self, rows: list[Sample]) -> list[Source]:
        """Run the teacher over the rows, if the objective has one."""
        return []

    def parts(self, rows: list[Sample]) -> list[list[Sample]]:
        """Return the rows in the loss in parts that never share a pass; those with a teacher come first."""
        return [rows]

    allocation: Allocation | None = None
    """Whether the tokens or responses with a teacher share the step by their information."""

    divergence: Divergence | None = None
    """Which divergence between student and teacher the objective asks for, if any."""

    @property
    def measured(self) -> Divergence | None:
        """Which divergence is reported: that of the objective, or what an objective without one names."""
        return self.divergence

    @abstractmethod
    def objective(self, tokens: TokenStatistics, given: TokenInputs) -> Tensor:
        """Return the loss of some response tokens, shape ``(n,)``, before importance weights.

        Args:
            tokens: What student and teacher say about them. Divergence, student's log-probability and student's entropy
                carry gradients.
            given: What was known before the forward pass.
        """

    def after_update(self) -> None:
        """Run once per batch, if at least one optimizer step was taken."""

    # ------------------------------------------------------------------------------------------- gradients, update

    def accumulate_gradients(self, rows: list[Sample]) -> float:
        """Run forward and backward over the rows in micro-batches and set :attr:`step_statistics`.

        Returns:
            The loss of the step, summed over micro-batches, averaged over ranks.
        """
        if self.loss_agg_mode == "token-mean":
            tokens = gather(self.loss_tokens(rows))
            scale = len(tokens) / max(1, sum(tokens))  # ranks' gradients are averaged, not summed
        else:
            scale = 1 / len(rows)
        parts = self.parts([row for row in rows if self.in_loss(row)])
        losses, seen = 0.0, []
        for number, part in enumerate(parts):
            loss, statistics, shared_out = self._accumulate(self.passes(part, rows, taught=number == 0), scale)
            if self.allocation is not None and number == 0:  # before the others add to the gradient
                loss = loss / self._share_out(shared_out)
            losses = losses + loss
            seen.append(statistics)
        self.step_statistics = StepStatistics.concatenate(seen)
        return losses

    def _accumulate(self, groups: list[Pass], scale: float) -> tuple[float, StepStatistics, Tensor]:
        """Return loss, statistics and coefficients, with and without weights, of some passes of all ranks."""
        total, statistics, shared_out = 0.0, [], torch.zeros(2, device=self.device)
        for i, group in enumerate(groups):
            with self._synchronised(last=i == len(groups) - 1):
                weight = scale if group.counts else 0.0
                loss, part, weights = self.placement.run(partial(self._micro_batch, group.samples, weight))
                self.manual_backward(loss)
            if group.counts:
                statistics.append(part)
                shared_out += weights
            total += loss.detach()
        everyone = gather((StepStatistics.concatenate(statistics).table().cpu(), float(total), shared_out.cpu()))
        seen = StepStatistics.from_table(torch.cat([table for table, *_ in everyone]))
        loss = sum(loss for _, loss, _ in everyone) / len(everyone)
        return loss, seen, sum(weights for *_, weights in everyone)

    def _share_out(self, weights: Tensor) -> float:
        """Divide the gradient by the mean weight of all weighted tokens of the step, known only now, and return it."""
        mean = float(weights[0] / weights[1]) if weights[1] > 0 else 1.0
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(mean)
        self.scalars["information/allocation_mean"] = mean
        return mean

    def _micro_batch(self, rows: list[Sample], scale: float) -> tuple[Tensor, StepStatistics, Tensor]:
        """Return the loss of some rows, their statistics, and their coefficients with and without information weights."""
        sequences = self.pack([(row.rollout.prompt_ids, row.rollout.response_ids) for row in rows])
        given = TokenInputs.from_samples(
            rows, sequences.lengths, scale, by_sequence=self.loss_agg_mode == "seq-mean-token-mean"
        )

        allocation = self.allocation if given.taught else None

        def weighted(tokens: TokenStatistics, part: slice) -> Tensor:
            here = given[part]
            loss = self.objective(tokens, here) * self.importance_weight(tokens, here) * here.coefficient
            by_token = allocation is not None and allocation.unit == "token"
            return loss * allocation.weights(tokens) if by_token else loss

        student, teacher = source(self.model, sequences), self.teacher_sources(rows) if given.taught else []
        if allocation is not None and allocation.unit == "sequence":
            tokens = linear_statistics(student, teacher, sequences.targets, self.measured, self.temperature)
            loss = weighted(tokens, slice(None)) @ allocation.weights(tokens, sequences.lengths)
            tokens = TokenStatistics(*(values.detach() for values in tokens))
        else:
            loss, tokens = linear_distillation(
                student, teacher, sequences.targets, weighted, self.measured, self.temperature
            )
        values, weight = self.objective(tokens, given), self.importance_weight(tokens, given)
        rewards = torch.tensor([row.verdict.reward for row in rows], dtype=torch.float32, device=self.device)
        questions = torch.tensor([row.rollout.question.index for row in rows], device=self.device)
        lengths = sequences.lengths
        statistics = StepStatistics.from_tokens(
            tokens, values, given.sampler, weight, lengths, rewards, questions, bool(teacher)
        )
        if given.demonstration is not None:  # statistics are of what the student sampled
            own = [i for i, row in enumerate(rows) if not row.demonstration]
            statistics = StepStatistics.from_table(statistics.table()[own])
        shared_out = given.coefficient
        if allocation is not None:
            shared_out = shared_out * allocation.weights(tokens, sequences.lengths)
        return loss, statistics, torch.stack([shared_out.sum(), given.coefficient.sum()])

    def importance_weight(self, tokens: TokenStatistics, given: TokenInputs) -> Tensor:
        """Return the weight of every token, ``(n,)``, that corrects the difference between trainer and sampler.

        Capped from above only; carries no gradient.
        """
        if self.is_clip is None:
            return torch.ones_like(given.sampler)
        ratio = (given.old_log_probs(tokens) - given.sampler).clamp(-20, 20).exp()
        return ratio.clamp(max=self.is_clip)

    @torch.no_grad()
    def policy_log_probs(self, rows: list[Sample], batch: list[Sample]) -> list[tuple[Sample, Tensor]]:
        """Return rows with the log-probabilities of their response tokens under the student as it is now, without dropout.

        Args:
            rows: Whose responses; there may be none.
            batch: All rows of this rank.

        Returns:
            Every row with a tensor of shape ``(len(response_ids),)``, in nats.
        """
        found: list[tuple[Sample, Tensor]] = []
        if not any(gather(len(rows))):
            return found
        with evaluating(self.model):
            for group in self.passes(rows, batch, lambda row: [row.rollout.prompt_ids]):
                parts = self.placement.run(partial(self._log_probs, group.samples))
                found += zip(group.samples, parts, strict=True) if group.counts else ()
        return found

    def _log_probs(self, rows: list[Sample]) -> tuple[Tensor, ...]:
        sequences = self.pack([(row.rollout.prompt_ids, row.rollout.response_ids) for row in rows])
        _, tokens = linear_distillation(
            source(self.model, sequences),
            [],
            sequences.targets,
            lambda tokens, _: tokens.log_p_student,  # only the statistics are wanted
            temperature=self.temperature,
        )
        return tokens.log_p_student.split(sequences.lengths.tolist())

    def passes(
        self,
        rows: list[Sample],
        batch: list[Sample],
        contexts: Callable[[Sample], list[list[int]]] | None = None,
        taught: bool = True,
    ) -> list[Pass]:
        """Return the forward passes over some rows; at least one, and under sharded weights as many on every rank.

        Args:
            rows: In the loss; there may be none.
            batch: All rows of this rank. The first stands in where a rank has fewer passes to make than it has to take part in.
            contexts: The prompts that a pass puts before a row's response; by default those of the loss.
            taught: Whether a pass that is made up has a teacher.
        """
        groups = micro_batches(rows, self.micro_batch_tokens, contexts or self.contexts, self.prompt_sharing)
        passes = [Pass(group, counts=True) for group in groups]
        wanted = max(gather(len(passes))) if self.placement.sharded else 1
        return passes + [Pass([batch[0].stand_in(taught)], counts=False)] * (max(1, wanted) - len(passes))

    def pack(self, pairs: list[tuple[list[int], list[int]]]) -> Sequences | SharedSequences:
        """Lay out (prompt, response) pairs on this module's device."""
        return Sequences.pack(pairs, self.tokenizer.pad_token_id, self.device, self.prompt_sharing)

    @property
    def prompt_sharing(self) -> PromptSharing:
        """Whether equal prompts are run once. Under sharded weights no rank may decide that for itself."""
        return "never" if not self.shares_prompts else "always" if self.placement.sharded else "if-cheaper"

    @property
    def _training_sampling(self) -> Sampling:
        return Sampling(self.max_response_length, self.temperature)
