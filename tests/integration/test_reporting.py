"""What a step reports is what happened."""

import math

import pytest
import torch

from pgpo_lightning.callbacks import CollapseGuard
from pgpo_lightning.losses.divergence import (
    Divergence,
    Softening,
    clipped_divergence,
    divergence,
    sampled_token,
    softened_reverse_kl,
    student_top_k,
)
from pgpo_lightning.losses.information import information
from pgpo_lightning.losses.step_statistics import StepStatistics
from pgpo_lightning.modules import CEPO, GRPO, HAPO, RLSD, SDPO, SRPO
from pgpo_lightning.objectives.configs import EvidenceConfig
from pgpo_lightning.training.step_log import loss_scalars
from tests.support.helpers import (
    LIMITS,
    TOKENIZER,
    build,
    half_right,
    loader,
    questions,
    random_rows,
    tiny_model,
    trainer,
)

TOP_K = {"distillation_topk": 5}
NO_TAIL = {**TOP_K, "distillation_add_tail": False}
SOFT = Softening(0.5, 50.0)
jsd = lambda s, t: divergence(s, t, 0.5)  # noqa: E731
reverse = lambda s, t: divergence(s, t, 1.0)  # noqa: E731
reduced = lambda tail, alpha: lambda s, t: divergence(*student_top_k(s, t, 5, tail), alpha)  # noqa: E731

# Settings, the divergence that is reported, its bound, and what is minimised where it is something else.
REPORTED = {
    "forward KL": (SDPO, {"divergence_alpha": 0.0}, lambda s, t: divergence(s, t, 0.0), None, None),
    "JSD": (SDPO, {}, jsd, math.log(2), None),
    "JSD of another alpha": (SDPO, {"divergence_alpha": 0.2}, lambda s, t: divergence(s, t, 0.2), 0.5004, None),
    "reverse KL": (SDPO, {"divergence_alpha": 1.0}, reverse, None, None),
    "top-k with tail": (SDPO, TOP_K, reduced(True, 0.5), math.log(2), None),
    "top-k without tail": (SDPO, NO_TAIL, reduced(False, 0.5), math.log(2), None),
    "clipped": (SDPO, {"entry_clip": 0.05}, jsd, math.log(2), lambda s, t, y: clipped_divergence(s, t, 0.5, 0.05)),
    "clipped forward KL": (SDPO, {"entry_clip": 0.05, "divergence_alpha": 0.0}, lambda s, t: divergence(s, t, 0.0), None,
                           lambda s, t, y: clipped_divergence(s, t, 0.0, 0.05)),
    "clipped top-k": (SDPO, {**TOP_K, "entry_clip": 0.05}, reduced(True, 0.5), math.log(2),
                      lambda s, t, y: clipped_divergence(*student_top_k(s, t, 5, True), 0.5, 0.05)),
    "softened": (SDPO, {"divergence_alpha": 1.0, "softening": SOFT}, reverse, None,
                 lambda s, t, y: softened_reverse_kl(s, t, SOFT)),
    "sampled tokens": (SDPO, {"divergence_alpha": 1.0, "full_logit_distillation": False}, reverse, None, sampled_token),
    "SRPO": (SRPO, {}, jsd, math.log(2), None),
    "CEPO": (CEPO, {"teacher_regularization": "frozen", "evidence": EvidenceConfig(0.0)}, jsd, math.log(2),
             lambda s, t, y: torch.full(y.shape, -0.75)),
    "RLSD": (RLSD, {"mixing": 0.0}, jsd, math.log(2), lambda s, t, y: torch.full(y.shape, -0.75)),
}  # fmt: skip


@pytest.mark.parametrize("name", REPORTED)
def test_the_divergence_is_reported_whatever_the_objective(name):
    base, settings, measure, bound, minimised = REPORTED[name]
    module = build(base, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=2, **LIMITS | settings)
    module.configure_model()
    with torch.no_grad():
        for p in module.teacher.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    rows = random_rows(6)
    for row in rows:
        row.advantage = 0.75
    route = module.objective.routes(rows)[0]
    assert route.samples == rows
    _, statistics, _ = module.learner._micro_batch(route, rows, 1.0)
    expected, losses = [], []
    for row in rows:
        y = torch.tensor(row.rollout.response_ids)

        def log_p(model, prompt, y=y):
            ids = torch.tensor([[*prompt, *y.tolist()]])
            return model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).detach()

        s, t = log_p(module.model, row.rollout.prompt_ids), log_p(module.teacher.model, row.reprompt_ids)
        expected.append(measure(s, t).mean())
        losses.append((measure(s, t) if minimised is None else minimised(s, t, y)).mean())
    torch.testing.assert_close(statistics.divergence, torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics.loss, torch.stack(losses), rtol=1e-4, atol=1e-5)
    assert statistics.has_teacher.tolist() == [1.0] * 6
    assert module.objective.divergence.bound == (None if bound is None else pytest.approx(bound, abs=1e-4))
    scalars = loss_scalars(statistics, 0.5, module.objective.divergence.bound)
    assert scalars["self_distillation/divergence"] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
    assert scalars["self_distillation/objective"] == pytest.approx(
        torch.stack(losses).mean().item(), rel=1e-4, abs=1e-6
    )
    assert scalars.get("self_distillation/divergence_bound") == module.objective.divergence.bound
    right = [value for value, row in zip(expected, rows, strict=True) if row.verdict.reward >= 0.5]
    assert scalars["self_distillation/divergence_success"] == pytest.approx(torch.stack(right).mean().item(), rel=1e-4)


@pytest.mark.parametrize("base", [GRPO, HAPO])
def test_without_a_teacher_there_is_no_divergence(base):
    limits = {name: value for name, value in LIMITS.items() if name != "max_reprompt_len"}
    module = build(base, tiny_model(), half_right, tokenizer=TOKENIZER, **limits)
    module.configure_model()
    rows = random_rows(4, with_reprompt=False)
    for row in rows:
        row.advantage = 0.5
    route = module.objective.routes(rows)[0]
    assert route.samples == rows
    _, statistics, _ = module.learner._micro_batch(route, rows, 1.0)
    assert not statistics.has_teacher.any()
    assert statistics.divergence.isnan().all()
    assert not any(tag.startswith("self_distillation") for tag in loss_scalars(statistics, 0.5))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_the_bound_is_what_distributions_with_nothing_in_common_have(alpha):
    apart = torch.tensor([[1.0, 1e-30], [1e-30, 1.0]]).log()
    assert divergence(apart[0], apart[1], alpha).item() == pytest.approx(Divergence(alpha).bound, rel=1e-5)


def test_a_guard_lets_a_reverse_kl_run_go_on(tmp_path):
    """Its divergence at the first step is above half of the largest Jensen-Shannon divergence, which says nothing about a KL."""

    class Apart(SDPO):
        def configure_model(self):
            super().configure_model()
            with torch.no_grad():
                for p in self.teacher.parameters():
                    p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))

    guard = CollapseGuard()
    module = build(
        Apart, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, divergence_alpha=1.0, **LIMITS
    )
    trainer(tmp_path, max_steps=2, callbacks=[guard]).fit(module, loader(questions(4), 2))
    assert guard.curves["self_distillation/divergence"][1] > 0.5 * math.log(2)
    assert module.steps == 2
    assert "broken-teacher" not in guard.warned


def test_with_several_updates_the_curves_are_of_the_policy_that_sampled(tmp_path):
    """Later updates find a policy that has moved: their information is not that of Eq. 8."""
    seen = []

    class Kept(SDPO):
        def configure_model(self):
            super().configure_model()
            self.learner.accumulate = self.kept

        def kept(self, *args):
            step = type(self.learner).accumulate(self.learner, *args)
            seen.append(step.statistics)
            return step

    module = build(Kept, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, updates_per_batch=2, num_iterations=2,
                  optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), **LIMITS)  # fmt: skip
    t = trainer(tmp_path, max_epochs=1)
    t.fit(module, loader(questions(4), 4))
    assert len(seen) == 4
    told = t.callback_metrics
    first, everything = information(seen[0]).value, information(StepStatistics.concatenate(seen)).value
    assert told["information/mean"].item() == pytest.approx(first, rel=1e-5)
    assert abs(everything - first) > 1e-3 * abs(first)
    assert told["rollout_corr/log_ratio_max"] < 1e-4  # trainer and sampler are one policy
