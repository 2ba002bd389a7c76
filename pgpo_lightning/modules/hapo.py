"""Hindsight-Anchored Policy Optimization (HAPO, arXiv 2603.11321): GRPO that shows the student what it hardly ever finds.

By difference from GRPO: in a group with few successes a verified demonstration takes the place of one failure (Synthetic Success
Injection, Eq. 7). Advantages are those of the group after that. The demonstration's tokens are learned from by LUFFY's shaped
term, without clipping, without log-probabilities of a sampler and without importance weights; all other rows as in GRPO.
What is reported describes the rollouts that the student sampled; the demonstrations have curves of their own, under ``hapo/``.
"""

import random
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pgpo_lightning.core.errors import VerifierError
from pgpo_lightning.core.seeding import generators_kept
from pgpo_lightning.core.settings import Natural, Positive, checked
from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.distributed.fsdp import full_tensor
from pgpo_lightning.losses.fused import TokenStatistics
from pgpo_lightning.losses.policy_gradient import TieBreak, replaced_index, shaped_probability
from pgpo_lightning.modules.demonstrations import ColumnDemonstrations, Demonstration, Demonstrations
from pgpo_lightning.modules.gates import ConfidenceGate, Decision, Gate, Group
from pgpo_lightning.modules.grpo import GRPO
from pgpo_lightning.rewards.grade import grade
from pgpo_lightning.training.mini_batches import TokenInputs


@checked
class HAPO(GRPO):
    """GRPO with demonstrations where the student has few successes.

    Args:
        args: See :class:`OnPolicyModule`.
        demonstrations: Where they come from; by default the column `solution` of the data.
        gate: Which groups get one; by default those whose confidence lies below 0.8.
        ties: Which of several equally bad rollouts is replaced: the ``first`` or a ``random`` one.
        demonstration_advantage: Multiply the demonstration's term by its advantage in the group, as LUFFY does. Without, as in
            the letter of Eq. 9, it is learned from at weight 1, also where nothing is left to compare it with.
        confidence_weight: Also multiply it by one minus the confidence: a reading of the paper's F(p, c).
        shaping: g in f(p) = p / (p + g).
        norm_adv_by_std_in_grpo: Divide advantages by the group's standard deviation (Eq. 2). GRPO here does not by default.
        std: With n - 1 (``sample``, as LUFFY, verl and GRPO here) or with n (``population``) in its denominator.
        gradient_parts_every_n_steps: Batches between two measurements of the gradients of demonstrations and of rollouts alone:
            their norms and their cosine. Each costs two more backward passes, and memory for two more gradients; 0 for none.
        kwargs: See :class:`GRPO` and :class:`OnPolicyModule`.

    Raises:
        ValueError: If a setting is out of range or contradicts another; names the field.
    """

    def __init__(
        self,
        *args: Any,
        demonstrations: Demonstrations | None = None,
        gate: Gate | None = None,
        ties: TieBreak = "first",
        demonstration_advantage: bool = True,
        confidence_weight: bool = False,
        shaping: Positive = 0.1,
        norm_adv_by_std_in_grpo: bool = True,
        std: Literal["sample", "population"] = "sample",
        gradient_parts_every_n_steps: Natural = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, norm_adv_by_std_in_grpo=norm_adv_by_std_in_grpo, **kwargs)
        if std == "population" and not norm_adv_by_std_in_grpo:
            raise ValueError(
                "Expected `norm_adv_by_std_in_grpo` with `std` population, but got false: it would have no effect."
            )
        self.demonstrations = demonstrations or ColumnDemonstrations()
        self.gate = gate or ConfidenceGate()
        self.ties = ties
        self.demonstration_advantage = demonstration_advantage
        self.confidence_weight = confidence_weight
        self.shaping = shaping
        self.std_correction = 1 if std == "sample" else 0
        self.gradient_parts_every_n_steps = gradient_parts_every_n_steps
        self._part: bool | None = (
            None  # which rows a backward pass is about: demonstrations, the others, or (None) both
        )

    # ----------------------------------------------------------------------------------------------- who gets what

    def prepare_rows(self, rows: list[Sample], rng: random.Random) -> dict[str, float]:
        """Put demonstrations in the place of failures, then give every row of the loss its advantage."""
        n = self.num_generations
        sampled = [rows[i : i + n] for i in range(0, len(rows), n)]
        groups = [Group(group[0].rollout.question.index, self._successes(group), n) for group in sampled]
        decisions = self.gate.decide(groups, self.steps, rng)  # before anything is replaced, or S would be one too many
        for group, decision in zip(sampled, decisions, strict=True):
            if decision.open:
                self._inject(group, rng)
        learned = [row.replaced_by or row for row in rows]
        scalars = super().prepare_rows(learned, rng)
        applied = []
        for group, decision in zip(sampled, decisions, strict=True):
            for row in (row.replaced_by for row in group if row.replaced_by is not None):
                row.advantage = row.advantage if self.demonstration_advantage else 1.0
                row.advantage *= 1 - decision.confidence if self.confidence_weight else 1.0
                applied.append(row.advantage)
        return scalars | self._told(rows, learned, groups, decisions, applied)

    def _successes(self, group: list[Sample]) -> int:
        return sum(row.verdict.reward >= self.success_reward_threshold for row in group)

    def _inject(self, group: list[Sample], rng: random.Random) -> None:
        worst = replaced_index([row.verdict.reward for row in group], self.success_reward_threshold, self.ties, rng)
        if worst is None:
            return
        rollout = group[worst].rollout
        shown = self.demonstrations.choose(rollout.question, self.verified, rng)
        if shown is not None:
            # Zeros are no log-probabilities of a sampler but LUFFY's demonstrator, who is sure of every token.
            given = Rollout(rollout.question, rollout.prompt_ids, shown.ids, torch.zeros(len(shown.ids)), "", True)
            group[worst].replaced_by = Sample(given, Verdict(shown.reward), demonstration=True)

    def verified(self, question: Question, text: str) -> Demonstration | str:
        """Return a text as a demonstration, or why it is none. What is judged is what the student would have answered."""
        text = self.encoder.thinking.continued(text, self.encoder.question(question))
        ids = [*self.encoder.tokens(text), self.tokenizer.eos_token_id]
        if len(ids) > self.max_response_length:
            return f"it has {len(ids)} tokens, `max_response_length` is {self.max_response_length}"
        try:
            with generators_kept():
                reward = grade(self.verifier, question, self.encoder.text(ids)).reward
        except VerifierError as error:
            if self.on_verifier_error == "raise":
                raise
            return f"the verifier failed on it ({error})"
        return Demonstration(ids, reward) if reward >= self.success_reward_threshold else f"its reward is {reward:g}"

    def _told(
        self,
        rows: list[Sample],
        learned: list[Sample],
        groups: list[Group],
        decisions: list[Decision],
        applied: list[float],
    ) -> dict[str, float]:
        """Let gate and demonstrations take note of what all ranks saw, and return what to report of it."""
        threshold, n = self.success_reward_threshold, self.num_generations
        informative = sum(
            len({row.verdict.reward for row in rows[i : i + n]}) > 1 for i in range(0, len(rows), n)
        )  # as sampled: what GRPO would have to go by
        tokens = [(row.length, row.demonstration) for row in learned if self.in_loss(row)]
        successes = []
        if self.demonstrations.keeps_successes:
            successes = [
                (row.rollout.question.index, Demonstration(row.rollout.response_ids, row.verdict.reward))
                for row in rows
                if row.verdict.reward >= threshold and row.rollout.finished
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
            **self.gate.scalars(self.steps),
        }
        if applied:
            scalars["hapo/advantage"] = sum(applied) / len(applied)
        if closed := [group for group, decision in zip(groups, decisions, strict=True) if not decision.open]:
            scalars["hapo/closed_success"] = sum(g.successes for g in closed) / sum(g.size for g in closed)
        self.gate.observe(groups)
        self.demonstrations.observe(successes)
        return scalars

    # ---------------------------------------------------------------------------------------------------- the loss

    def objective(self, tokens: TokenStatistics, given: TokenInputs) -> Tensor:
        """Return the loss of every token, ``(n,)``: GRPO's, or of a demonstration's -A f(p)."""
        loss = super().objective(tokens, given)
        if given.demonstration is None:
            return loss
        return torch.where(
            given.demonstration, -given.advantage * shaped_probability(tokens.log_p_student, self.shaping), loss
        )

    def importance_weight(self, tokens: TokenStatistics, given: TokenInputs) -> Tensor:
        """Return GRPO's weights, ``(n,)``, and 1 for demonstrations, which no sampler drew."""
        weight = super().importance_weight(tokens, given)
        return weight if given.demonstration is None else torch.where(given.demonstration, 1.0, weight)

    def in_loss(self, row: Sample) -> bool:
        """Whether the row has an advantage, and is of the kind that is being looked at."""
        return super().in_loss(row) and self._part in (None, row.demonstration)

    def accumulate_gradients(self, rows: list[Sample]) -> float:
        """See :meth:`OnPolicyModule.accumulate_gradients`; now and then measure the two kinds of rows apart first."""
        every = self.gradient_parts_every_n_steps
        if every and self.steps % every == 0 and "hapo/gradient_norm_rollouts" not in self.scalars:
            self.scalars |= self._gradient_parts(rows)
        return super().accumulate_gradients(rows)

    def _gradient_parts(self, rows: list[Sample]) -> dict[str, float]:
        """Return the norms of the gradients of demonstrations and of rollouts, before clipping, and their cosine."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        gradients = []
        for self._part in (True, False):
            super().accumulate_gradients(rows)
            gradients.append([p.grad / scale for p in self.model.parameters() if p.grad is not None])
            self.model.zero_grad()
        self._part = None
        products = [
            float(sum(full_tensor((a * b).sum()) for a, b in zip(gradients[i], gradients[j], strict=True)))
            for i, j in ((0, 0), (1, 1), (0, 1))
        ]
        given, sampled = products[0] ** 0.5, products[1] ** 0.5
        found = {"hapo/gradient_norm_demonstrations": given, "hapo/gradient_norm_rollouts": sampled}
        return found | ({"hapo/gradient_cosine": products[2] / (given * sampled)} if given * sampled > 0 else {})

    # --------------------------------------------------------------------------------------------------- lifecycle

    def setup(self, stage: str) -> None:
        """Verify the demonstrations of the training questions, before anything is generated."""
        super().setup(stage)
        questions = getattr(getattr(self.trainer, "datamodule", None), "questions", {})
        if stage == "fit" and "train" in questions:
            self.demonstrations.check(questions["train"], self.verified)

    def on_fit_start(self) -> None:
        """Compare the number of batches with what the gate knows."""
        super().on_fit_start()
        batches = self.trainer.estimated_stepping_batches
        if self.trainer.max_steps >= 0:
            batches = min(batches, -(-self.trainer.max_steps // (self.updates_per_batch * self.num_iterations)))
        if 0 <= batches < float("inf"):
            self.gate.check_length(batches)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what gate and demonstrations remember."""
        super().on_save_checkpoint(checkpoint)
        parts = {"gate": self.gate, "demonstrations": self.demonstrations}
        checkpoint["pgpo_lightning"]["hapo"] = {
            name: {"class": type(part).__name__, "state": part.state_dict()} for name, part in parts.items()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it over; a run that only evaluates has no use for it.

        Raises:
            MisconfigurationException: If gate or demonstrations are of another class.
        """
        super().on_load_checkpoint(checkpoint)
        if not self.training_run:
            return
        for name, saved in checkpoint["pgpo_lightning"]["hapo"].items():
            part = getattr(self, name)
            if saved["class"] != type(part).__name__:
                raise MisconfigurationException(
                    f"Expected `{name}` of the class {saved['class']}, as in the checkpoint, but got {type(part).__name__}."
                )
            part.load_state_dict(saved["state"])
