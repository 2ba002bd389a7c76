"""The package against `docs/pgpo_in_one_file.py`: PGPO in plain lines, whole logits, autograd."""

import importlib.util
import random
import sys

import pytest
import torch

from pgpo_lightning.callbacks import InformationMultiplier
from pgpo_lightning.core.seeding import seeded
from pgpo_lightning.data.toy import questions
from pgpo_lightning.modules import SDPO
from pgpo_lightning.rewards import BoxedAnswer
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from tests.support import ROOT
from tests.support.helpers import build, loader, trainer

STEPS, SEED = 3, 5
_spec = importlib.util.spec_from_file_location("pgpo_in_one_file", ROOT / "docs" / "pgpo_in_one_file.py")
one_file = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = one_file  # where its dataclasses look for their annotations
_spec.loader.exec_module(one_file)

SETTINGS = one_file.Settings(batch_size=8, num_generations=4, learning_rate=2e-4, sensitivity=2.0)


class Recording(TransformersEngine):
    """Samples, and remembers what it sampled."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def generate(self, *args):
        self.steps.append(super().generate(*args))
        return self.steps[-1]


class Watched(InformationMultiplier):
    """Remembers the clipped gradient and the scalars of every step."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.gradients, self.scalars, self.contexts = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.gradients.append([p.grad.clone() for p in pl_module.model.parameters()])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.scalars.append(dict(pl_module.scalars))
        self.contexts.append([row.reprompt_ids for row in pl_module.last_samples])


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Three steps of the package, and everything it saw."""
    batch = questions("train")[: STEPS * SETTINGS.batch_size]
    module = build(
        SDPO,
        "toy",
        BoxedAnswer(),
        engine=Recording(),
        num_generations=SETTINGS.num_generations,
        max_prompt_length=64,
        max_reprompt_len=160,
        max_response_length=SETTINGS.max_response_length,
        optimizer=lambda p: torch.optim.AdamW(p, lr=SETTINGS.learning_rate, weight_decay=SETTINGS.weight_decay),
        seed=SEED,
    )
    watched = Watched(sensitivity=SETTINGS.sensitivity, rho_max=SETTINGS.rho_max)
    run = trainer(tmp_path_factory.mktemp("run"), max_steps=STEPS, callbacks=[watched])
    run.fit(module, loader(batch, SETTINGS.batch_size))
    return module, watched


@pytest.fixture(scope="module")
def plain(package):
    """The same three steps in plain lines, from the rollouts that the package sampled."""
    module, _ = package
    student, teacher, tokenizer = one_file.load()
    optimizer = torch.optim.AdamW(student.parameters(), lr=SETTINGS.learning_rate, weight_decay=SETTINGS.weight_decay)
    steps, gradients, contexts = [], [], []
    for number, sampled in enumerate(module.engine.steps):
        rollouts = [
            one_file.Rollout(
                rollout.question,
                rollout.prompt_ids,
                rollout.response_ids,
                rollout.log_probs,
                rollout.text,
                one_file.verify(rollout.question, rollout.text),
            )
            for rollout in sampled
        ]
        with seeded(SEED, "train", number, 0) as rng:  # the package's choice of demonstrations
            one_file.add_teacher_prompts(rollouts, tokenizer, rng)
        contexts.append([rollout.teacher_prompt_ids for rollout in rollouts])
        steps.append(one_file.learn(student, teacher, optimizer, rollouts, SETTINGS))
        gradients.append([p.grad.clone() for p in student.parameters()])
    return student, teacher, steps, gradients, contexts


def test_teacher_prompts_are_the_same_to_the_token(package, plain):
    _, watched = package
    assert watched.contexts == plain[4]
    assert any(ids is None for step in watched.contexts for ids in step)
    assert any(ids is not None for step in watched.contexts for ids in step)


def test_losses_information_and_multipliers_agree(package, plain):
    _, watched = package
    for scalars, step in zip(watched.scalars, plain[2], strict=True):
        assert scalars["actor/pg_loss"] == pytest.approx(step.loss, rel=1e-4)
        assert scalars["actor/grad_norm"] == pytest.approx(step.grad_norm, rel=1e-4)
        assert scalars["information/used"] == pytest.approx(step.information, rel=1e-4)
        assert scalars["lr/multiplier"] == pytest.approx(step.rho, rel=1e-5)
    assert len({round(step.rho, 4) for step in plain[2]}) == STEPS > 1
    assert all(1 < step.rho < SETTINGS.rho_max for step in plain[2])  # no bound hides a difference


def test_gradients_agree(package, plain):
    _, watched = package
    for ours, theirs in zip(watched.gradients, plain[3], strict=True):
        flat, expected = (torch.cat([g.flatten() for g in gradients]) for gradients in (ours, theirs))
        assert (flat - expected).norm() < 1e-4 * expected.norm()


def test_student_and_teacher_agree_after_three_steps(package, plain):
    module, _ = package
    base = one_file.load()[0]
    for model, expected in ((module.model, plain[0]), (module.teacher.model, plain[1])):
        flat, wanted, start = (
            torch.cat([p.detach().flatten() for p in each.parameters()]) for each in (model, expected, base)
        )
        # Adam's first steps divide tiny gradients by themselves: an entry whose sign is rounding moves by the whole rate.
        assert (flat - wanted).norm() < 1e-3 * (wanted - start).norm()


def test_the_sampler_of_the_file_gives_the_log_probabilities_of_its_own_forward_pass():
    student, _, tokenizer = one_file.load()
    torch.manual_seed(1)
    rollouts = one_file.sample(student, tokenizer, questions("train")[:3], SETTINGS)
    assert len(rollouts) == 3 * SETTINGS.num_generations
    prompts, responses = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
    log_p = one_file.response_log_probs(student, prompts, responses, 1.0)
    for row, rollout in zip(log_p, rollouts, strict=True):
        ids = torch.tensor(rollout.response_ids)
        torch.testing.assert_close(row[torch.arange(len(ids)), ids].detach(), rollout.log_probs, atol=1e-4, rtol=0)


def test_the_file_trains_and_says_what_it_did(capsys):
    steps = one_file.main(one_file.Settings(steps=2, batch_size=4, num_generations=4))
    assert [step is not None for step in steps] == [True, True]
    assert capsys.readouterr().out.count("rho") == 2


def test_without_a_teacher_nothing_moves():
    student, teacher, _ = one_file.load()
    before = [p.clone() for p in student.parameters()]
    optimizer = torch.optim.AdamW(student.parameters(), lr=1.0, weight_decay=1.0)
    rollout = one_file.Rollout(questions("train")[0], [5], [6], torch.zeros(1), "", 0.0)
    assert one_file.learn(student, teacher, optimizer, [rollout], SETTINGS) is None
    assert all(torch.equal(p, q) for p, q in zip(before, student.parameters(), strict=True))


def test_its_divergence_is_symmetric_and_bounded():
    log_s, log_t = (torch.randn(4, 7, generator=torch.Generator().manual_seed(i)).log_softmax(-1) for i in (0, 1))
    value = one_file.jensen_shannon(log_s, log_t, 0.3)
    torch.testing.assert_close(value, one_file.jensen_shannon(log_t, log_s, 0.7))
    assert (value > 0).all()
    assert (value < torch.log(torch.tensor(2.0))).all()


def test_a_random_sibling_is_shown_and_never_the_responses_own():
    _, _, tokenizer = one_file.load()
    question = questions("train")[0]
    rollouts = [one_file.Rollout(question, [5], [6], torch.zeros(1), f"answer {i}", float(i < 2)) for i in range(4)]
    one_file.add_teacher_prompts(rollouts, tokenizer, random.Random(0))
    shown = [tokenizer.decode(rollout.teacher_prompt_ids) for rollout in rollouts]
    assert "answer 1" in shown[0]
    assert "answer 0" in shown[1]
    assert shown[2] == shown[3]
