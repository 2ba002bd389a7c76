"""Whose adapter the teacher has, how it moves, and how it comes back from a checkpoint."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.models.adapter import adapter
from pgpo_lightning.models.lm_head import head
from pgpo_lightning.models.lora import write_adapter
from tests.support.adapters import disturb, gradients, load, logits, lora, matrices, teacher_logits, with_product
from tests.support.helpers import (
    random_rows,
    tiny_model,
    tiny_sdpo,
)


def test_the_moving_teacher_averages_both_factors_from_where_the_student_started():
    module = tiny_sdpo(lora=lora(), teacher_update_rate=0.05)
    disturb(module.model, seed=9)
    module.teacher.model.load_state_dict(matrices(module.model))
    expected = {name: matrix.double() for name, matrix in matrices(module.model).items()}
    for k in range(4):
        disturb(module.model, seed=k)
        module.learner.move_teacher()
        expected = {
            name: 0.95 * average + 0.05 * adapter(module.model)[name].detach().double()
            for name, average in expected.items()
        }
    mine = dict(module.teacher.model.named_parameters())
    assert mine.keys() == expected.keys()
    for name, average in expected.items():
        torch.testing.assert_close(mine[name].double(), average, rtol=0, atol=1e-6)


def test_the_moving_teacher_starts_at_the_students_adapter():
    module = tiny_sdpo(lora=lora())
    start, mine = adapter(module.model), dict(module.teacher.model.named_parameters())
    assert all(torch.equal(mine[name], start[name]) for name in start)
    assert max(float(matrix.abs().max()) for matrix in mine.values()) > 0  # not zero: A is random
    assert not {id(matrix) for matrix in mine.values()} & {id(matrix) for matrix in start.values()}


@pytest.mark.parametrize("kind", ["ema", "frozen", "live", "trust-region"])
def test_every_mode_gives_the_logits_that_its_definition_gives(kind):
    rate = {} if kind in ("frozen", "live") else {"teacher_update_rate": 0.3}
    module = tiny_sdpo(lora=lora(), teacher_regularization=kind, **rate)
    start = matrices(module.model)
    disturb(module.model)
    now = matrices(module.model)
    module.learner.move_teacher()
    average = {name: 0.7 * start[name] + 0.3 * now[name] for name in now}
    row = random_rows(1)[0]
    base, ema, student = (logits(with_product(tiny_model(), each), row) for each in (start, average, now))
    expected = {"ema": ema, "frozen": base, "live": student, "trust-region": 0.7 * base + 0.3 * student}[kind]
    assert (student - base).abs().max() > 0.1
    torch.testing.assert_close(teacher_logits(module, row), expected, rtol=1e-4, atol=1e-4)


def test_the_frozen_teacher_of_a_fresh_adapter_stays_the_base_model_to_the_last_bit():
    module = tiny_sdpo(lora=lora(), teacher_regularization="frozen")
    disturb(module.model)
    module.learner.move_teacher()
    row = random_rows(1)[0]
    plain = tiny_sdpo(teacher_regularization="frozen")
    assert torch.equal(teacher_logits(module, row), teacher_logits(plain, row))


def test_the_frozen_teacher_of_a_trained_adapter_is_that_adapter(tmp_path):
    before = tiny_sdpo(lora=lora())
    disturb(before.model)
    write_adapter(tmp_path, matrices(before.model), before.student.identity)
    module = tiny_sdpo(lora=lora(adapter=str(tmp_path)), teacher_regularization="frozen")
    row = random_rows(1)[0]
    start = logits(before.model, row)
    assert torch.equal(logits(module.model, row), start)
    disturb(module.model, seed=3)
    torch.testing.assert_close(teacher_logits(module, row), start, rtol=1e-5, atol=1e-5)
    assert (logits(module.model, row) - start).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["ema", "trust-region"])
@pytest.mark.parametrize("breaks", [False, True])
def test_a_teachers_forward_pass_leaves_no_trace(monkeypatch, kind, breaks):
    module = tiny_sdpo(lora=lora(), teacher_regularization=kind)
    disturb(module.model)
    module.train()
    rows = random_rows(2)
    before = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in module.named_parameters()}
    undisturbed = gradients(module, rows)
    hidden = []

    def teach():
        if not breaks:
            module.learner.teacher_sources(rows)
            return
        broken = module.model.model.layers[1].mlp.down_proj.base_layer
        monkeypatch.setattr(broken, "forward", lambda x: hidden.append(x) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            module.learner.teacher_sources(rows)
        monkeypatch.undo()

    with_teacher = gradients(module, rows, between=teach)  # between the student's forward pass and its backward pass
    assert bool(hidden) == breaks
    assert all(torch.equal(with_teacher[name], gradient) for name, gradient in undisturbed.items())
    for name, p in module.named_parameters():
        identity, trains, value = before[name]
        assert (id(p), p.requires_grad) == (identity, trains), name
        assert torch.equal(p, value), name
    assert not any(p.requires_grad for p in module.teacher.parameters())
    assert all(m.training for m in module.model.modules())


def test_the_teacher_has_no_dropout():
    module = tiny_sdpo(model=tiny_model(attention_dropout=0.5), lora=lora())
    module.train()
    row = random_rows(1)[0]
    assert torch.equal(teacher_logits(module, row), teacher_logits(module, row))


def test_what_an_earlier_pass_over_the_batch_kept_is_used_with_the_students_head():
    module = tiny_sdpo(lora=lora(), num_iterations=2)
    rows = random_rows(2)
    first = module.learner.teacher_sources(rows)[0]
    disturb(module.model)
    again = module.learner.teacher_sources(rows)[0]
    assert torch.equal(again.hidden, first.hidden)
    assert again.head.weight is head(module.model).weight


@pytest.mark.parametrize("kind", ["ema", "frozen", "trust-region"])
def test_adapters_come_back(kind):
    module = tiny_sdpo(lora=lora(), teacher_regularization=kind)
    disturb(module.model)
    module.learner.move_teacher()
    other = tiny_sdpo(lora=lora(), teacher_regularization=kind)
    load(module, other)
    rows = random_rows(1)
    assert torch.equal(logits(other.model, rows[0]), logits(module.model, rows[0]))
    assert torch.equal(teacher_logits(other, rows[0]), teacher_logits(module, rows[0]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"seed": 5, "lora": lora()},
            r"Expected `model` to be the base that the adapter was trained on .*other weights",
        ),
        (
            {"lora": lora(r=8)},
            r"Expected a checkpoint of the configured `lora`, but its adapter has `r` 4 instead of 8",
        ),
        ({"lora": lora(target_modules=["q_proj"])}, r"`target_modules` 'all-linear' instead of \['q_proj'\]"),
        ({}, r"Expected a checkpoint of a run without `lora`, but it holds an adapter"),
    ],
)
def test_a_checkpoint_of_another_base_or_adapter_is_refused(settings, message):
    with pytest.raises(MisconfigurationException, match=message):
        load(tiny_sdpo(lora=lora()), tiny_sdpo(**settings))


def test_a_checkpoint_of_whole_weights_is_refused():
    with pytest.raises(MisconfigurationException, match="a run with `lora`, but it holds whole weights"):
        load(tiny_sdpo(), tiny_sdpo(lora=lora()))
