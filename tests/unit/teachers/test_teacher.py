"""Whose weights the teacher has, how they move, and what of them a checkpoint holds."""

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.models.lm_head import head, source
from pgpo_lightning.modules import SDPO
from pgpo_lightning.modules.moved import MOVED
from pgpo_lightning.teachers import schedules
from pgpo_lightning.teachers.schedules import RefreshGate
from tests.support.helpers import LIMITS, TOKENIZER, build, half_right, random_rows, tiny_model, tiny_sdpo
from tests.support.teachers import GATE, outcome, weights


def disturb(model, scale=0.1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator).to(p.dtype))


def test_ema_follows_its_formula_and_starts_at_the_student():
    module = tiny_sdpo(teacher_update_rate=0.05)
    start = weights(module.model)
    assert torch.equal(weights(module.teacher.model), start)
    expected = start.clone()
    for k in range(4):
        disturb(module.model, seed=k)
        module.learner.move_teacher()
        expected = 0.95 * expected + 0.05 * weights(module.model)
    torch.testing.assert_close(weights(module.teacher.model), expected, rtol=0, atol=1e-6)


def test_ema_stays_in_fp32_and_keeps_increments_that_bf16_would_round_away():
    module = tiny_sdpo(model=tiny_model().bfloat16())
    module.to(torch.bfloat16)  # what Lightning's bf16-true does to the whole module
    assert {p.dtype for p in module.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in module.teacher.parameters()} == {torch.float32}
    with torch.no_grad():
        for p in module.model.parameters():
            p.mul_(1 + 2**-7)  # one bf16 step up
    before = weights(module.teacher.model)
    module.learner.move_teacher()
    moved = (weights(module.teacher.model) - before).abs()
    assert moved.sum().item() == pytest.approx(0.05 * (weights(module.model) - before).abs().sum().item(), rel=1e-3)
    assert torch.equal(weights(module.teacher.model.bfloat16()), before)  # in bf16 nothing would have moved


def test_a_rate_of_one_is_the_student_and_of_zero_the_start():
    for rate, expect in ((1.0, lambda start, now: now), (0.0, lambda start, now: start)):
        module = tiny_sdpo(teacher_update_rate=rate)
        start = weights(module.model)
        disturb(module.model)
        module.learner.move_teacher()
        torch.testing.assert_close(
            weights(module.teacher.model), expect(start, weights(module.model)), rtol=0, atol=1e-7
        )


def test_a_live_teacher_holds_no_copy():
    module = tiny_sdpo(teacher_regularization="live")
    assert list(module.teacher.parameters()) == []
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in module.model.parameters())


def test_a_module_object_with_changed_weights_gets_a_teacher_with_those_weights():
    model = tiny_model()
    disturb(model)
    module = tiny_sdpo(model=model)
    assert torch.equal(weights(module.teacher.model), weights(model))
    assert not torch.equal(weights(module.teacher.model), weights(tiny_model()))


def teacher_logits(module, rows):
    sources = module.learner.teacher_sources(rows)
    assert not any(s.hidden.requires_grad for s in sources)
    return sum(s.weight * s.head(s.hidden) for s in sources)


def plain_logits(model, row):
    ids = torch.tensor([[*row.reprompt_ids, *row.rollout.response_ids]])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[0, len(row.reprompt_ids) - 1 : -1]
    model.train()
    return logits


@pytest.mark.parametrize("kind", ["ema", "frozen", "live", "trust-region"])
def test_every_mode_gives_the_logits_that_its_definition_gives(kind):
    rate = {} if kind in ("frozen", "live") else {"teacher_update_rate": 0.3}
    module = tiny_sdpo(teacher_regularization=kind, **rate)
    start = copy.deepcopy(module.model)
    disturb(module.model, 0.05)
    module.learner.move_teacher()
    ema = copy.deepcopy(start)
    with torch.no_grad():
        for e, s in zip(ema.parameters(), module.model.parameters(), strict=True):
            e.lerp_(s, 0.3)
    rows = random_rows(3)
    expected = {
        "ema": lambda row: plain_logits(ema, row),
        "frozen": lambda row: plain_logits(start, row),
        "live": lambda row: plain_logits(module.model, row),
        "trust-region": lambda row: torch.lerp(plain_logits(start, row), plain_logits(module.model, row), 0.3),
    }[kind]
    got = teacher_logits(module, rows)
    torch.testing.assert_close(got, torch.cat([expected(row) for row in rows]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "saved"), [("ema", True), ("frozen", False), ("live", False), ("trust-region", False)]
)
def test_a_moving_teacher_is_saved_and_a_frozen_one_is_not(kind, saved):
    module = tiny_sdpo(teacher_regularization=kind)
    names = [name for name, value in module.state_dict().items() if torch.is_tensor(value)]
    assert any(name.startswith("teacher.") for name in names) == saved
    assert any(name.startswith("model.") for name in names)


def test_ema_weights_come_back_and_differ_from_the_student():
    module = tiny_sdpo()
    disturb(module.model)
    module.learner.move_teacher()
    other = tiny_sdpo(seed=5)
    other.load_state_dict(module.state_dict())
    assert torch.equal(weights(other.teacher.model), weights(module.teacher.model))
    assert not torch.equal(weights(other.teacher.model), weights(other.model))


def test_a_frozen_teacher_is_checked_where_its_state_is_not_loaded():
    """Under FSDP2 Lightning loads a single file weight by weight, and nothing else of it."""
    checkpoint = {}
    tiny_sdpo(teacher_regularization="frozen").on_save_checkpoint(checkpoint)
    tiny_sdpo(teacher_regularization="frozen").on_load_checkpoint(checkpoint)
    with pytest.raises(MisconfigurationException, match=r"because the teacher is made of its weights, but got others"):
        tiny_sdpo(seed=5, teacher_regularization="frozen").on_load_checkpoint(checkpoint)


@pytest.mark.parametrize("kind", ["frozen", "trust-region"])
def test_a_frozen_teacher_is_checked_on_resume(kind):
    module = tiny_sdpo(teacher_regularization=kind)
    frozen = weights(module.teacher.model)
    disturb(module.model)
    state = module.state_dict()

    same = tiny_sdpo(teacher_regularization=kind)
    same.load_state_dict(state)
    assert torch.equal(weights(same.model), weights(module.model))
    assert torch.equal(weights(same.teacher.model), frozen)

    other = tiny_sdpo(seed=5, teacher_regularization=kind)
    with pytest.raises(
        MisconfigurationException, match=r"checkpoint's frozen teacher .* Set `model.model` to the base"
    ):
        other.load_state_dict(state)


def test_the_teacher_never_trains():
    module = tiny_sdpo(model=tiny_model(attention_dropout=0.5))
    module.train()
    assert module.model.training
    assert not any(m.training for m in module.teacher.modules())
    assert not any(p.requires_grad for p in module.teacher.parameters())
    assert all(p.requires_grad for p in module.model.parameters())


@pytest.mark.parametrize("kind", ["frozen", "live"])
def test_a_rate_without_effect_is_refused(kind):
    with pytest.raises(ValueError, match=f"no `teacher.update_rate` with the {kind} teacher"):
        build(
            SDPO,
            tiny_model(),
            half_right,
            tokenizer=TOKENIZER,
            teacher_regularization=kind,
            teacher_update_rate=0.1,
            **LIMITS,
        )


def test_tied_weights_stay_tied_in_the_copy():
    module = tiny_sdpo()
    copied_model = module.teacher.model
    assert copied_model.get_output_embeddings().weight is copied_model.get_input_embeddings().weight
    hidden = torch.randn(2, 32)
    torch.testing.assert_close(head(copied_model)(hidden), hidden @ copied_model.get_input_embeddings().weight.T)


def test_restart_and_freeze_follows_its_formula():
    module = tiny_sdpo(teacher_regularization="restart", teacher_update_rate=0.2, teacher_period=3)
    expected, g = weights(module.model), 1 - 0.8**3
    for step in range(1, 8):
        disturb(module.model, seed=step)
        module.learner.move_teacher()
        if step % 3 == 0:
            expected = (1 - g) * expected + g * weights(module.model)
        torch.testing.assert_close(weights(module.teacher.model), expected, rtol=0, atol=1e-6)
    assert g == pytest.approx(0.488)


def copied(module):
    return torch.equal(weights(module.teacher.model), weights(module.model))


@pytest.mark.parametrize(
    ("gate", "rewards", "copies"),
    [
        ({}, [0.0, 0.0, 0.3, 0.3], [3]),  # at 3 the window's mean is 0.15 > 0 + 0.1
        ({}, [0.0, 0.0, 0.2, 0.2, 0.2], [4]),  # at 3 it is 0.1: not more than the gain
        ({}, [0.5, 0.5, 0.5, 0.5, 0.5], []),  # no progress since the first window
        (
            {},
            [0.0, 0.0, 0.4, 0.4, 0.4, 0.4, 0.6, 0.6, 0.6],
            [3, 6, 9],
        ),  # the reference is what the last copy was taken at
        ({"check_every": 2}, [0.0, 0.0, 0.4, 0.4, 0.4, 0.4], [4]),
        ({"min_steps": 5}, [0.0, 0.0, 0.4, 0.4, 0.4], [5]),
        ({"window": 3, "min_steps": 1}, [0.0, 0.9, 0.9, 0.9, 0.9], [4]),  # not before the window is full: 0.6, then 0.9
    ],
)
def test_the_gate_opens_when_its_conditions_hold(gate, rewards, copies):
    module = tiny_sdpo(teacher_regularization="gated", teacher_gate=RefreshGate(**(GATE | gate)))
    seen = []
    for step, reward in enumerate(rewards, 1):
        outcome(module, reward)
        if copied(module):
            seen.append(step)
    assert seen == copies


def test_rambling_keeps_the_gate_shut():
    seen = []
    for long in (20, 61):  # of a mean over the window of 10 + (20 - 10) / 4, and 10 + 51 / 4
        module = tiny_sdpo(teacher_regularization="gated", teacher_gate=RefreshGate(**(GATE | {"window": 2})))
        for step, reward in enumerate([0.0, 0.0, 0.9], 1):
            outcome(module, reward, (long if step == 2 else 10, 10))
        seen.append(copied(module))
    assert seen == [True, False]


@pytest.mark.parametrize("kind", ["restart", "gated"])
def test_what_a_teacher_counts_comes_back_where_its_state_is_not_loaded(kind):
    checkpoint, module, other = {}, *(tiny_sdpo(teacher_regularization=kind) for _ in range(2))
    for reward in (0.0, 0.5):
        outcome(module, reward)
    module.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)
    assert other.teacher.get_extra_state() == module.teacher.get_extra_state()
    assert other.teacher.steps == 2


def test_a_copied_teacher_has_the_students_type():
    module = tiny_sdpo(teacher_regularization="gated")
    module.to(torch.bfloat16)
    assert {p.dtype for p in module.teacher.parameters()} == {torch.bfloat16}


def test_all_ranks_see_the_same_outcome(monkeypatch):
    module = tiny_sdpo(teacher_regularization="gated", teacher_gate=RefreshGate(**GATE))
    monkeypatch.setattr(schedules, "gather", lambda mine: [mine, [(1.0, 30)]])
    outcome(module, 0.25, (10, 20))
    assert module.teacher.seen[-1] == (0.5, 30, 20.0)


@pytest.mark.parametrize("name", ["min_steps", "window", "check_every", "max_length_ratio"])
def test_the_gates_settings_are_checked(name):
    with pytest.raises(ValueError, match=f"`teacher.gate.{name}` to be at least 1, but got 0"):
        RefreshGate(**{name: 0})


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [("ema", "teacher_gate", RefreshGate()), ("gated", "teacher_period", 5), ("gated", "teacher_update_rate", 0.1)],
)
def test_settings_of_another_teacher_are_refused(kind, name, value):
    with pytest.raises(ValueError, match=f"no `{MOVED[name]}` with the {kind} teacher"):
        build(
            SDPO, tiny_model(), half_right, tokenizer=TOKENIZER, teacher_regularization=kind, **{name: value}, **LIMITS
        )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["live", "trust-region"])
def test_a_teacher_with_the_students_weights_has_no_dropout(kind, checkpointing):
    """The student keeps its own, in the mode that each of its parts had."""
    module = tiny_sdpo(
        model=tiny_model(attention_dropout=0.5), teacher_regularization=kind, gradient_checkpointing=checkpointing
    )
    module.model.model.layers[0].eval()  # as a user may freeze a part
    modes = [part.training for part in module.model.modules()]
    assert 0 < sum(modes) < len(modes)
    rows = random_rows(4)
    sequences = module.learner.pack([(row.reprompt_ids, row.rollout.response_ids) for row in rows])
    one, two = (torch.cat([s.hidden for s in module.teacher.sources(module.model, sequences)]) for _ in range(2))
    assert torch.equal(one, two)
    assert [part.training for part in module.model.modules()] == modes
    student = [source(module.model, sequences).hidden for _ in range(2)]
    assert not torch.equal(*student)


def test_log_probabilities_of_the_policy_have_no_dropout():
    module = tiny_sdpo(model=tiny_model(attention_dropout=0.5))
    rows = random_rows(4)
    one, two = (torch.cat([values for _, values in module.learner.log_probs(rows, rows)]) for _ in range(2))
    assert torch.equal(one, two)
    assert module.model.training
