"""Hindsight-Anchored Policy Optimization (HAPO, arXiv 2603.11321): GRPO that shows the student what it hardly ever finds.

By difference from GRPO: in a group with few successes a verified demonstration takes the place of one failure (Synthetic Success
Injection, Eq. 7). Advantages are those of the group after that. The demonstration's tokens are learned from by LUFFY's shaped
term, without clipping, without log-probabilities of a sampler and without importance weights; all other samples as in GRPO.
What is logged describes the rollouts that the student sampled; the demonstrations have curves of their own, under ``hapo/``.
"""

import math
import random
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pgpo_lightning.core.errors import VerifierError
from pgpo_lightning.core.seeding import generators_kept
from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.distributed.fsdp import full_tensor
from pgpo_lightning.losses.fused import TokenStatistics
from pgpo_lightning.losses.policy_gradient import replaced_index, shaped_probability
from pgpo_lightning.objectives.configs import InjectionConfig, PolicyGradientConfig, check_no_reference
from pgpo_lightning.objectives.demonstrations import Demonstration, Demonstrations, Verify
from pgpo_lightning.objectives.gates import Decision, Gate, Group
from pgpo_lightning.objectives.policy_gradient import PolicyGradientObjective
from pgpo_lightning.rewards.grade import Verifier, grade
from pgpo_lightning.rollout.prompts import PromptEncoder
from pgpo_lightning.training.configs import RewardConfig
from pgpo_lightning.training.mini_batches import TokenInputs
from pgpo_lightning.training.objective import Preparation


class DemonstrationVerifier:
    """Judges texts as the student's own answers are judged.

    Args:
        encoder: Tokenizes them.
        verifier: Judges them.
        reward: Which rewards count as success.
        max_response_length: Longest response in tokens.
    """

    def __init__(
        self, encoder: PromptEncoder, verifier: Verifier, reward: RewardConfig, max_response_length: int
    ) -> None:
        self.encoder, self.verifier, self.reward = encoder, verifier, reward
        self.max_response_length = max_response_length

    def __call__(self, question: Question, text: str) -> Demonstration | str:
        """Return a text as a demonstration, or why it is none.

        Raises:
            VerifierError: If the verifier fails and `reward.on_error` is ``raise``.
        """
        text = self.encoder.thinking.continued(text, self.encoder.question(question))
        ids = [*self.encoder.tokens(text), self.encoder.tokenizer.eos_token_id]
        if len(ids) > self.max_response_length:
            return f"it has {len(ids)} tokens, `max_response_length` is {self.max_response_length}"
        try:
            with generators_kept():
                reward = grade(self.verifier, question, self.encoder.text(ids)).reward
        except VerifierError as error:
            if self.reward.on_error == "raise":
                raise
            return f"the verifier failed on it ({error})"
        return Demonstration(ids, reward) if reward >= self.reward.success_threshold else f"its reward is {reward:g}"


class InjectedPolicyGradient(PolicyGradientObjective):
    """GRPO with a demonstration in the place of a failure where the student has few successes.

    Args:
        demonstrations: Where they come from.
        gate: Which groups get one.
        verify: Judges them.
        injection: How they enter the loss.
        success_threshold: Rewards of at least this count as success.
        config: See :class:`PolicyGradientObjective`.
        num_generations: See :class:`PolicyGradientObjective`.
        updates: See :class:`PolicyGradientObjective`.
    """

    def __init__(
        self,
        demonstrations: Demonstrations,
        gate: Gate,
        verify: Verify,
        injection: InjectionConfig | None = None,
        success_threshold: float = 0.5,
        *,
        config: PolicyGradientConfig | None = None,
        num_generations: int = 8,
        updates: int = 1,
    ) -> None:
        super().__init__(config, num_generations=num_generations, updates=updates, divide_by_std=True)
        check_no_reference(self.config, "HAPO, whose demonstrations the policy did not sample")
        self.demonstrations, self.gate, self.verify = demonstrations, gate, verify
        self.injection = injection or InjectionConfig()
        self.success_threshold = success_threshold
        self._only: Literal["demonstrations", "rollouts"] | None = None  # what a gradient that is measured is of

    # --------------------------------------------------------------------------------------------- who gets what

    def prepare(self, samples: list[Sample], given: Preparation) -> dict[str, float]:
        """Put demonstrations in the place of failures, then give every sample of the loss its advantage."""
        n = self.num_generations
        sampled = [samples[i : i + n] for i in range(0, len(samples), n)]
        groups = [Group(group[0].rollout.question.index, self._successes(group), n) for group in sampled]
        # Before anything is replaced, or the number of successes would be one too many.
        decisions = self.gate.decide(groups, given.step, given.rng)
        for group, decision in zip(sampled, decisions, strict=True):
            if decision.open:
                self._inject(group, given.rng)
        learned = [sample.replaced_by or sample for sample in samples]
        scalars = super().prepare(learned, given)
        applied = []
        for group, decision in zip(sampled, decisions, strict=True):
            for sample in (sample.replaced_by for sample in group if sample.replaced_by is not None):
                sample.advantage = sample.advantage if self.injection.demonstration_advantage else 1.0
                sample.advantage *= 1 - decision.confidence if self.injection.confidence_weight else 1.0
                applied.append(sample.advantage)
        return scalars | self._observe(samples, learned, groups, decisions, applied, given.step)

    def _successes(self, group: list[Sample]) -> int:
        return sum(sample.verdict.reward >= self.success_threshold for sample in group)

    def _inject(self, group: list[Sample], rng: random.Random) -> None:
        rewards = [sample.verdict.reward for sample in group]
        worst = replaced_index(rewards, self.success_threshold, self.injection.ties, rng)
        if worst is None:
            return
        rollout = group[worst].rollout
        chosen = self.demonstrations.choose(rollout.question, self.verify, rng)
        if chosen is not None:
            # Zeros are no log-probabilities of a sampler but of LUFFY's demonstrator, who is sure of every token.
            log_probs = torch.zeros(len(chosen.ids))
            given = Rollout(rollout.question, rollout.prompt_ids, chosen.ids, log_probs, "", True)
            group[worst].replaced_by = Sample(given, Verdict(chosen.reward), demonstration=True)

    def _observe(
        self,
        samples: list[Sample],
        learned: list[Sample],
        groups: list[Group],
        decisions: list[Decision],
        applied: list[float],
        step: int,
    ) -> dict[str, float]:
        """Let gate and demonstrations see what all ranks saw, and return what to log of it."""
        n = self.num_generations
        informative = sum(  # as sampled: what GRPO would learn from
            len({sample.verdict.reward for sample in samples[i : i + n]}) > 1 for i in range(0, len(samples), n)
        )
        tokens = [(sample.length, sample.demonstration) for sample in learned if self.in_loss(sample)]
        successes = []
        if self.demonstrations.keeps_successes:
            successes = [
                (sample.rollout.question.index, Demonstration(sample.rollout.response_ids, sample.verdict.reward))
                for sample in samples
                if sample.verdict.reward >= self.success_threshold and sample.rollout.finished
            ]
        everyone = gather((groups, decisions, applied, tokens, successes, informative))
        groups, decisions, applied, tokens, successes = (
            [each for part in parts for each in part] for parts in list(zip(*everyone, strict=True))[:5]
        )
        scalars = {
            "critic/informative_groups": sum(part[5] for part in everyone) / len(groups),
            "hapo/gate_open": sum(decision.open for decision in decisions) / len(groups),
            "hapo/injected_groups": len(applied) / len(groups),
            "hapo/all_failed": sum(group.successes == 0 for group in groups) / len(groups),
            "hapo/confidence": sum(decision.confidence for decision in decisions) / len(groups),
            "hapo/teacher_token_share": sum(length for length, given in tokens if given)
            / max(1, sum(length for length, _ in tokens)),
            **self.gate.scalars(step),
        }
        if applied:
            scalars["hapo/advantage"] = sum(applied) / len(applied)
        if closed := [group for group, decision in zip(groups, decisions, strict=True) if not decision.open]:
            scalars["hapo/closed_success"] = sum(g.successes for g in closed) / sum(g.size for g in closed)
        self.gate.observe(groups)
        self.demonstrations.observe(successes)
        return scalars

    # --------------------------------------------------------------------------------------------------- the loss

    def in_loss(self, sample: Sample) -> bool:
        """Whether the sample has an advantage, and is of the kind whose gradient is measured."""
        wanted = self._only is None or sample.demonstration == (self._only == "demonstrations")
        return super().in_loss(sample) and wanted

    def token_loss(self, tokens: TokenStatistics, given: TokenInputs) -> Tensor:
        """Return the loss of every token, ``(n,)``: GRPO's, or of a demonstration's -A f(p)."""
        loss = super().token_loss(tokens, given)
        if given.demonstration is None:
            return loss
        of_demonstrations = -given.advantage * shaped_probability(tokens.log_p_student, self.injection.shaping)
        return torch.where(given.demonstration, of_demonstrations, loss)

    def diagnose(self, samples: list[Sample], step: int, gradients: Callable[[], list[Tensor]]) -> dict[str, float]:
        """Return the norms of the gradients of demonstrations and of rollouts, before clipping, and their cosine."""
        every = self.injection.gradient_parts_every_n_steps
        if not every or step % every:
            return {}
        parts = []
        try:
            for self._only in ("demonstrations", "rollouts"):
                parts.append(gradients())
        finally:
            self._only = None
        products = [
            float(sum(full_tensor((a * b).sum()) for a, b in zip(parts[i], parts[j], strict=True)))
            for i, j in ((0, 0), (1, 1), (0, 1))
        ]
        given, sampled = products[0] ** 0.5, products[1] ** 0.5
        found = {"hapo/gradient_norm_demonstrations": given, "hapo/gradient_norm_rollouts": sampled}
        return found | ({"hapo/gradient_cosine": products[2] / (given * sampled)} if given * sampled > 0 else {})

    # --------------------------------------------------------------------------------------------------- lifecycle

    def check_questions(self, questions: list[Question]) -> None:
        """Verify the demonstrations of the training questions."""
        self.demonstrations.check(questions, self.verify)

    def check_length(self, count_batches: Callable[[], float]) -> None:
        """Compare the number of batches, if it is known, with what the gate knows."""
        if math.isfinite(batches := count_batches()):
            self.gate.check_length(batches)

    def state_dict(self) -> dict[str, Any]:
        """Return what gate and demonstrations remember."""
        parts: dict[str, Gate | Demonstrations] = {"gate": self.gate, "demonstrations": self.demonstrations}
        return {name: {"class": type(part).__name__, "state": part.state_dict()} for name, part in parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it over.

        Raises:
            MisconfigurationException: If gate or demonstrations are of another class.
        """
        for name, saved in state_dict.items():
            part = getattr(self, name)
            if saved["class"] != type(part).__name__:
                raise MisconfigurationException(
                    f"Expected `{name}` of the class {saved['class']}, as in the checkpoint, but got {type(part).__name__}."
                )
            part.load_state_dict(saved["state"])
