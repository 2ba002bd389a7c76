"""What a run will need: counted parameters, bytes and operations against those of real modules, optimizers and steps."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config

from pgpo_lightning.commands.main import main
from pgpo_lightning.commands.plan import PlanCommand
from pgpo_lightning.memory_planner.adapters import Adapters
from pgpo_lightning.memory_planner.counter import LiveBytes
from pgpo_lightning.memory_planner.dry_run import Compute, along_layers, update_peaks
from pgpo_lightning.memory_planner.memory import GIB, Need, Sharding, gathered_bytes, standing_bytes
from pgpo_lightning.memory_planner.optimizers import optimizer_need, state_bytes
from pgpo_lightning.memory_planner.parameters import configuration, count
from pgpo_lightning.memory_planner.plan import plan_memory
from pgpo_lightning.memory_planner.plan_report import table
from pgpo_lightning.memory_planner.rollouts import roomy_tokens
from pgpo_lightning.memory_planner.workload import Layout, Lengths, group
from tests.support import CONFIGS, ROOT
from tests.support.architectures import tiny_config
from tests.support.helpers import tiny_model

BASES = {"scale": "sciknoweval", "domains": "sciknoweval", "ablations": "quickstart"}
SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}


# ------------------------------------------------------------------------------------------------ counting


def test_live_bytes_counts_storages_once_and_forgets_them():
    with LiveBytes() as counter:
        a = torch.zeros(100)
        b = a.view(10, 10).add_(1)
        assert counter.live == 400
        c = a + 1
        del c
        assert (counter.live, counter.peak) == (400, 800)
        del a, b
        assert counter.live == 0
        assert counter.restart() == 800
        assert counter.peak == 0


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_real_module(tied):
    model = tiny_model(tie_word_embeddings=tied)
    counted = count(model.config)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert sorted(counted.shapes) == sorted(tuple(p.shape) for p in model.parameters())
    assert counted.layer == sum(p.numel() for p in model.model.layers[0].parameters())
    assert counted.root + counted.layers * counted.layer == counted.total
    assert counted.tied is tied
    linear = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert counted.matrices == sum(m.weight.numel() for m in linear)


def test_parameters_of_a_llama():
    config = LlamaConfig(**SMALL)
    model = LlamaForCausalLM(config)
    assert count(config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "total"),
    [("Qwen/Qwen3-8B", 8_190_735_360), ("Qwen/Qwen3-1.7B", 1_720_574_976), ("Qwen/Qwen3-0.6B", 596_049_920)],
)
def test_models_whose_shapes_come_with_the_package(name, total):
    assert count(configuration(name)).total == total


def test_layers_of_different_shapes_are_refused():
    from transformers import GPT2Config

    with pytest.raises(ValueError, match="Expected `model` to be a decoder whose layers have equal shapes, but gpt2"):
        count(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64))


@pytest.mark.parametrize("name", ["mamba", "falcon_h1", "qwen3_5_text", "lfm2"])
def test_layers_with_a_recurrent_state_are_refused(name):
    with pytest.raises(
        ValueError, match=f"attention in all of its layers, but {name} has layers with a recurrent state"
    ):
        count(tiny_config(name))


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj")])
def test_adapters(targets):
    model = tiny_model()
    adapters = Adapters(4, targets)
    shapes = adapters.shapes(model.config)
    wrapped = adapters.wrap(model)
    trained = [tuple(p.shape) for p in wrapped.parameters() if p.requires_grad]
    assert sorted(trained) == sorted(shapes)
    assert len(shapes) == 2 * 2 * (7 if targets == ("all-linear",) else 2)
    with pytest.raises(
        ValueError, match=r"Expected `lora.target_modules` to be all-linear or some of .*q_proj.*, but got nothing"
    ):
        Adapters(4, ("nothing",)).shapes(model.config)


# ------------------------------------------------------------------------------------------------ optimizers


def bitsandbytes_optimizer(name):
    return getattr(pytest.importorskip("bitsandbytes").optim, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "momentum", "AdamW8bit", "Lion8bit"])
def test_optimizer_state_is_that_of_the_real_optimizer(name, dtype):
    make = {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
        "SGD": lambda p: torch.optim.SGD(p, lr=1e-3),
        "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    }.get(name) or (lambda p: bitsandbytes_optimizer(name)(p, lr=1e-3))
    parameters = [torch.nn.Parameter(torch.zeros(s, dtype=dtype)) for s in [(700, 512), (300, 512), (512,), (16, 512)]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = make(parameters)
    optimizer.step()
    need = optimizer_need(make, [tuple(p.shape) for p in parameters], dtype, "cpu")
    assert need.state == pytest.approx(state_bytes(optimizer), rel=0.02, abs=64)
    assert not need.paged


def test_torchs_optimizers_work_on_all_parameters_at_once_on_a_gpu():
    shapes = [(512, 512)] * 3
    one, fused = (lambda p: torch.optim.AdamW(p)), (lambda p: torch.optim.AdamW(p, foreach=False))
    at_once = optimizer_need(one, shapes, torch.float32, "cuda").passing
    assert at_once >= 3 * 512 * 512 * 4
    assert optimizer_need(fused, shapes, torch.float32, "cuda").passing == pytest.approx(at_once / 3, rel=1.1)


def test_a_paged_optimizer_is_known_as_such():
    paged = bitsandbytes_optimizer("PagedAdamW8bit")
    assert optimizer_need(lambda p: paged(p, lr=1e-3), [(512, 512)], torch.bfloat16, "cuda").paged


def test_an_optimizer_that_cannot_be_measured():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("needs a GPU")

    with pytest.raises(ValueError, match=r"Expected `optimizer` to take a step on a small .*RuntimeError: needs a GPU"):
        optimizer_need(lambda p: Broken(p, lr=1.0), [(8, 8)], torch.float32, "cpu")


# ------------------------------------------------------------------------------------------------ rows, layers, shards


def test_rows_have_the_lengths_that_were_asked_for():
    rows = Lengths(100, 300, 64, spread=0.5, longest=90).rows(16, 8)
    lengths = [row.length for row in rows]
    assert len({tuple(row.rollout.prompt_ids) for row in rows}) == 16
    assert len({tuple(row.reprompt_ids) for row in rows}) == 32  # the one that is shown sees another
    assert sum(lengths) / 128 == pytest.approx(63.5, abs=1.5)
    assert min(lengths) == pytest.approx(32, abs=1)
    assert max(lengths) == 90
    assert {row.length for row in Lengths(10, 20, 30).rows(2, 2)} == {30}
    with pytest.raises(ValueError, match=r"Expected `spread` to lie in \[0, 1\), but got 1"):
        Lengths(1, 1, 1, spread=1)


def test_groups_are_those_of_the_module():
    rows = Lengths(10, 20, 30).rows(4, 4)
    batches = group(rows, 200, share="if-cheaper", with_teacher=True)
    assert sum(Layout.of(batch.student).rows for batch in batches) == 16
    layout = Layout.of(batches[0].teacher)
    assert layout.padded <= 200
    assert layout.prompts > 0
    assert Layout.of(group(rows, 200, share="never", with_teacher=False)[0].student) == Layout(5, 40, 0, 0, 150)


def test_peaks_are_straight_lines_in_the_number_of_layers():
    config = Qwen3Config(**SMALL, tie_word_embeddings=False)
    batch = group(Lengths(12, 20, 16).rows(2, 3), 4096, share="if-cheaper", with_teacher=True)[0]

    def run(few):
        return update_peaks(few, Compute(), batch.student, [("own", batch.teacher)], 0, accumulating=True)

    assert along_layers(run, config) == run(config)


def test_room_for_keys_and_values():
    # 4 tokens grow to 5 + 32; nobody leaves; one tensor's old 2 x 4 stands beside all new ones.
    assert roomy_tokens(4, [9, 9], 10, "cpu") == 10 * 2 * 37 + 2 * 4
    # Two of four end after 3 tokens: the other two are copied (at 4 + 2 tokens) while the old room is there.
    assert roomy_tokens(4, [9, 9, 3, 3], 10, "cpu") == 10 * (4 * 37 + 2 * 6)
    assert roomy_tokens(4, [9, 9, 3, 3], 10, "cuda") == 10 * 4 * 37 + 4 * 4  # looks too late


def test_shards_and_buckets():
    compute = Compute(torch.bfloat16, torch.float32)
    one = standing_bytes(800, 800, 800, 1600, compute, Sharding())
    assert one == {"weights": 1600, "gradients": 1600, "optimizer state": 1600, "teacher": 3200}
    assert standing_bytes(800, 800, 800, 1600, compute, Sharding(8, "fsdp")) == {k: v // 8 for k, v in one.items()}
    assert standing_bytes(800, 800, 800, 1600, compute, Sharding(8, "ddp")) == one | {"gradient buckets": 1600}
    counted = count(Qwen3Config(**SMALL))
    whole = gathered_bytes(counted, False, compute, Sharding(8, "fsdp"), accumulating=False)
    assert whole["rollouts"] == 2 * counted.total
    assert whole["update"] == 2 * (counted.root + 3 * counted.layer)
    several = gathered_bytes(counted, False, compute, Sharding(8, "fsdp"), accumulating=True)
    assert several["update"] == whole["update"] + 4 * counted.total
    mixed = Compute(torch.float32, torch.float32, torch.bfloat16)
    assert gathered_bytes(counted, False, mixed, Sharding(8, "fsdp"), accumulating=True) == several
    assert set(gathered_bytes(counted, True, compute, Sharding(8, "ddp"), accumulating=True).values()) == {0}


def test_the_peak_of_a_phase_leaves_out_what_is_absent():
    need = Need({"weights": 5, "gradients": 3}, {"a": {"x": 1}, "b": {}}, {"a": ("gradients",)})
    assert need.peaks == {"a": 6, "b": 8}


# ------------------------------------------------------------------------------------------------ real steps


@pytest.fixture
def sizing(monkeypatch):
    """The program that measures real steps."""
    folder = ROOT / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield importlib.import_module("sizing")
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == folder:
            del sys.modules[name]


@pytest.mark.parametrize(
    "changes",
    [
        {"operations": True},
        {"mixed": True, "checkpointing": True, "teacher": "frozen", "budget": 256},
        {"dtype": "bfloat16", "optimizer": "SGD", "teacher": "trust-region", "tied": False},
    ],
    ids=lambda changes: ", ".join(map(str, changes.values())),
)
def test_a_plan_is_what_a_step_takes(sizing, changes):
    shape = sizing.TOY | {"num_hidden_layers": 4}
    case = sizing.replace(sizing.Case(shape, questions=4, samples=4, lengths=(20, 40, 20), budget=512), **changes)
    rows = sizing.compare("toy", case, separate=False)
    told = {(row["unit"], row["part"]): row.get("plan / measured") for row in rows if row["share"] >= 0.1}
    assert ("bytes", "peak, gradients") in told
    assert told.pop(("bytes", "rss"), None) is None  # of the whole test process
    assert all(ratio == pytest.approx(1, abs=0.1) for ratio in told.values()), told


# ------------------------------------------------------------------------------------------------ the command


def command(*args):
    return PlanCommand(list(args))


def arguments(path):
    base = "quickstart" if path.name == "lora.yaml" else BASES.get(path.parent.name)
    return [*(["--config", str(CONFIGS / f"{base}.yaml")] if base else []), "--config", str(path)]


TEACHERS = {
    "grpo": "none",
    "hapo": "none",
    "live-teacher": "live",
    "frozen-teacher": "frozen",
    "cgtr": "gated",
    "restart-and-freeze": "restart",
    "rlsd": "restart",
}
FILES = sorted([*CONFIGS.glob("*.yaml"), *(path for folder in BASES for path in (CONFIGS / folder).glob("*.yaml"))])


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_config_is_understood(path):
    run = command(*arguments(path)).run()
    assert run.samples == 8
    assert run.teacher == TEACHERS.get(path.stem, "ema")
    if path.parent.name == "scale":
        head = path.read_text().splitlines()
        assert head[0].startswith("# vs sciknoweval.yaml: ")
        assert f"pgpo plan --config configs/sciknoweval.yaml --config configs/scale/{path.name}" in head[1]


def test_a_plan_without_weights_or_hub(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "plan.json"
    args = arguments(CONFIGS / "sciknoweval-qwen3-0.6b.yaml")
    lengths = ["--prompt_tokens", "200", "--reprompt_tokens", "500", "--response_tokens", "300", "--spread", "0.3"]
    main(["plan", *args, *lengths, "--memory", "24", "--json", str(path)])
    told = json.loads(path.read_text())
    assert told["parameters"] == 596_049_920
    assert told["standing_bytes"]["optimizer state"] == pytest.approx(8 * told["parameters"], rel=1e-3)
    assert told["standing_bytes"]["teacher"] == 4 * told["parameters"]
    assert set(told["peak_bytes"]) == {"rollouts", "evaluation", "gradients", "optimizer"}
    assert told["tokens"]["responses"] == 64
    out = capsys.readouterr().out
    assert f"**{told['peak_bytes']['gradients'] / GIB:.2f}**" in out
    assert told["verdict"] in out
    assert list(tmp_path.iterdir()) == [path]


def test_a_demonstration_stands_in_every_group():
    args = ["--config", str(CONFIGS / "hapo.yaml"), "--response_tokens", "10"]
    made = {tokens: plan_memory(command(*args, "--demonstration_tokens", str(tokens)).run()) for tokens in (10, 32)}
    assert made[10].tokens == plan_memory(command("--config", str(CONFIGS / "hapo.yaml"), "--response_tokens", "10",
                                          "--model.class_path", "GRPO").run()).tokens  # fmt: skip
    assert made[32].largest["student"].tokens == 8 * (7 * 10 + 32)  # 8 groups in one micro-batch
    assert made[32].largest["student"].width == 31  # the last token predicts nothing
    assert made[32].tokens["response tokens"] == made[10].tokens["response tokens"] == 8 * 8 * 10  # as sampled
    assert made[32].flops["rollouts"] == made[10].flops["rollouts"]
    assert made[32].flops["student backward"] > made[10].flops["student backward"]
    assert command(*args).run().demonstration == 32  # the limit


@pytest.mark.parametrize("tokens", ["0", "33"])
def test_a_demonstration_has_the_limit_of_a_response(tokens):
    with pytest.raises(ValueError, match=f"`demonstration_tokens` to lie between 1 and .* 32, but got {tokens}"):
        command("--config", str(CONFIGS / "hapo.yaml"), "--demonstration_tokens", tokens).run()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trainer.precision", "64-true"], "Expected `trainer.precision` to be one of 32-true, .*, but got 64-true"),
        (["--trainer.strategy", "deepspeed"], "Expected `trainer.strategy` to be auto, ddp or .*, but got deepspeed"),
        (
            ["--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy"],
            "`trainer.strategy.init_args.tensor_parallel_size` to be 1, but got auto",
        ),
        (["--response_tokens", "33"], "Expected `response_tokens` to be at most the configured limit 32, but got 33"),
        (["--demonstration_tokens", "9"], "Expected no `demonstration_tokens` with SDPO, .* but got 9"),
        (["--shapes", "nowhere"], "Expected `shapes` to be a folder with a config.json, but got nowhere"),
        (["--device", "tpu"], "Expected `device` to be one of cuda, cpu, but got 'tpu'"),
        (["--model.lora.target_modules", "[nothing]"], "Expected `lora.target_modules` to be all-linear or some of"),
        (["--model.lora.r", "8", "--model.quantization.bits", "4"], "Expected no `quantization`, whose bytes"),
        (["--model.max_response_length", "500"], "fit into the model's 512 positions"),
        (["--model.alpha", "1.5"], r"`alpha` to lie in \[0, 1\], but got 1.5"),
        (["--memory", "-1"], "Expected `memory` to be above 0, but got -1"),
        (["--memory", ".nan"], "Expected `memory` to be above 0 and finite, but got nan"),
        (["--prompt_tokens", "0"], "Expected `prompt_tokens` to be at least 1, but got 0"),
        (["--spread", ".nan"], r"Expected `spread` to lie in \[0, 1\), but got nan"),
        (["--trainer.devices", "0"], "Expected `trainer.devices` to be at least 1, but got 0"),
        (["--trainer.devices", "two"], "Expected `trainer.devices` to be a whole number, but got 'two'"),
        (["--trainer.num_nodes", "0"], "Expected `trainer.num_nodes` to be at least 1, but got 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_not_understood_is_refused(args, message, capsys):
    import re

    with pytest.raises((Exception, SystemExit)) as error:
        main(["plan", "--config", str(CONFIGS / "quickstart.yaml"), *args])
    assert re.search(message, f"{error.value} {capsys.readouterr().err}")


def test_a_teacher_on_the_host_visits_the_device_for_the_gradients():
    args = ["--config", str(CONFIGS / "quickstart.yaml"), "--device", "cuda", "--trainer.precision", "bf16-mixed"]
    args += ["--data.batch_size", "2", "--data.eval_batch_size", "2", "--model.update.micro_batch_tokens", "1000"]
    near, far = (plan_memory(command(*args, "--model.teacher.offload", text).run()) for text in ("false", "true"))
    teacher = near.need.standing["teacher"]
    assert "teacher" not in far.need.standing
    assert (near.host, far.host) == (0, teacher)
    for phase in ("rollouts", "evaluation"):
        assert near.need.peak(phase) - far.need.peak(phase) == teacher
    saved = near.need.peak("gradients") - far.need.peak("gradients")
    assert saved == 2 * far.count.matrices  # the head is tied to the embedding, which stays as it is
    text = table(far, None)
    assert f"The teacher's {teacher / GIB:.2f} GiB are in the host's memory" in text


def test_strategies_and_precisions():
    args = ["--config", str(CONFIGS / "quickstart.yaml")]
    run = command(*args, "--trainer.devices", "4", "--trainer.precision", "bf16-mixed").run()
    assert run.sharding == Sharding(4, "ddp")
    assert run.compute == Compute(torch.float32, torch.float32, torch.bfloat16)
    half = command(*args, "--trainer.precision", "bf16-true", "--model.teacher.regularization", "frozen").run()
    assert half.compute == Compute(torch.bfloat16, torch.bfloat16)
    assert (
        command(*args, "--model.lora.r", "4", "--trainer.precision", "bf16-true").run().adapters.dtype == torch.bfloat16
    )


def test_a_copied_teacher_costs_what_a_frozen_one_does_and_a_restarted_one_what_an_average_does():
    args = ["--config", str(CONFIGS / "quickstart.yaml"), "--trainer.precision", "bf16-true"]
    costs = {}
    for kind in ("frozen", "gated", "ema", "restart"):
        made = plan_memory(command(*args, "--model.teacher.regularization", kind).run())
        costs[kind] = (made.need.standing, made.need.peaks)
    assert costs["frozen"] == costs["gated"]
    assert costs["ema"] == costs["restart"]
    assert costs["ema"][0]["teacher"] == 2 * costs["gated"][0]["teacher"] > 0
