"""An adapter instead of the weights: what is trained, whose adapter the teacher has, what is saved and what comes out."""

import copy
import importlib.util
import re

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import AutoModelForCausalLM

from pgpo_lightning.commands.main import main
from pgpo_lightning.models.lm_head import head, source
from pgpo_lightning.models.lora import LoRA, adapter, add_adapter, write_adapter
from pgpo_lightning.models.packing import Sequences
from pgpo_lightning.models.quantization import Quantization
from pgpo_lightning.modules import GRPO, SDPO
from pgpo_lightning.rollout.engine import Sampling
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from tests.support.helpers import (
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

SCALE = 2.0  # lora_alpha / r


def lora(**settings):
    return LoRA(**{"r": 4, "lora_alpha": 8} | settings)


def matrices(module):
    return {name: matrix.detach().clone() for name, matrix in adapter(module).items()}


def disturb(model, scale=0.1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for matrix in adapter(model).values():
            matrix.add_(scale * torch.randn(matrix.shape, generator=generator))


def with_product(model, matrices):
    """A plain model with ``W + scale B A`` written into its weights by hand."""
    with torch.no_grad():
        for name, b in matrices.items():
            if ".lora_B." in name:
                a = matrices[name.replace(".lora_B.", ".lora_A.")]
                model.get_submodule(name.split(".lora_B.")[0]).weight += SCALE * b @ a
    return model


def logits(model, row):
    ids = torch.tensor([[*row.reprompt_ids, *row.rollout.response_ids]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits[0, len(row.reprompt_ids) - 1 : -1]


def teacher_logits(module, row):
    sources = module.learner.teacher_sources([row])
    assert not any(each.hidden.requires_grad for each in sources)
    return sum(each.weight * each.head(each.hidden) for each in sources)


def base_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


def run(folder, steps=3, **model):
    small = {"lora": {"r": 4, "lora_alpha": 8}, "max_response_length": 12, "eval_samples": 1}
    # So short a response is never correct, and without success there is no teacher.
    small["verifier"] = "helpers.half_right"
    settings = config(folder, steps=steps, model=small | model)
    return ["--config", settings, "--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    main(["fit", *run(folder)])
    return folder


def final(folder, steps=3):
    return torch.load(folder / "checkpoints" / f"step={steps:06d}.ckpt", weights_only=True)


# ------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("method", ["sdpo", "grpo"])
def test_only_the_adapter_is_trained(tmp_path, method):
    settings = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2), "num_generations": 4, "seed": 1}
    limits = LIMITS if method == "sdpo" else {key: LIMITS[key] for key in LIMITS if key != "max_reprompt_len"}
    kind = SDPO if method == "sdpo" else GRPO
    module = build(kind, tiny_model(), half_right, tokenizer=TOKENIZER, lora=lora(), **limits, **settings)
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


def gradients(module, rows, between=lambda: None):
    sequences = module.learner.pack([(row.reprompt_ids, row.rollout.response_ids) for row in rows])
    mine = source(module.model, sequences)
    loss = mine.head(mine.hidden).log_softmax(-1).gather(1, sequences.targets.unsqueeze(1)).sum()
    between()
    loss.backward()
    found = {name: matrix.grad.clone() for name, matrix in adapter(module.model).items()}
    module.model.zero_grad()
    return found


def test_gradient_checkpointing_gives_the_same_gradients_of_frozen_weights():
    rows = random_rows(3)
    plain, recomputed = (tiny_sdpo(lora=lora(), gradient_checkpointing=on) for on in (False, True))
    assert plain.shares_prompts
    assert not recomputed.shares_prompts
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


# ------------------------------------------------------------------------------------------------------ teachers


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
    write_adapter(tmp_path, matrices(before.model), before.base_identity)
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
        broken = module.model.model.layers[1].mlp.down_proj.lora_B["default"]
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


def test_adapters_stay_in_fp32_over_a_base_in_bf16():
    module = tiny_sdpo(model=tiny_model().bfloat16(), lora=lora())
    assert {p.dtype for p in adapter(module.model).values()} == {torch.float32}
    assert {p.dtype for p in base_weights(module.model).values()} == {torch.bfloat16}
    module.to(torch.bfloat16)  # what Lightning's bf16-true does to the whole module
    assert {p.dtype for p in module.teacher.parameters()} == {torch.float32}
    row, plain = random_rows(1)[0], tiny_sdpo(model=tiny_model().bfloat16(), teacher_regularization="frozen")
    assert torch.equal(teacher_logits(module, row), teacher_logits(plain, row))


def test_what_an_earlier_pass_over_the_batch_kept_is_used_with_the_students_head():
    module = tiny_sdpo(lora=lora(), num_iterations=2)
    rows = random_rows(2)
    first = module.learner.teacher_sources(rows)[0]
    disturb(module.model)
    again = module.learner.teacher_sources(rows)[0]
    assert torch.equal(again.hidden, first.hidden)
    assert again.head.weight is head(module.model).weight


# ------------------------------------------------------------------------------------------------------ checkpoints


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


def load(module, other):
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    checkpoint = copy.deepcopy(checkpoint)
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"])


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


def test_an_adapter_is_tested_from_its_checkpoint(whole, capsys):
    main(["test", *run(whole), "--ckpt_path", "last", "--trainer.limit_test_batches", "1"])
    assert re.search(r"test/avg@1", capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------------ export


def trained(whole, who):
    """The model of a checkpoint as it was in training."""
    module = SDPO("toy", half_right, lora=lora(), **LIMITS)
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


# ------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "Expected `lora.r` to be at least 1, but got 0"),
        ({"lora_alpha": 0}, "Expected `lora.lora_alpha` to be at least 1, but got 0"),
        ({"target_modules": []}, r"Expected `lora.target_modules` not to be empty, but got \[\]"),
        ({"target_modules": ["q_proj", "lm_head"]}, "`lora.target_modules` without embeddings and language-model head"),
        ({"target_modules": ["embed_tokens"]}, "`lora.target_modules` without embeddings and language-model head"),
        ({"target_modules": ["q_proj", "query"]}, "`lora.target_modules` to name layers of Qwen3.*it has no query"),
        ({"target_modules": "nothing.*"}, "Expected `lora.target_modules` to name linear layers"),
        ({"target_modules": ["input_layernorm"]}, "Expected `lora.target_modules` to name linear layers"),
        (
            {"adapter": "no/such"},
            "Expected `lora.adapter` to be a folder with adapter_model.safetensors, but got no/such",
        ),
    ],
    ids=str,
)
def test_settings_of_an_adapter_that_do_not_fit_are_refused(settings, message):
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        tiny_sdpo(lora=lora(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"r": 8}, "`r` 4 instead of 8"), ({"target_modules": ["q_proj"]}, "other layers than `target_modules` names")],
    ids=str,
)
def test_an_adapter_to_start_from_that_is_another_is_refused(tmp_path, settings, message):
    before = tiny_sdpo(lora=lora())
    write_adapter(tmp_path, matrices(before.model), before.base_identity)
    with pytest.raises(MisconfigurationException, match=f"Expected the adapter in `lora.adapter` .*{message}"):
        tiny_sdpo(lora=lora(adapter=str(tmp_path), **settings))


def test_settings_that_contradict_each_other_are_refused(monkeypatch):
    def make(model, **settings):
        build(SDPO, model, half_right, tokenizer=TOKENIZER, **LIMITS, **settings)

    with pytest.raises(ValueError, match="Expected `lora` with `quantization`"):
        make("toy", quantization=Quantization())
    with pytest.raises(ValueError, match="Expected `model` to be a folder or Hub id with `quantization`"):
        make(tiny_model(), lora=lora(), quantization=Quantization())
    wrapped = tiny_sdpo(lora=lora()).model
    with pytest.raises(ValueError, match="Expected `model` to be a base model with `lora`, but got Qwen3ForCausalLM"):
        make(wrapped, lora=lora())
    with pytest.raises(ValueError, match="Expected `model` to be without an adapter of its own"):
        make(wrapped)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(MisconfigurationException, match=r"pip install 'pgpo-lightning\[peft\]'"):
        make("toy", lora=lora())
    make("toy")


def test_a_peft_that_is_too_old_for_transformers_is_named_before_anything_is_loaded(tmp_path, monkeypatch):
    folder = tmp_path / "peft-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        MisconfigurationException, match=r"Expected peft 0\.\d+\.\d+ or newer.*but peft 0\.1\.0 is installed"
    ):
        build(SDPO, "no/such/model", half_right, tokenizer=TOKENIZER, lora=lora(), **LIMITS)


def test_what_peft_refuses_for_another_reason_is_not_put_down_to_target_modules():
    model = tiny_sdpo(lora=lora()).model
    with pytest.raises(MisconfigurationException, match=r"adapter into Qwen3ForCausalLM.*already exists") as error:
        add_adapter(model, lora(), seed=0)
    assert "target_modules" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 2}, "Expected `quantization.bits` to be one of 4, 8, but got 2"),
        (
            {"bnb_4bit_quant_type": "nf5"},
            "`quantization.bnb_4bit_quant_type` to be one of nf4, fp4 or null, but got 'nf5'",
        ),
        ({"bits": 8, "bnb_4bit_quant_type": "fp4"}, "Expected no `quantization.bnb_4bit_quant_type` with 8 bits"),
        ({"bits": 8, "bnb_4bit_use_double_quant": True}, "Expected no `quantization.bnb_4bit_use_double_quant` with 8"),
    ],
    ids=str,
)
def test_settings_of_a_quantization_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Quantization(**settings)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.lora.r", "0"], "Expected `lora.r` to be at least 1, but got 0"),
        (["--model.lora.rank", "4"], "rank"),
        (["--model.lora", "null", "--model.quantization.bits", "4"], "Expected `lora` with `quantization`"),
    ],
    ids=str,
)
def test_the_command_line_knows_the_settings(tmp_path, capsys, args, message):
    with pytest.raises((Exception, SystemExit)) as error:
        main(["fit", *run(tmp_path / "run"), *args])
    assert re.search(message, f"{error.value}\n{capsys.readouterr().err}")


# ------------------------------------------------------------------------------------------------------ quantised base


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
