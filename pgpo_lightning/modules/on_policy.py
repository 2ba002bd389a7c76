"""The step that every module of the collection shares: sample, judge, learn (PGPO's Algorithm 1, arXiv 2606.03620).

All hooks of Lightning are here. They delegate to parts: an actor (rollouts and verdicts), an objective (what is learnt from
them), a learner (gradients and weights) and an evaluator (held-out scores). The step size is decided by callbacks.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters as given_hyperparameters
from lightning.pytorch.strategies import ParallelStrategy
from torch.optim import Optimizer
from transformers import PreTrainedModel

from pgpo_lightning.core.hyperparameters import hyperparameters
from pgpo_lightning.core.run_settings import Remembers, parameters_of
from pgpo_lightning.core.seeding import seeded
from pgpo_lightning.core.settings import Count, Seed, Temperature, checked
from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.distributed.collectives import gather, together
from pgpo_lightning.distributed.fsdp import FullySharded, Placement, Replicated
from pgpo_lightning.distributed.stopping import SIGNALS
from pgpo_lightning.losses.step_statistics import StepStatistics
from pgpo_lightning.models.loading import fp32_by_default
from pgpo_lightning.models.lora import LoRA, check_settings, keep_adapter_only
from pgpo_lightning.models.narrow import KeepsBuffers, warn_of_slow_products
from pgpo_lightning.models.quantization import Quantization
from pgpo_lightning.modules import checkpoint_content
from pgpo_lightning.modules.moved import check_moved
from pgpo_lightning.rewards.grade import Verifier
from pgpo_lightning.rollout.checks import check_batch
from pgpo_lightning.rollout.engine import Engine, Sampling
from pgpo_lightning.rollout.mismatch import check_sampler
from pgpo_lightning.rollout.prompts import PromptEncoder
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from pgpo_lightning.teachers.base import Teacher
from pgpo_lightning.teachers.frozen import FrozenTeacher
from pgpo_lightning.training import start_up, step_report
from pgpo_lightning.training.actor import Actor
from pgpo_lightning.training.configs import EvaluationConfig, MismatchConfig, ModelConfig, RewardConfig, UpdateConfig
from pgpo_lightning.training.evaluator import Evaluator
from pgpo_lightning.training.learner import Learner
from pgpo_lightning.training.mini_batches import mini_batches
from pgpo_lightning.training.objective import MissingObjective, Objective, Preparation
from pgpo_lightning.training.optimization import Optimization, adamw
from pgpo_lightning.training.preflight import measure_gap
from pgpo_lightning.training.rates import advance_schedule
from pgpo_lightning.training.resuming import ResumedSettings
from pgpo_lightning.training.run_seed import RunSeed
from pgpo_lightning.training.step_report import StepReporter, Timer
from pgpo_lightning.training.student import Student


@checked
class OnPolicyModule(Remembers, KeepsBuffers, L.LightningModule):
    """Trains a language model on its own samples, one optimizer step (or a few) per batch of questions.

    A subclass sets :attr:`objective` in its ``__init__``.

    Attributes:
        objective: What is learnt from the samples.
        step_statistics: One row per sequence in the loss of the current optimizer step, of all ranks. Set before
            ``optimizer.step()``.
        scalars: What the current step logs. Callbacks may add to it.
        reported: What the last step logged, of all ranks together.
        last_samples: This rank's samples of the last step, for callbacks that show texts.

    Args:
        model: Folder or Hub id of a causal language model, ``toy`` or ``toy-code`` for the shipped ones, or a model object.
        verifier: Judges a response: any callable ``(question, response) -> reward``, ``(reward, feedback)`` or
            :class:`~pgpo_lightning.core.types.Verdict`, by its import path.
        engine: Samples the rollouts; by default the model itself, through transformers.
        num_generations: Rollouts per question.
        max_prompt_length: Longest prompt in tokens; longer ones are dropped from the data, counted and reported.
        max_response_length: Longest response in tokens.
        temperature: Of the rollouts, 0.0001 to 100; logits of student and teacher are divided by it too.
        optimizer: From parameters to an optimizer.
        scheduler: From an optimizer to a schedule, stepped once per batch, also where no optimizer step was taken.
        lora: Train an adapter and leave the model's weights as they are; null for training all weights. Needs peft.
        quantization: Store the weights under the adapter in 4 or 8 bits; null for `model_config.dtype`.
        seed: Of every random choice of the run: sampling, adapters, evaluation. Null takes the one that
            ``lightning.seed_everything`` (on the command line `seed_everything`) was given, else 0, when a Trainer starts.
        evaluation: How held-out questions are answered.
        update: How a batch becomes optimizer steps.
        model_config: How model and tokenizer are loaded.
        mismatch: How differences between trainer and sampler are treated.
        reward: How rewards are read.

    Raises:
        ValueError: If a setting is out of range or contradicts another; names the field.
    """

    objective: Objective = MissingObjective()  # type: ignore[assignment]
    reporter: StepReporter

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Say of an argument that stands in a group where it is."""
        check_moved(names, parameters_of(cls))

    def __init__(
        self,
        model: str | PreTrainedModel,
        verifier: Verifier,
        engine: Engine | None = None,
        num_generations: Count = 8,
        max_prompt_length: Count = 2048,
        max_response_length: Count = 8192,
        temperature: Temperature = 1.0,
        optimizer: OptimizerCallable = adamw,
        scheduler: LRSchedulerCallable | None = None,
        lora: LoRA | None = None,
        quantization: Quantization | None = None,
        seed: Seed | None = None,
        evaluation: EvaluationConfig = EvaluationConfig(),
        update: UpdateConfig = UpdateConfig(),
        model_config: ModelConfig = ModelConfig(),
        mismatch: MismatchConfig = MismatchConfig(),
        reward: RewardConfig = RewardConfig(),
    ) -> None:
        super().__init__()
        self.save_hyperparameters(given_hyperparameters.get() or hyperparameters(self))
        check_settings(model, lora, quantization)
        self.automatic_optimization = False
        self.engine = engine or TransformersEngine()
        self.num_generations = num_generations
        self.max_response_length = max_response_length
        self.training_sampling = Sampling(max_response_length, temperature)
        self.optimization = Optimization(optimizer, scheduler, update)
        self.lora = lora
        self.update, self.mismatch, self.reward = update, mismatch, reward
        self.run_seed = RunSeed(seed)

        self.model: PreTrainedModel = None  # type: ignore[assignment]  # until configure_model
        self.teacher: Teacher | None = None
        self.learner: Learner = None  # type: ignore[assignment]  # until configure_model
        self.placement: Placement = Replicated()
        self.student = Student(model, model_config, lora, quantization)
        self.tokenizer = self.student.load_tokenizer()
        self.encoder = PromptEncoder(self.tokenizer, model_config.enable_thinking, model_config.chat_template_kwargs)
        self.actor = Actor(self.engine, verifier, self.tokenizer, self.encoder, max_prompt_length, reward)
        self.evaluator = Evaluator(evaluation, max_response_length, reward.success_threshold, self.encoder, self.actor)

        self.steps = 0  # batches trained on; unlike Lightning's global_step it counts skipped optimizer steps too
        self.steps_without_signal = 0  # optimizer steps left out because no sample of any rank was in the loss
        self.step_statistics = StepStatistics.empty()
        self.scalars: dict[str, float] = {}
        self.reported: dict[str, float] = {}
        self.last_samples: list[Sample] = []
        self.training_run = True  # a module that only evaluates needs no teacher
        self.resumed: ResumedSettings | None = None
        self._warned_of_speed = False

    @property
    def seed(self) -> int:
        """The seed of every random choice of the run."""
        return self.run_seed.value

    @property
    def has_teacher(self) -> bool:
        """Whether there is a self-teacher, so that there is information to measure."""
        return self.objective.teaching is not None

    @property
    def longest_prompt(self) -> int:
        """Most prompt tokens of any forward pass, the teacher's included."""
        teaching = self.objective.teaching
        return self.actor.max_prompt_length if teaching is None else teaching.builder.max_reprompt_len

    # ------------------------------------------------------------------------------------------------ the step

    def training_step(self, questions: list[Question], batch_idx: int) -> None:
        """One pass of Algorithm 1 over a batch of questions."""
        check_batch(questions)
        timer = Timer()
        with seeded(self.seed, "train", self.steps, self.global_rank) as rng, fp32_by_default(), timer.phase("step"):
            with together(), self.actor.grading_while_sampling():  # what fails on one rank alone ends all of them
                with timer.phase("gen"):
                    rollouts = self.sample(questions, self.num_generations, self.training_sampling)  # y ~ π(·|x)
                with timer.phase("reward"):
                    verdicts = self.judge(rollouts)
                with timer.phase("adv"):
                    samples = [Sample(rollout, verdict) for rollout, verdict in zip(rollouts, verdicts, strict=True)]
                    given = Preparation(rng, self.steps, self.learner, self.seed)
                    self.scalars = self.objective.prepare(samples, given)  # f: demonstrations, feedback; or advantages
            with timer.phase("adv"):
                self._preflight(samples)
            with timer.phase("update_actor"):
                seen: list[StepStatistics] = []
                missed, updated = [], False
                learned = [sample.replaced_by or sample for sample in samples]
                for mini_batch in [*mini_batches(learned, self.update.updates_per_batch)] * self.update.num_iterations:
                    if not any(gather(any(self.objective.in_loss(sample) for sample in mini_batch))):
                        missed.append(mini_batch)
                        self._leave_out()
                        continue
                    if not seen:
                        gradients = partial(self.learner.gradients, mini_batch, self.manual_backward, self._scaler)
                        self.scalars |= self.objective.diagnose(mini_batch, self.steps, gradients)
                    # g, and H(y|x), H(y|x,f) of every sample
                    step = self.learner.accumulate(mini_batch, self.manual_backward, self._no_sync)
                    self.step_statistics = step.statistics
                    self.scalars |= step.scalars
                    if not seen:  # later updates find a policy that has moved
                        self._check_first_update()
                    # a callback reads I, scales the step by ρ
                    updated |= self.learner.apply(self._optimizer, step, self.scalars, self._scaler, self.steps)
                    seen.append(step.statistics)
                if updated:
                    self.learner.move_teacher()
                for sample in samples:
                    sample.teacher_hidden = None
                advance_schedule(self.lr_schedulers(), self._optimizer)
        self.steps += 1
        self._report(samples, seen[0] if seen else StepStatistics.empty(), timer, missed)

    def sample(self, questions: list[Question], n: int, sampling: Sampling) -> list[Rollout]:
        """Sample `n` responses to every question from the student as it is now; see :meth:`Actor.sample`."""
        # Evaluation in step exchanges something after every batch, so that no rank may leave a batch alone.
        all_ranks = self._trainer is None or self.trainer.training or self.evaluator.in_step or self.placement.sharded
        return self.actor.sample(self.model, questions, n, sampling, self.placement, all_ranks, self.steps)

    def judge(self, rollouts: list[Rollout]) -> list[Verdict]:
        """Return the verifier's verdict on every rollout; see :meth:`Actor.judge`."""
        return self.actor.judge(rollouts)

    @property
    def _at_start(self) -> bool:
        """Whether no optimizer step has been taken yet, in this run or those that it continues."""
        return self.trainer.global_step == self.steps_without_signal

    def _preflight(self, samples: list[Sample]) -> None:
        """Grade the teacher's own answers, if that is wanted. Before the first step it has the student's weights."""
        teaching = self.objective.teaching
        if teaching is not None and teaching.config.preflight and self._at_start:
            seeds = seeded(self.seed, "preflight", self.steps, self.global_rank)
            with torch.no_grad(), together(), seeds, self.actor.weights_ready(self.model, self.placement):
                generate = partial(self.actor.generate, self.model, n=1, sampling=self.training_sampling)
                threshold = self.reward.success_threshold
                self.scalars |= measure_gap(samples, generate, self.judge, threshold, self.steps)

    def _leave_out(self) -> None:
        """Take no optimizer step where no sample of any rank is in the loss; weights and momentum stay as they are."""
        rate = float(self._optimizer.param_groups[0]["lr"])
        self.scalars = {"actor/pg_loss": 0.0, "actor/grad_norm": 0.0, "lr/base": rate} | self.scalars
        self.step_statistics = StepStatistics.empty()
        self.steps_without_signal += 1
        step_report.count_left_out(self.trainer)

    def _check_first_update(self) -> None:
        self.scalars |= check_sampler(self.step_statistics, self.mismatch.max_sampler_gap, self.steps)
        if self._at_start and not getattr(self.teacher, "external", False):
            step_report.warn_of_harm(self.step_statistics, self.steps)

    def _report(self, samples: list[Sample], statistics: StepStatistics, timer: Timer, missed: list[Any]) -> None:
        """Log the step; every value is that of all ranks together."""
        skipped, without = float(self.learner.skipped), float(self.steps_without_signal)
        counts = {"actor/skipped_steps": skipped, "actor/steps_without_signal": without}
        self.reporter.warn_of_missing_signal(missed, self.steps, self.steps_without_signal)
        self.reported = self.reporter.scalars(samples, statistics, self.scalars, timer.seconds, self.device) | counts
        self.last_samples = samples
        step_report.log_to_loggers(self.trainer, self.reported, self.steps)
        step_report.log(self, self.reported, logger=False, batch_size=len(samples))  # for callbacks that monitor it
        bar = self.reporter.progress_bar(self.reported, statistics)
        step_report.log(self, bar, prog_bar=True, logger=False, batch_size=len(samples))

    def scale_rates(self, optimizer: Optimizer, factor: float) -> None:
        """Multiply all learning rates for the rest of the optimizer step that is under way; the step puts them back."""
        self.learner.rates.scale(optimizer, factor)

    def restore_rates(self) -> None:
        """Undo :meth:`scale_rates`. Does nothing where there is nothing to undo."""
        if self.learner is not None:
            self.learner.rates.restore()

    @property
    def _optimizer(self) -> Any:
        return self.optimizers()

    @property
    def _scaler(self) -> Any:
        return None if self._trainer is None else getattr(self.trainer.precision_plugin, "scaler", None)

    def _no_sync(self) -> AbstractContextManager[Any]:
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    # ---------------------------------------------------------------------------------------------- evaluation

    def on_validation_epoch_start(self) -> None:
        """Start a new evaluation."""
        self.evaluator.start(self.trainer.num_test_batches if self.trainer.testing else self.trainer.num_val_batches)

    def validation_step(self, questions: list[Question], batch_idx: int) -> None:
        """Answer one batch of held-out questions; see :meth:`Evaluator.answer`."""
        self.evaluator.answer(questions, self.seed, self.sample, self.judge, self.learner.log_probs)

    def on_validation_epoch_end(self) -> None:
        """Log the scores and write the answers; see :meth:`Evaluator.finish`."""
        SIGNALS.agree()
        self.actor.count_verifier_errors()
        scores = self.evaluator.finish(self.trainer, self.steps, {"model": self.student.name, "seed": self.seed})
        if self.trainer.sanity_checking:  # Lightning throws away what is logged here: the score of the base model
            for logger in self.trainer.loggers:
                logger.log_metrics(scores, step=0)
            return
        step_report.log(self, {**scores, "step": float(self.steps)})
        step_report.log(self, {"score": scores[self.evaluator.score_tag]}, prog_bar=True, logger=False)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, questions: list[Question], batch_idx: int) -> list[dict[str, Any]]:
        """Answer one batch of questions; see :meth:`Evaluator.predict`."""
        return self.evaluator.predict(questions, self.seed, self.sample, self.judge)

    # ------------------------------------------------------------------------------------------------ lifecycle

    def setup(self, stage: str) -> None:
        """Check what can be checked before anything is computed, and drop prompts that are too long."""
        fits = self.training_run = stage == "fit"
        if fits and self.trainer.global_step == 0:  # it is compared with Lightning's count
            self.steps_without_signal = 0
        self.run_seed.decide()
        teaching, sharded = self.objective.teaching, start_up.is_sharded(self.trainer)
        teacher = None if teaching is None else teaching.config
        start_up.check_combination(self.engine, self.student.quantization, sharded, teacher, self.update)
        checkpoint = start_up.check_trainer(self.trainer, fits)
        if not self._warned_of_speed:
            self._warned_of_speed = True
            device = self.trainer.strategy.root_device
            warn_of_slow_products(str(self.trainer.precision), self.student.config.dtype, device)
        data = getattr(self.trainer, "datamodule", None)
        start_up.check_data(data, self.actor, self.evaluator)
        if fits:
            self.resumed = ResumedSettings(self, self.trainer, checkpoint)
            if teaching is not None:
                teaching.check_template()
            if "train" in (questions := getattr(data, "questions", {})):
                self.objective.check_questions(questions["train"])

    def configure_model(self) -> None:
        """Load the model, make the teacher, and shard both if the strategy says so; each once."""
        teaching, longest = self.objective.teaching, (self.longest_prompt, self.max_response_length)
        mesh = self.student.mesh = start_up.data_mesh(self._trainer)
        if self.model is None:
            divergence, free = self.objective.divergence, self.update.padding_free
            self.model = self.student.load(self.encoder, self.engine, divergence, *longest, free, self.seed)
            if self.lora is not None:
                keep_adapter_only(self)
        if self.teacher is None and self.training_run:
            self.teacher = self.objective.make_teacher(self.model, self.student.loading, sum(longest))
            if teaching and self.teacher and teaching.config.offload:  # DDP looks after the weights on its device
                tensors = (*self.teacher.named_parameters(), *self.teacher.named_buffers())
                self._ddp_params_and_buffers_to_ignore = [f"teacher.{name}" for name, _ in tensors]
        if mesh is not None and not self.placement.sharded:
            plugin, theirs = self.trainer.precision_plugin, getattr(self.teacher, "model", None)
            self.placement = FullySharded(self.model, theirs, mesh, plugin)
            # Lightning then looks for every weight in a single file. Those of a frozen teacher or under an adapter are in none.
            self.strict_loading = self.lora is None and not isinstance(self.teacher, FrozenTeacher)
        if self.learner is None:
            self.reporter = StepReporter(self.objective, self.actor, self.num_generations, self.max_response_length)
            self.learner = Learner(
                self.model,
                self.objective,
                self.update,
                temperature=self.training_sampling.temperature,
                importance_weight_cap=self.mismatch.importance_weight_cap,
                pad_token_id=self.tokenizer.pad_token_id,
                packings=(self.student.packings[0], getattr(self.teacher, "packing", None) or self.student.packings[1]),
            )
        self.learner.teacher, self.learner.placement = self.teacher, self.placement

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule; the module itself steps the schedule, once per batch."""
        return self.optimization.build(self.model, self.placement.sharded, self.resumed, self._trainer)

    def on_fit_start(self) -> None:
        """Check the size of the batches and, if the objective asks for it, their number."""
        size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        start_up.check_batch_size(size, self.update.updates_per_batch)
        self.objective.check_length(partial(start_up.count_batches, self.trainer, self.update))

    def on_train_start(self) -> None:
        """Let changed settings of optimizer and schedule take effect, over what was restored."""
        self.optimization.take_effect(self.model, self.resumed, self.steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add counters, states, and what is needed to tell whether a checkpoint belongs to a configuration."""
        checkpoint["pgpo_lightning"] = checkpoint_content.collect(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint belongs here, and take over counters and states; see :func:`checkpoint_content.restore`."""
        checkpoint_content.restore(self, checkpoint)
