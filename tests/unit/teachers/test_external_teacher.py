"""A teacher with the weights of another model: of another size, on the host, quantised; what is refused, in one line."""

import copy
import json

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pgpo_lightning.core.errors import UserError
from pgpo_lightning.losses.divergence import forward_kl, generalised_jsd, reverse_kl
from pgpo_lightning.models.lora import LoRA
from pgpo_lightning.models.quantization import Quantization
from pgpo_lightning.modules import RLSD
from pgpo_lightning.teachers.configs import TeacherConfig
from tests.support.external import LARGER, saved
from tests.support.helpers import LIMITS, TOKENIZER, accumulate, build, half_right, random_rows, tiny_model, tiny_sdpo
from tests.support.teachers import weights


def made(folder, **settings):
    return tiny_sdpo(teacher=TeacherConfig(model=folder), **settings)


def on_responses(model, prompt, response):
    with torch.no_grad():
        return model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("padding", [0, 5])
def test_the_loss_is_the_divergence_from_a_model_of_another_size(tmp_path, alpha, padding):
    known = len(TOKENIZER)
    folder = saved(tmp_path, **LARGER, vocab_size=known + padding, tie_word_embeddings=False)
    module = made(folder, divergence_alpha=alpha, importance_weight_cap=None, temperature=0.8)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert len(theirs.lm_head.weight) == known + padding
    rows, expected = random_rows(6), 0.0
    for row in rows:
        y = row.rollout.response_ids
        log_t = (on_responses(theirs, row.reprompt_ids, y)[:, :known] / 0.8).log_softmax(-1)
        log_s = module.model(torch.tensor([[*row.rollout.prompt_ids, *y]])).logits[
            0, len(row.rollout.prompt_ids) - 1 : -1
        ]
        log_s = (log_s / 0.8).log_softmax(-1)
        loss = {0.0: forward_kl, 1.0: reverse_kl}.get(alpha, lambda s, t: generalised_jsd(s, t, 0.5))(log_s, log_t)
        expected = expected + loss.mean() / len(rows)
    gradients = torch.autograd.grad(expected, list(module.model.parameters()))
    assert accumulate(module, rows) == pytest.approx(expected.item(), rel=1e-4)
    for parameter, gradient in zip(module.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_its_own_weights_are_a_teacher_with_nothing_to_teach(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    module = made(str(tmp_path))
    rows = random_rows(4)
    for row in rows:
        row.reprompt_ids = row.rollout.prompt_ids
    assert accumulate(module, rows) == 0.0
    assert max(p.grad.abs().max() for p in module.model.parameters()) < 1e-9
    for row in rows:
        row.reprompt_ids = [*row.rollout.prompt_ids[:-1], 9]
    assert accumulate(module, rows) > 1e-3


def test_it_stands_still_and_is_not_in_checkpoints(tmp_path):
    module = made(saved(tmp_path / "a", **LARGER))
    before = weights(module.teacher.model)
    module.learner.move_teacher()
    assert torch.equal(weights(module.teacher.model), before)
    assert not any(p.requires_grad for p in module.teacher.parameters())
    state, checkpoint = copy.deepcopy(module.state_dict()), {}
    assert [name for name in state if name.startswith("teacher.")] == ["teacher._extra_state"]
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["pgpo_lightning"]["teacher"] == "external"
    again = made(str(tmp_path / "a"))
    again.load_state_dict(state)
    again.on_load_checkpoint(checkpoint)
    assert torch.equal(weights(again.teacher.model), before)
    other = made(saved(tmp_path / "b", seed=2, **LARGER))
    with pytest.raises(
        MisconfigurationException, match=r"Expected `teacher.model` to be the teacher that the run began with.*b"
    ):
        other.on_load_checkpoint(checkpoint)
    with pytest.raises(
        MisconfigurationException, match=r"Set `model.teacher.model` to the teacher of the interrupted run"
    ):
        other.load_state_dict(state)
    with pytest.raises(MisconfigurationException, match=r"`teacher.regularization` ema, but it has external"):
        tiny_sdpo().on_load_checkpoint(checkpoint)


def test_on_the_host_it_is_the_same_to_the_last_bit(tmp_path):
    folder = saved(tmp_path, **LARGER, tie_word_embeddings=False)
    near = made(folder, num_iterations=2)
    far = tiny_sdpo(teacher=TeacherConfig(model=folder, offload=True), num_iterations=2)
    for module in (near, far):
        rows = random_rows(4)
        module.losses = [accumulate(module, rows), accumulate(module, rows)]  # the second from what the first has kept
    assert near.losses == far.losses
    assert near.losses[0] == near.losses[1] > 0
    assert far.teacher.device_copy.copies == {}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("offload", [False, True])
def test_its_type_is_the_students_or_its_own(tmp_path, dtype, offload):
    module = tiny_sdpo(teacher=TeacherConfig(model=saved(tmp_path), dtype=dtype, offload=offload))
    wanted = torch.float32 if dtype is None else torch.bfloat16
    assert {p.dtype for p in module.teacher.parameters()} == {wanted}
    module.to(torch.float64)
    assert {p.dtype for p in module.teacher.parameters()} == {torch.float64 if dtype is None else torch.bfloat16}
    assert next(module.model.parameters()).dtype == torch.float64
    assert accumulate(module, random_rows(2)) > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_in_few_bits_it_is_nearly_the_same(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    folder = saved(tmp_path, hidden_size=64, head_dim=64, intermediate_size=128)
    whole, narrow = made(folder), tiny_sdpo(teacher=TeacherConfig(model=folder, quantization=Quantization(bits)))
    assert {torch.uint8: 4, torch.int8: 8}[narrow.teacher.model.model.layers[0].mlp.up_proj.weight.dtype] == bits
    losses = [accumulate(module, random_rows(6)) for module in (whole, narrow)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    state = copy.deepcopy(narrow.state_dict())
    assert [name for name in state if name.startswith("teacher.")] == ["teacher._extra_state"]
    narrow.load_state_dict(state)
    with pytest.raises(MisconfigurationException, match="teacher of the interrupted run"):
        whole.load_state_dict(state)
    again = narrow.teacher.model.model.layers[0].mlp.up_proj.weight
    narrow.to(torch.bfloat16)
    assert again.dtype in (torch.uint8, torch.int8)


def test_beside_an_adapter_it_has_weights_of_its_own(tmp_path):
    pytest.importorskip("peft")
    folder = saved(tmp_path, **LARGER)
    module = tiny_sdpo(teacher=TeacherConfig(model=folder, offload=True), lora=LoRA(r=2))
    plain = made(folder)
    rows = random_rows(4)
    assert accumulate(module, rows) == pytest.approx(accumulate(plain, rows), rel=1e-6)
    assert {name.split(".")[0] for name in module.state_dict()} == {"model", "teacher"}
    assert all("lora" in name or name == "teacher._extra_state" for name in module.state_dict())
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    again = tiny_sdpo(teacher=TeacherConfig(model=folder), lora=LoRA(r=2))
    again.load_state_dict(module.state_dict())


def other_tokenizer(change):
    tokenizer = copy.deepcopy(TOKENIZER)
    if change == "added":
        tokenizer.add_tokens(["<new>"])
        return tokenizer
    content = json.loads(TOKENIZER.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("added", r"`teacher.model` to have the vocabulary of `model`.* has {more} tokens and `model` {n}, 1 numbers differ, and "
                  r"number {n} is '<new>' instead of no token. Choose"),
        ("swapped", r"has {n} tokens and `model` {n}, 2 numbers differ, and number 20 is '.*' instead of '.*'. Choose"),
    ],
)  # fmt: skip
def test_another_vocabulary_is_refused_in_one_line(tmp_path, change, message):
    folder = saved(tmp_path, tokenizer=other_tokenizer(change), vocab_size=len(TOKENIZER) + 1)
    with pytest.raises(
        MisconfigurationException, match=message.format(n=len(TOKENIZER), more=len(TOKENIZER) + 1)
    ) as error:
        made(folder)
    assert "\n" not in str(error.value)


def test_another_end_of_a_response_is_warned_of(tmp_path):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.eos_token = "<user>"
    with pytest.warns(UserWarning, match="ends a response with '<user>', the student with '<eos>'"):
        made(saved(tmp_path, tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": len(TOKENIZER) - 1}, f"`teacher.model` to predict the {len(TOKENIZER)} tokens of `model`, but"),
        ({"max_position_embeddings": 171}, "the 171 positions of `teacher.model`, but the limits allow 172 tokens"),
    ],
)
def test_a_model_that_is_too_small_is_refused(tmp_path, settings, message):
    with pytest.raises(MisconfigurationException, match=message):
        made(saved(tmp_path, **settings))


def test_a_folder_without_a_model_or_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a model in the folder .*none, but there is no such folder"):
        made(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"the tokenizer of `.*` to be usable"):
        made(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"regularization": "ema"},
            "no `teacher.regularization` with `teacher.model`.*but got ema. Set it to frozen",
        ),
        (
            {"regularization": "live"},  # CEPO's default
            "no `teacher.regularization` with `teacher.model`.*but got live. Set it to frozen",
        ),
        ({"update_rate": 0.1}, "no `teacher.update_rate` with the external teacher: .* Set it to null"),
        ({"preflight": True}, "no `teacher.preflight` with `teacher.model`"),
        ({"offload": True, "quantization": Quantization()}, "only one of `teacher.offload` and `teacher.quantization`"),
        ({"dtype": "float64"}, "`teacher.dtype` to be"),
        ({"model": " "}, "`teacher.model` not to be empty"),
    ],
)
def test_settings_that_contradict_an_external_teacher_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TeacherConfig(**{"model": "toy"} | settings)


@pytest.mark.parametrize("name", ["revision", "quantization"])
def test_settings_of_a_model_need_one(name):
    value = {"revision": "main", "quantization": Quantization()}[name]
    with pytest.raises(ValueError, match=f"Expected `teacher.model` with `teacher.{name}`"):
        TeacherConfig(**{name: value})


def test_a_module_whose_default_is_another_teacher_takes_it(tmp_path):
    module = build(
        RLSD, tiny_model(), half_right, tokenizer=TOKENIZER, **LIMITS, teacher=TeacherConfig(model=saved(tmp_path))
    )
    module.configure_model()
    assert module.teacher.external
    assert module.objective.teaching.config.settled()["regularization"] == "external"
    assert TeacherConfig("frozen", model="toy").settled()["regularization"] == "external"
    assert TeacherConfig().settled()["regularization"] == "ema"
    assert not tiny_sdpo().teacher.external
