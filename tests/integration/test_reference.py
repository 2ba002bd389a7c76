"""GRPO with a KL divergence from the initial model: its loss and gradient, the frozen reference, resume, LoRA, memory."""

import copy

import pytest
import torch

from pgpo_lightning.callbacks import ResumeCheckpoint
from pgpo_lightning.losses.policy_gradient import kl_estimate
from pgpo_lightning.models.lora import LoRA
from pgpo_lightning.modules import GRPO, HAPO, RLSD, SRPO
from pgpo_lightning.objectives.configs import PolicyGradientConfig
from pgpo_lightning.objectives.guided import GuidedPolicyGradient
from pgpo_lightning.teachers.frozen import FrozenTeacher
from pgpo_lightning.teachers.lora import FrozenAdapterTeacher
from tests.support.helpers import (
    GRPO_LIMITS,
    LIMITS,
    TOKENIZER,
    accumulate,
    build,
    half_right,
    loader,
    prepare,
    questions,
    random_rows,
    tiny_model,
    trainer,
)

KL = 0.3


def grpo(cls=GRPO, **settings):
    settings = {"num_generations": 2, "kl_to_reference": KL, "tokenizer": TOKENIZER} | GRPO_LIMITS | settings
    return build(cls, tiny_model(), settings.pop("verifier", half_right), **settings)


def fit(folder, steps=2, callbacks=(), resume=None, **settings):
    module = grpo(**{"optimizer": lambda p: torch.optim.SGD(p, lr=0.05), "num_generations": 4} | settings)
    seen = []
    log = module.log_dict
    module.log_dict = lambda values, **kwargs: (seen.append(values), log(values, **kwargs))
    made = trainer(folder, max_steps=steps, callbacks=[*callbacks], enable_checkpointing=bool(callbacks))
    made.fit(module, loader(questions(4), 4), ckpt_path=resume)
    return module, [values["actor/kl_loss"] for values in seen if "actor/kl_loss" in values]


def test_the_estimate_is_schulmans_k3():
    log_p = torch.tensor([-1.0, -2.0, -90.0, -0.5], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -0.5, -0.1, -0.5], dtype=torch.float64)
    found = kl_estimate(log_p, reference)
    ratio = (reference - log_p).exp()
    assert found[[0, 1, 3]].tolist() == pytest.approx((ratio - ratio.log() - 1)[[0, 1, 3]].tolist())
    assert torch.isfinite(found).all()
    (gradient,) = torch.autograd.grad(found.sum(), log_p)
    assert gradient[[0, 1, 3]].tolist() == pytest.approx((1 - ratio)[[0, 1, 3]].tolist())


def test_loss_and_gradient_are_those_of_float64_autograd():
    module = grpo(importance_weight_cap=None)
    module.configure_model()
    reference = copy.deepcopy(module.model).double()
    with torch.no_grad():  # the student has moved
        for parameter in module.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    rows = random_rows(6, with_reprompt=False)
    for row in rows[:2]:
        row.verdict.reward = 1.0  # equal rewards: no advantage, and yet in the loss
    scalars = prepare(module, rows, None)
    assert [row.advantage for row in rows] == [0, 0, -0.5, 0.5, -0.5, 0.5]
    loss = accumulate(module, rows)

    student = copy.deepcopy(module.model).double()
    student.zero_grad()
    wanted, sampled = 0.0, []
    for row in rows:
        prompt, y = row.rollout.prompt_ids, row.rollout.response_ids
        ids = torch.tensor([[*prompt, *y]])

        def log_p(model):
            logits = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)  # noqa: B023
            return logits[torch.arange(len(y)), torch.tensor(y)]  # noqa: B023

        own, fixed = log_p(student), log_p(reference).detach()
        surrogate = -row.advantage * (own - own.detach()).exp()
        wanted = wanted + (surrogate + KL * ((fixed - own).exp() - (fixed - own) - 1)).mean() / len(rows)
        r = fixed - row.rollout.log_probs.double()
        sampled.append(r.exp() - r - 1)
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-4)
    assert scalars["actor/kl_loss"] == pytest.approx(torch.cat(sampled).mean().item(), rel=1e-4)
    for found, exact in zip(module.model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(found.grad.double(), exact.grad, rtol=1e-3, atol=1e-6)
    assert any(p.grad.abs().max() > 0 for p in module.model.parameters())


def test_the_reference_is_frozen_and_a_resumed_run_has_the_same(tmp_path):
    whole, kl = fit(tmp_path / "whole", steps=3, callbacks=[ResumeCheckpoint(every_n_train_steps=1, keep=None)])
    assert isinstance(whole.teacher, FrozenTeacher)
    for name, weights in tiny_model().state_dict().items():
        assert torch.equal(weights, whole.teacher.model.state_dict()[name]), name
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[1] > 1e-4
    (first,) = (tmp_path / "whole").rglob("step=000001.ckpt")
    assert not [name for name in torch.load(first, weights_only=True)["state_dict"] if "teacher.model" in name]
    resumed, later = fit(tmp_path / "resumed", steps=3, resume=first)
    assert later == kl[1:]
    for name, weights in whole.model.state_dict().items():
        assert torch.equal(weights, resumed.model.state_dict()[name]), name


def test_it_holds_the_policy_near_the_reference(tmp_path):
    _, free = fit(tmp_path / "free", steps=4, kl_to_reference=1e-12)
    _, held = fit(tmp_path / "held", steps=4, kl_to_reference=2.0)
    assert held[-1] < 0.7 * free[-1]


def test_without_a_coefficient_there_is_no_reference(tmp_path):
    module, kl = fit(tmp_path, steps=1, kl_to_reference=0.0)
    assert module.teacher is None
    assert kl == []
    assert all(row.reference_log_probs is None for row in module.last_samples)


def test_an_adapter_is_compared_with_the_base_model_without_a_copy_of_it(tmp_path):
    module, kl = fit(tmp_path, steps=2, lora=LoRA(r=4), optimizer=lambda p: torch.optim.SGD(p, lr=5.0))
    assert isinstance(module.teacher, FrozenAdapterTeacher)
    assert sum(p.numel() for p in module.teacher.parameters()) < 0.2 * sum(p.numel() for p in module.model.parameters())
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[1] > 1e-6


@pytest.mark.parametrize("cls", [HAPO, RLSD, SRPO])
def test_others_refuse_it(cls):
    limits = GRPO_LIMITS if cls is HAPO else LIMITS
    with pytest.raises(ValueError, match=f"`policy_gradient.kl_to_reference` 0 with {cls.__name__}, .*but got 0.3"):
        build(cls, tiny_model(), half_right, tokenizer=TOKENIZER, kl_to_reference=KL, num_generations=2, **limits)
    with pytest.raises(ValueError, match=r"`policy_gradient.kl_to_reference` 0 with TGPO, which has a teacher"):
        GuidedPolicyGradient(None, config=PolicyGradientConfig(kl_to_reference=KL))
