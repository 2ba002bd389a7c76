"""DRIFT (arXiv 2606.30345): failures are distilled, successes reinforced as far as their question is neither easy nor hard.

By difference from SRPO: the weight of a success depends on the moving average of its question's success rate, its tokens have the
factors of :func:`~pgpo_lightning.losses.rhythm.rhythm_factors`, a group without any success gets an earlier one, and training
starts with a stage of SDPO.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pgpo_lightning.core.types import Rollout, Sample, Verdict
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.losses.fused import TokenStatistics
from pgpo_lightning.losses.policy_gradient import replaced_index
from pgpo_lightning.losses.rhythm import rhythm_factors
from pgpo_lightning.objectives.configs import DifficultyConfig, RhythmConfig
from pgpo_lightning.objectives.demonstrations import Demonstration, SuccessBuffer
from pgpo_lightning.objectives.difficulty import Difficulty, PassRates
from pgpo_lightning.objectives.distillation import DistillationObjective
from pgpo_lightning.objectives.gates import Group
from pgpo_lightning.objectives.policy_gradient import PolicyGradientObjective
from pgpo_lightning.teachers.self_teaching import SelfTeaching
from pgpo_lightning.training.objective import Objective, Preparation, Route, split_taught


class DifficultyRouted(Objective):
    """SDPO's loss for failures with a teacher, weighted GRPO for successes, nothing for other failures.

    Args:
        distillation: The loss of failures, and of everything in the first stage; its self-teacher is this objective's.
        policy_gradient: The loss of successes. Advantages are over the whole group, after a replacement.
        difficulty: Which questions count how much, and when.
        rhythm: Factors of token advantages.

    Raises:
        ValueError: If the teacher's settings leave no choice of a demonstration; names the field.
    """

    teaching: SelfTeaching

    def __init__(
        self,
        distillation: DistillationObjective,
        policy_gradient: PolicyGradientObjective,
        difficulty: DifficultyConfig | None = None,
        rhythm: RhythmConfig | None = None,
    ) -> None:
        teaching = distillation.teaching
        chosen = teaching.builder.demonstration_choice, teaching.builder.demonstration_source
        if chosen != ("shared", "siblings") or teaching.contexts is not None:
            raise ValueError(
                "Expected `reprompt.demonstration_choice`, `reprompt.demonstration_source` and `reprompt.contexts` with their "
                f"defaults, because DRIFT chooses itself, but got {chosen[0]}, {chosen[1]} and {teaching.contexts}."
            )
        self.distillation, self.policy_gradient = distillation, policy_gradient
        self.difficulty = difficulty or DifficultyConfig()
        self.rhythm = rhythm or RhythmConfig()
        self.teaching = teaching
        self.divergence = distillation.divergence
        self.rates = PassRates(self.difficulty)
        self.buffer = SuccessBuffer(self.difficulty.buffer_size) if self.difficulty.buffer_size else None
        self.warming_up = True
        """Whether the batch belongs to the first stage."""

    # --------------------------------------------------------------------------------------------- who gets what

    def prepare(self, samples: list[Sample], given: Preparation) -> dict[str, float]:
        """Replace a rollout of groups without success, and give samples their teacher's prompt, advantage and weight."""
        n = self.policy_gradient.num_generations
        self.warming_up = given.step < self.difficulty.warmup_steps
        sampled = [samples[i : i + n] for i in range(0, len(samples), n)]
        groups = [Group(group[0].rollout.question.index, sum(map(self._succeeded, group)), n) for group in sampled]
        for group, seen in zip(sampled, groups, strict=True):
            if seen.successes == 0 and self.rates.visits(seen.question) >= self.difficulty.buffer_after:
                self._replace(group, given)
        learned = [sample.replaced_by or sample for sample in samples]
        order = hardest_first if self.warming_up else shortest_first
        scalars = self.teaching.attach(learned, given.teacher, given.rng, seed=given.seed, step=given.step, order=order)
        classes = [self.rates.difficulty(self.rates.rate(group)) for group in groups]
        if not self.warming_up:
            for i, sample in enumerate(learned):
                if self._succeeded(sample):
                    sample.weight = self.rates.weight(classes[i // n])
                    if classes[i // n] != "medium" or self.rhythm.strength == 0:
                        sample.reprompt_ids = sample.reprompt = None
        for sample in learned:
            if sample.demonstration and self.warming_up:  # the student is distilled on its own responses of now
                sample.reprompt_ids = sample.reprompt = None
        scalars |= self.policy_gradient.prepare(learned, given)
        if self.policy_gradient.updates > 1:
            given_ones = [sample for sample in learned if sample.demonstration and self.in_loss(sample)]
            for sample, log_probs in given.learner.log_probs(given_ones, learned):
                sample.old_log_probs = log_probs.cpu()
        for sample in learned:
            if self._distilled(sample):
                sample.old_log_probs = None  # SDPO's importance weight is that of the policy as it is now
        return scalars | self._observe(samples, learned, groups, classes)

    @property
    def recomputes_logits(self) -> bool:
        """See :attr:`Objective.recomputes_logits`: the factors of a token depend on its response."""
        return self.rhythm.strength > 0

    def _succeeded(self, sample: Sample) -> bool:
        return sample.verdict.reward >= self.teaching.builder.success_reward_threshold

    def _replace(self, group: list[Sample], given: Preparation) -> None:
        """Put an earlier success in the place of the first rollout with the lowest reward, with its reward."""
        threshold = self.teaching.builder.success_reward_threshold
        worst = replaced_index([sample.verdict.reward for sample in group], threshold, "first", given.rng)
        if worst is None or self.buffer is None:
            return
        rollout = group[worst].rollout
        kept = self.buffer.choose(rollout.question, lambda *_: "", given.rng)
        if kept is not None:
            text = self.teaching.encoder.text(kept.ids)
            # Zeros are no log-probabilities of a sampler: those of an earlier step say nothing of this step's policy.
            log_probs = rollout.log_probs.new_zeros(len(kept.ids))
            earlier = Rollout(rollout.question, rollout.prompt_ids, kept.ids, log_probs, text, finished=True)
            group[worst].replaced_by = Sample(earlier, Verdict(kept.reward), demonstration=True)

    def _observe(
        self, samples: list[Sample], learned: list[Sample], groups: list[Group], classes: list[Difficulty]
    ) -> dict[str, float]:
        """Let averages and buffer see what all ranks saw, and return what to log of it."""
        successes = []
        if self.buffer is not None:
            successes = [
                (sample.rollout.question.index, Demonstration(sample.rollout.response_ids, sample.verdict.reward))
                for sample in samples
                if self._succeeded(sample) and sample.rollout.finished
            ]
        replaced = sum(sample.demonstration for sample in learned)
        distilled = sum(map(self._distilled, learned))
        everyone = gather((groups, classes, successes, [self.rates.rate(group) for group in groups]))
        groups, classes, successes, rates = (
            [each for part in parts for each in part] for parts in zip(*everyone, strict=True)
        )
        self.rates.observe(groups)
        if self.buffer is not None:
            self.buffer.observe(successes)
        return {
            **{f"drift/{name}": classes.count(name) / len(classes) for name in ("easy", "medium", "hard")},
            "drift/pass_rate": sum(rates) / len(rates),
            "drift/warming_up": float(self.warming_up),
            "drift/replaced_groups": sum(gather(replaced)) / len(groups),
            "self_distillation/routed_fraction": distilled / len(learned),
        }

    # --------------------------------------------------------------------------------------------------- the loss

    def _distilled(self, sample: Sample) -> bool:
        return sample.reprompt_ids is not None and (self.warming_up or not self._succeeded(sample))

    def _reinforced(self, sample: Sample) -> bool:
        wanted = not self.warming_up and self._succeeded(sample) and sample.weight > 0
        return wanted and self.policy_gradient.in_loss(sample)

    def in_loss(self, sample: Sample) -> bool:
        """Whether the sample is distilled, or is a success with an advantage and a weight."""
        return self._distilled(sample) or self._reinforced(sample)

    def routes(self, samples: list[Sample]) -> list[Route]:
        """Return the samples to distil, those to reinforce with factors, and those to reinforce without."""
        with_factors, without = split_taught([sample for sample in samples if self._reinforced(sample)])
        distilled = [sample for sample in samples if self._distilled(sample)]
        return [
            Route(distilled, self.distillation.token_loss, taught=True),
            Route(with_factors, self.policy_gradient.token_loss, taught=True, factors=self.factors),
            Route(without, self.policy_gradient.token_loss),
        ]

    def factors(self, tokens: TokenStatistics, lengths: Tensor) -> Tensor:
        """Return the factors of the token advantages of some responses, ``(N,)``."""
        return rhythm_factors(tokens, lengths, **vars(self.rhythm))

    def normalizer(self, samples: list[Sample]) -> int:
        """Return the tokens of all samples."""
        return self.policy_gradient.normalizer(samples)

    # --------------------------------------------------------------------------------------------------- lifecycle

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and the buffer."""
        return {"rates": self.rates.state_dict(), "buffer": None if self.buffer is None else self.buffer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        self.rates.load_state_dict(state_dict["rates"])
        if self.buffer is not None and state_dict["buffer"] is not None:
            self.buffer.load_state_dict(state_dict["buffer"])


Order = Callable[[list[Sample]], None]
"""Sorts the successes of a group, the demonstration first, in place."""


def hardest_first(successes: list[Sample]) -> None:
    """Sort by reward, then by how uncertain the student was: the mean of -log p of its sampled tokens, highest first."""
    successes.sort(key=lambda sample: (-sample.verdict.reward, float(sample.rollout.log_probs.mean())))


def shortest_first(successes: list[Sample]) -> None:
    """Sort by reward, then by length, shortest first."""
    successes.sort(key=lambda sample: (-sample.verdict.reward, sample.length))
