"""An adapter instead of the weights: its start, its scale, its precision and its gradients."""

import pytest
import torch

from pgpo_lightning.models.adapter import adapter
from pgpo_lightning.models.lm_head import source
from pgpo_lightning.models.packing import Sequences
from pgpo_lightning.modules import SDPO
from pgpo_lightning.rollout.engine import Sampling
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from tests.support.adapters import (
    SCALE,
    base_weights,
    disturb,
    gradients,
    logits,
    lora,
    matrices,
    teacher_logits,
    with_product,
)
from tests.support.helpers import (
    LIMITS,
    TOKENIZER,
    build,
    half_right,
    questions,
    random_rows,
    tiny_model,
    tiny_sdpo,
)


@pytest.mark.parametrize("kind", ["ema", "frozen", "live", "trust-region"])
def test_a_fresh_adapter_changes_nothing_and_all_teachers_start_there(kind):
    row = random_rows(1)[0]
    plain = logits(tiny_model(), row)
    module = tiny_sdpo(lora=lora(), teacher_regularization=kind)
    assert torch.equal(logits(module.model, row), plain)
    torch.testing.assert_close(teacher_logits(module, row), plain, rtol=1e-5, atol=1e-5)


def test_the_random_half_of_an_adapter_follows_from_the_seed_alone():
    first, second = (matrices(tiny_sdpo(lora=lora(), seed=0).model) for _ in range(2))
    torch.manual_seed(7)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = tiny_sdpo(lora=lora())
    other_seed = build(SDPO, tiny_model(), half_right, tokenizer=TOKENIZER, lora=lora(), **LIMITS, **{"seed": 1})
    other_seed.configure_model()
    name = next(iter(first))
    assert torch.equal(matrices(other.model)[name], first[name])
    assert not torch.equal(matrices(other_seed.model)[name], first[name])


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"target_modules": ["q_proj", "mlp.up_proj"]}])
def test_scale_and_layers_are_those_of_the_settings(settings):
    module = tiny_sdpo(lora=lora(**settings))
    disturb(module.model)
    layers = {name.split(".lora_")[0] for name in adapter(module.model)}
    assert len(layers) == (14 if "use_rslora" in settings else 4)
    expected = 8 / 4**0.5 if "use_rslora" in settings else SCALE
    row = random_rows(1)[0]
    scaled = {
        name: matrix * (expected / SCALE if ".lora_B." in name else 1)
        for name, matrix in matrices(module.model).items()
    }
    torch.testing.assert_close(
        logits(module.model, row), logits(with_product(tiny_model(), scaled), row), rtol=1e-4, atol=1e-4
    )


def test_gradient_checkpointing_gives_the_same_gradients_of_frozen_weights():
    rows = random_rows(3)
    plain, recomputed = (tiny_sdpo(lora=lora(), gradient_checkpointing=on) for on in (False, True))
    assert [packing.prompt_sharing for packing in plain.learner.packings] == ["if-cheaper", "if-cheaper"]
    assert [packing.prompt_sharing for packing in recomputed.learner.packings] == ["never", "if-cheaper"]
    for module in (plain, recomputed):
        disturb(module.model)
    teachers = lambda: recomputed.learner.teacher_sources(rows)  # noqa: E731  (in evaluation mode, before the student's recomputation)
    first, second = gradients(plain, rows), gradients(recomputed, rows, teachers)
    for name, gradient in first.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(second[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_the_sampler_says_of_its_tokens_what_the_trainer_says():
    module = tiny_sdpo(lora=lora())
    disturb(module.model, 0.2)
    asked = questions(2)
    prompts = [module.encoder.question(question) for question in asked]
    torch.manual_seed(0)
    rollouts = TransformersEngine().generate(module.model, TOKENIZER, asked, prompts, 3, Sampling(12))
    sequences = module.learner.pack([(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts])
    assert not isinstance(sequences, Sequences)  # the prompts were shared
    with torch.no_grad():
        there = source(module.model, sequences)
    log_p = there.head(there.hidden).log_softmax(-1).gather(1, sequences.targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(log_p, torch.cat([rollout.log_probs for rollout in rollouts]), rtol=1e-4, atol=1e-4)


def test_adapters_stay_in_fp32_over_a_base_in_bf16():
    module = tiny_sdpo(model=tiny_model().bfloat16(), lora=lora())
    assert {p.dtype for p in adapter(module.model).values()} == {torch.float32}
    assert {p.dtype for p in base_weights(module.model).values()} == {torch.bfloat16}
    module.to(torch.bfloat16)  # what Lightning's bf16-true does to the whole module
    assert {p.dtype for p in module.teacher.parameters()} == {torch.float32}
    row, plain = random_rows(1)[0], tiny_sdpo(model=tiny_model().bfloat16(), teacher_regularization="frozen")
    assert torch.equal(teacher_logits(module, row), teacher_logits(plain, row))
