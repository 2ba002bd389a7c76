"""Under bf16-true the frequencies of rotary embeddings stay as exact as in a model that is loaded in bf16."""

import pytest
import torch

from pgpo_lightning.core.buffers import keeping_buffers
from pgpo_lightning.modules import GRPO
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from tests.support.adapters import lora
from tests.support.helpers import (
    TOKENIZER,
    build,
    half_right,
    loader,
    questions,
    tiny_model,
    tiny_sdpo,
    trainer,
)

pytestmark = pytest.mark.filterwarnings("ignore:Weights in bfloat16 and an optimizer")
KINDS = {
    "ema": {},
    "frozen": {"teacher_regularization": "frozen"},
    "frozen, offloaded": {"teacher_regularization": "frozen", "teacher_offload": True},
    "live": {"teacher_regularization": "live"},
    "trust-region": {"teacher_regularization": "trust-region"},
    "gated": {"teacher_regularization": "gated"},
    "adapter": {"lora": lora()},
}


def frequencies(module):
    return {name: buffer for name, buffer in module.named_buffers() if "inv_freq" in name}


def trained(module, folder):
    trainer(folder, precision="bf16-true", max_steps=1, limit_val_batches=0).fit(module, loader(questions(2)))
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_s_and_the_teacher_s_stay_in_fp32(tmp_path, kind):
    module = trained(tiny_sdpo(**KINDS[kind]), tmp_path)
    expected = tiny_model().model.rotary_emb.inv_freq
    found = frequencies(module)
    assert len(found) >= 2
    for name, buffer in found.items():
        assert torch.equal(buffer, expected), name
    base = [p for name, p in module.model.named_parameters() if "lora" not in name]
    assert {p.dtype for p in base} == {torch.bfloat16}


def test_a_module_without_a_teacher(tmp_path):
    limits = {"max_prompt_length": 64, "max_response_length": 12}
    module = build(GRPO, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, **limits)
    assert {buffer.dtype for buffer in frequencies(trained(module, tmp_path).model).values()} == {torch.float32}


def test_predictions_far_into_a_text_are_those_of_a_model_that_was_loaded_in_bf16(tmp_path):
    """Narrowed frequencies change them."""
    ids = torch.randint(5, 200, (1, 1200), generator=torch.Generator().manual_seed(0))
    tiny_model(max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    loaded = type(tiny_model()).from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    module = tiny_sdpo(model=tiny_model(max_position_embeddings=2048), engine=TransformersEngine())
    module.to(torch.bfloat16)
    narrowed = tiny_model(max_position_embeddings=2048).to(torch.bfloat16)
    with torch.no_grad():
        ours, theirs, wrong = (model(ids).logits for model in (module.model.eval(), loaded, narrowed.eval()))
    assert torch.equal(ours, theirs)
    assert not torch.equal(wrong, theirs)


def test_a_wider_type_a_move_and_weights_are_left_to_the_conversion():
    model = tiny_model()
    weight, frequency = model.model.norm.weight, model.model.rotary_emb.inv_freq
    halved = keeping_buffers(model, lambda t: t.half())
    assert halved(weight).dtype == torch.float16
    assert halved(frequency) is frequency
    assert keeping_buffers(model, lambda t: t.double())(frequency).dtype == torch.float64
    assert keeping_buffers(model, lambda t: t.to("meta", torch.bfloat16))(frequency).device.type == "meta"
