"""Runs with an adapter: what is trained, resumed, exported, and quantised."""

import re

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import AutoModelForCausalLM

from pgpo_lightning.commands.main import main
from pgpo_lightning.models.adapter import adapter
from pgpo_lightning.models.quantization import Quantization
from pgpo_lightning.modules import CEPO, DRIFT, GRPO, OPD, SDPO, SRPO, TGPO
from pgpo_lightning.objectives.configs import DifficultyConfig
from pgpo_lightning.teachers.configs import TeacherConfig
from tests.support.adapters import base_weights, load, logits, lora, matrices
from tests.support.external import LARGER, saved
from tests.support.helpers import (
    GRPO_LIMITS,
    LIMITS,
    TOKENIZER,
    build,
    config,
    half_right,
    loader,
    questions,
    random_rows,
    tiny_model,
    tiny_sdpo,
    trainer,
)


def run(folder, steps=3, **model):
    small = {"lora": {"r": 4, "lora_alpha": 8}, "max_response_length": 12, "eval_samples": 1}
    # So short a response is never correct, and without success there is no teacher.
    small["verifier"] = "tests.support.helpers.half_right"
    settings = config(folder, steps=steps, model=small | model)
    return ["--config", settings, "--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    main(["fit", *run(folder)])
    return folder


def final(folder, steps=3):
    return torch.load(folder / "checkpoints" / f"step={steps:06d}.ckpt", weights_only=True)


METHODS = {
    "SDPO": (SDPO, {}),
    "GRPO": (GRPO, {}),
    "CEPO": (CEPO, {}),
    "DRIFT": (DRIFT, {"difficulty": DifficultyConfig(warmup_steps=1)}),
    "I-SDPO": (SRPO, {"route": "group"}),
    "OPD": (OPD, {}),
    "TGPO": (TGPO, {"guidance": 0.5}),
}


@pytest.mark.parametrize("method", METHODS)
def test_only_the_adapter_is_trained(tmp_path, method):
    kind, changes = METHODS[method]
    settings = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2), "num_generations": 4, "seed": 1}
    limits = LIMITS if kind not in (GRPO, OPD, TGPO) else GRPO_LIMITS
    if kind in (OPD, TGPO):
        settings["teacher"] = TeacherConfig(model=saved(tmp_path, **LARGER))
    module = build(kind, tiny_model(), half_right, tokenizer=TOKENIZER, lora=lora(), **limits, **settings, **changes)
    module.configure_model()
    base, start = base_weights(module.model), matrices(module.model)
    fitting = trainer(tmp_path, max_steps=2)
    fitting.fit(module, loader(questions(4)))
    now = base_weights(module.model)
    assert all(torch.equal(now[name], base[name]) for name in base)
    moved = matrices(module.model)
    assert len(moved) == 28
    assert not any(torch.equal(moved[name], start[name]) for name in moved)
    trained = [p for group in fitting.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in adapter(module.model).values()}
    assert {id(p) for p in module.parameters() if p.requires_grad} == {id(p) for p in trained}


def assert_same(a, b, where=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        a, b = list(a.items()), list(b.items())
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for x, y in zip(a, b, strict=True):
            assert_same(x, y, f"{where}.{x[0] if isinstance(x, tuple) else ''}")
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, where


def test_a_resumed_run_is_the_run_that_was_not_interrupted(whole, tmp_path):
    folder = tmp_path / "run"
    main(["fit", *run(folder, steps=2)])
    main(["fit", *run(folder), "--ckpt_path", "last"])
    a, b = final(whole), final(folder)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "ToyArithmetic", "pgpo_lightning", "global_step"):
        assert_same(a[part], b[part], part)


def test_a_checkpoint_holds_two_adapters_and_no_base(whole):
    saved = final(whole)
    state = saved["state_dict"]
    student = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    teacher = {
        name.removeprefix("teacher.model."): value for name, value in state.items() if name.startswith("teacher")
    }
    assert len(state) == len(student) + len(teacher)
    assert student.keys() == teacher.keys()
    assert all(".lora_A." in name or ".lora_B." in name for name in student)
    assert all(".dt" not in name and not torch.equal(student[name], teacher[name]) for name in student if "_B" in name)
    assert saved["pgpo_lightning"]["lora"]["base"] == "toy"


def test_an_adapter_is_tested_from_its_checkpoint(whole, capsys):
    main(["test", *run(whole), "--ckpt_path", "last", "--trainer.limit_test_batches", "1"])
    assert re.search(r"test/avg@1", capsys.readouterr().out)


def trained(whole, who):
    """The model of a checkpoint as it was in training."""
    module = build(SDPO, "toy", half_right, lora=lora(), **LIMITS)
    module.configure_model()
    module.load_state_dict(final(whole)["state_dict"])
    if who == "teacher":
        module.model.load_state_dict(dict(module.teacher.model.named_parameters()), strict=False)
    return module.model


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_an_exported_model_gives_the_logits_of_training(whole, tmp_path, who):
    from peft import PeftModel

    main(["export", str(whole), str(tmp_path / "merged"), "--weights", who])
    main(["export", str(whole), str(tmp_path / "adapter"), "--weights", who, "--lora", "adapter"])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    opened = PeftModel.from_pretrained(SDPO_base(), tmp_path / "adapter")
    row = random_rows(1)[0]
    expected = logits(trained(whole, who), row)
    assert (expected - logits(SDPO_base(), row)).abs().max() > 1e-3
    torch.testing.assert_close(logits(plain, row), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(opened, row), expected)
    assert not any("lora" in name for name, _ in plain.named_parameters())


def SDPO_base():
    from pgpo_lightning.models.loading import load_model

    return load_model("toy")


def test_an_export_into_another_base_is_refused(whole, tmp_path):
    model = SDPO_base()
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(
        MisconfigurationException, match="Expected `model` to be the base that the adapter was trained on"
    ):
        main(["export", str(whole), str(tmp_path / "out"), "--base", str(tmp_path / "other")])


def test_export_settings_without_effect_are_refused(whole, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match="Expected no `base` with `lora` adapter"):
        main(["export", str(whole), out, "--lora", "adapter", "--base", "toy"])
    saved = final(whole)
    saved["pgpo_lightning"]["lora"] = None
    torch.save(saved, tmp_path / "step=000001.ckpt")
    with pytest.raises(ValueError, match="Expected no `lora` with a checkpoint of whole weights, but got merged"):
        main(["export", str(tmp_path / "step=000001.ckpt"), out, "--lora", "merged"])


@pytest.mark.parametrize(
    ("args", "kind", "message"),
    [
        (["--model.lora.r", "0"], ValueError, "Expected `lora.r` to be at least 1, but got 0"),
        (["--model.lora.rank", "4"], SystemExit, "rank"),
        (["--model.lora", "null", "--model.quantization.bits", "4"], ValueError, "Expected `lora` with `quantization`"),
    ],
    ids=str,
)
def test_the_command_line_knows_the_settings(tmp_path, capsys, args, kind, message):
    with pytest.raises(kind, match="^2$" if kind is SystemExit else message) as error:
        main(["fit", *run(tmp_path / "run"), *args])
    assert error.type is kind
    assert kind is not SystemExit or re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_on_a_quantised_base(tmp_path, bits):
    tiny_model().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    settings = {"lora": lora(), "quantization": Quantization(bits)}
    module = tiny_sdpo(model=str(tmp_path / "base"), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), **settings)
    packed = module.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert packed.dtype == (torch.uint8 if bits == 4 else torch.int8)
    base = base_weights(module.model)
    trainer(tmp_path, max_steps=1).fit(module, loader(questions(2)))
    now = base_weights(module.model)
    assert all(torch.equal(now[name], base[name]) for name in base)
    assert all(matrix.abs().max() > 0 for name, matrix in matrices(module.model).items())
    assert not any("base_layer" in name for name in module.state_dict())

    other = tiny_sdpo(model=str(tmp_path / "base"), **settings)
    load(module, other)
    row = random_rows(1)[0]
    expected = logits(module.model, row)
    assert torch.equal(logits(other.model, row), expected)
    with pytest.raises(MisconfigurationException, match=f"`quantization` .*'bits': {bits}.* other weights"):
        load(module, tiny_sdpo(model=str(tmp_path / "base"), lora=lora()))

    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "step=000001.ckpt")
    main(["export", str(tmp_path / "step=000001.ckpt"), str(tmp_path / "merged")])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    exported = logits(plain, row)
    # In 8 bits training rounds activations as well, and 4 bits are exact but for the order of sums.
    assert (exported - expected).abs().max() < (1e-3 if bits == 4 else 0.05) * expected.abs().max()
