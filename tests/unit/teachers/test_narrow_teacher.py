"""The EMA teacher in bf16: it follows the average, with fresh random numbers that a checkpoint restores."""

import copy

import pytest
import torch

from pgpo_lightning.models.lora import LoRA
from pgpo_lightning.modules import SDPO
from pgpo_lightning.teachers import ema
from pgpo_lightning.teachers.configs import TeacherConfig
from pgpo_lightning.teachers.ema import EMATeacher, NarrowEMATeacher
from tests.support.helpers import (
    LIMITS,
    TOKENIZER,
    accumulate,
    build,
    half_right,
    loader,
    questions,
    random_rows,
    tiny_model,
    tiny_sdpo,
    trainer,
)
from tests.support.teachers import weights

NARROW = {"teacher.dtype": "bfloat16"}
STEPS, RATE = 60, 0.02


def walks(student, steps=STEPS):
    """Yield after every step of a student that drifts, by about a bf16 step in twenty."""
    drift = [3e-4 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in
             enumerate(student.parameters())]  # fmt: skip
    for _ in range(steps):
        with torch.no_grad():
            for p, by in zip(student.parameters(), drift, strict=True):
                p.add_(by * (1 + p.abs()))
        yield


def follow(teacher, student):
    """Return the distance from the fp32 average after the walk, relative to how far that has moved, and the cosine of both."""
    exact, start = EMATeacher(student, RATE), weights(student)
    for _ in walks(student):
        exact.update(student)
        teacher.update(student)
    way, ours = weights(exact.model) - start, weights(teacher.model) - start.bfloat16().double()
    apart = (ours - way).norm() / way.norm()
    return apart.item(), torch.cosine_similarity(ours, way, dim=0).item()


def test_it_follows_the_average_where_nearest_and_numbers_that_never_change_do_not(monkeypatch):
    student = tiny_model()
    apart, cosine = follow(NarrowEMATeacher(student, RATE), copy.deepcopy(student))
    assert apart < 0.2
    assert cosine > 0.98
    monkeypatch.setattr(ema, "derive_seed", lambda name, updates, i: i)
    stale, _ = follow(NarrowEMATeacher(student, RATE), copy.deepcopy(student))
    monkeypatch.setattr(ema, "lerp_rounded_", lambda own, new, rate, _: own.copy_(own.float().lerp_(new, rate)))
    nearest, _ = follow(NarrowEMATeacher(student, RATE), copy.deepcopy(student))
    assert min(stale, nearest) > 0.35


def test_every_update_and_every_weight_has_numbers_of_its_own(monkeypatch):
    seeds = []
    monkeypatch.setattr(ema, "lerp_rounded_", lambda own, new, rate, seed: seeds.append(seed))
    module = tiny_sdpo(**NARROW)
    for _ in range(3):
        module.learner.move_teacher()
    assert len(seeds) == len(set(seeds)) == 3 * len(list(module.model.parameters()))


def test_it_has_two_bytes_a_weight_and_keeps_buffers_and_ties():
    module = tiny_sdpo(**NARROW)
    theirs = module.teacher.model
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    assert theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert torch.equal(theirs.model.rotary_emb.inv_freq, module.model.model.rotary_emb.inv_freq)  # fp32
    assert {p.dtype for p in module.model.parameters()} == {torch.float32}
    for dtype in (torch.bfloat16, torch.float32):
        module.to(dtype)
        assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
        assert theirs.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_copied_teacher_of_a_student_in_bf16_keeps_the_frequencies_in_fp32():
    model = tiny_model()
    model._apply(lambda t: t.bfloat16() if isinstance(t, torch.nn.Parameter) else t)  # as transformers loads it
    module = tiny_sdpo(model=model, teacher_regularization="gated")
    assert {p.dtype for p in module.teacher.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in module.teacher.buffers()} == {torch.float32}


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_rate_of_zero_is_the_start_and_of_one_the_student(rate):
    module = tiny_sdpo(teacher_update_rate=rate, **NARROW)
    start = weights(module.teacher.model)
    for _ in walks(module.model, 3):
        module.learner.move_teacher()
    now = weights(module.teacher.model)
    if rate == 0:
        assert torch.equal(now, start)
    else:
        assert not torch.equal(now, start)
        torch.testing.assert_close(now, weights(module.model), rtol=2**-7, atol=0)  # a step of bf16


def test_on_the_host_it_is_the_same_to_the_last_bit():
    ends = []
    for offload in (False, True):
        module = tiny_sdpo(teacher_offload=offload, **NARROW)
        losses = []
        for i, _ in enumerate(walks(module.model, 3)):
            losses.append(accumulate(module, random_rows(4, i)))
            module.model.zero_grad()
            module.teacher.release()
            module.learner.move_teacher()
        ends.append((losses, weights(module.teacher.model)))
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("through", ["state_dict", "checkpoint"])
def test_a_resumed_teacher_is_the_uninterrupted_one_bit_for_bit(through):
    """Under FSDP2 Lightning loads a single file weight by weight; the number of updates comes back beside it."""
    module, other = tiny_sdpo(**NARROW), tiny_sdpo(seed=5, **NARROW)
    for step, _ in enumerate(walks(module.model, 6), 1):
        module.learner.move_teacher()
        if step == 2:
            state, checkpoint = copy.deepcopy(module.state_dict()), {}
            module.on_save_checkpoint(checkpoint)
    if through == "state_dict":
        other.load_state_dict(state)
    else:
        other.load_state_dict({k: v for k, v in state.items() if torch.is_tensor(v)}, strict=False)
        assert other.teacher.updates == 0
        other.on_load_checkpoint(checkpoint)
    assert other.teacher.updates == 2
    for _ in walks(other.model, 4):
        other.learner.move_teacher()
    assert torch.equal(weights(other.model), weights(module.model))
    assert torch.equal(weights(other.teacher.model), weights(module.teacher.model))


@pytest.mark.filterwarnings("ignore:Weights in bfloat16 and an optimizer that rounds to nearest")
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_run_in_every_precision(tmp_path, precision, offload):
    module = build(SDPO, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, teacher_offload=offload,
                   optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **NARROW, **LIMITS)  # fmt: skip
    trainer(tmp_path, max_steps=2, precision=precision).fit(module, loader(questions(4), 2))
    assert module.teacher.updates == 2
    assert {p.dtype for p in module.teacher.parameters()} == {torch.bfloat16}
    assert module.teacher.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert module.scalars["actor/pg_loss"] > 0
    rows = random_rows(4)
    with torch.autocast("cpu", torch.bfloat16, precision == "bf16-mixed"):
        (ours,) = module.learner.teacher_sources(rows)
        module.teacher.release()
        logits = ours.head(ours.hidden).float()
    wide = copy.deepcopy(module.teacher.model).float()
    for row, part in zip(rows, logits.split([len(row.rollout.response_ids) for row in rows]), strict=True):
        ids = torch.tensor([[*row.reprompt_ids, *row.rollout.response_ids]])
        with torch.no_grad():
            exact = wide(input_ids=ids).logits[0, len(row.reprompt_ids) - 1 : -1]
        assert (part - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float16"}, "`teacher.dtype` to be float32 or bfloat16 with the ema teacher.*Set it to bfloat16"),
        *(
            (
                {"dtype": "bfloat16", "regularization": kind},
                f"no `teacher.dtype` with the {kind} teacher made of the student, but got bfloat16. Set it to null, or "
                "`teacher.regularization` to ema",
            )
            for kind in ("frozen", "live", "trust-region", "restart", "gated")
        ),
    ],
)
def test_a_type_that_a_teacher_cannot_have_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TeacherConfig(**settings)


def test_a_type_of_an_adapter_is_refused():
    with pytest.raises(ValueError, match=r"no `teacher.dtype` with a teacher that has an adapter.*Set it to null"):
        build(SDPO, tiny_model(), half_right, tokenizer=TOKENIZER, lora=LoRA(r=2), **NARROW, **LIMITS)


def test_float32_is_the_default_of_an_average():
    module = tiny_sdpo(**{"teacher.dtype": "float32"})
    assert type(module.teacher) is EMATeacher
    assert TeacherConfig(dtype="float32").settled() == TeacherConfig().settled()
    assert TeacherConfig(dtype="bfloat16").settled()["dtype"] == "bfloat16"
    assert TeacherConfig(model="toy", dtype="float32").settled()["dtype"] == "float32"
