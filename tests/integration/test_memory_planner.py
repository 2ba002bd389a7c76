"""`pgpo plan` against real steps, over the shipped configurations, and as a command."""

import importlib
import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.commands.main import main
from pgpo_lightning.commands.plan import PlanCommand
from pgpo_lightning.memory_planner.dry_run import Compute
from pgpo_lightning.memory_planner.memory import GIB, Sharding
from pgpo_lightning.memory_planner.parameters import configuration, count
from pgpo_lightning.memory_planner.plan import plan_memory
from pgpo_lightning.memory_planner.plan_report import plan_table
from pgpo_lightning.models.loading import resolve_model
from tests.support import CONFIGS

BASES = {"scale": "sciknoweval", "domains": "sciknoweval", "ablations": "quickstart", "code": "code"}


@pytest.fixture
def sizing():
    """The program that measures real steps."""
    return importlib.import_module("benchmarks.sizing")


@pytest.mark.parametrize(
    "changes",
    [
        {"operations": True},
        {"mixed": True, "checkpointing": True, "teacher": "frozen", "budget": 256},
        {"checkpointing": True, "selective": 2, "operations": True},
        {"checkpointing": True, "selective": "op"},
        {"narrow": True},
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
    "cepo": "live",
    "opcd": "frozen",
    "opsd": "frozen",
    "opd": "external",
    "tgpo": "external",
}
FILES = sorted([*CONFIGS.glob("*.yaml"), *(path for folder in BASES for path in (CONFIGS / folder).glob("*.yaml"))])


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_config_is_understood(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if TEACHERS.get(path.stem) == "external":
        shutil.copytree(resolve_model("toy"), tmp_path / "runs" / "toy-teacher")
    if path.stem == "real_model":  # made by `make test-llm`
        shutil.copytree(resolve_model("toy"), tmp_path / ".models" / "smollm2-135m-instruct")
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
    # Padded to demonstrations the rollouts would be three times as long, so demonstrations have a pass of their own.
    assert made[32].largest["student"].tokens == 8 * 7 * 10
    assert made[32].largest["student"].width == 9  # the last token predicts nothing
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
        (["--model.divergence.alpha", "1.5"], r"`divergence.alpha` to lie in \[0, 1\], but got 1.5"),
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
def test_what_is_not_understood_is_refused(args, message):
    with pytest.raises(ValueError, match=message):
        main(["plan", "--config", str(CONFIGS / "quickstart.yaml"), *args])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.max_response_length", "500"], "fit into the model's 512 positions"),
        (
            ["--model.update.reduce_every_pass", "true"],
            "Expected no `update.reduce_every_pass` without sharded weights",
        ),
    ],
    ids=["positions", "reduction"],
)
def test_what_a_run_refuses_at_its_start_is_refused(args, message):
    with pytest.raises(MisconfigurationException, match=message):
        main(["plan", "--config", str(CONFIGS / "quickstart.yaml"), *args])


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
    text = plan_table(far, None)
    assert f"The teacher's {teacher / GIB:.2f} GiB are in the host's memory" in text


def test_strategies_and_precisions():
    args = ["--config", str(CONFIGS / "quickstart.yaml")]
    run = command(*args, "--trainer.devices", "4", "--trainer.precision", "bf16-mixed").run()
    assert run.sharding == Sharding(4, "ddp")
    chosen = command(
        *args, "--model.model_config.gradient_checkpointing", "true", "--model.model_config.selective_ac_option", "2"
    )
    assert chosen.run().compute == Compute(checkpointing=True, selective=2)
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


def half(compute):
    """The student in bf16, so that every average has another type."""
    return replace(compute, student=torch.bfloat16)


def test_an_average_in_bf16_takes_two_bytes_a_weight_and_a_slice_while_it_moves():
    args = [
        "--config",
        str(CONFIGS / "sciknoweval-qwen3-0.6b.yaml"),
        "--device",
        "cuda",
        "--trainer.precision",
        "bf16-mixed",
    ]
    args += ["--data.batch_size", "2", "--data.eval_batch_size", "2", "--model.update.micro_batch_tokens", "4096"]
    wide, narrow, far = (
        plan_memory(command(*args, *more).run())
        for more in (
            ["--model.teacher.dtype", "float32"],
            ["--model.teacher.dtype", "bfloat16"],
            ["--model.teacher.dtype", "bfloat16", "--model.teacher.offload", "true"],
        )
    )
    weights = wide.count.total
    assert (wide.need.standing["teacher"], narrow.need.standing["teacher"], far.host) == (
        4 * weights,
        2 * weights,
        2 * weights,
    )
    assert wide.saving.size - narrow.saving.size == 2 * weights
    for phase in ("rollouts", "evaluation"):
        assert wide.need.peak(phase) - narrow.need.peak(phase) == 2 * weights
    # Its activations are bf16 as well.
    assert wide.need.peak("gradients") - narrow.need.peak("gradients") >= 2 * weights
    for run, temporary in ((wide, 4 * 151_936 * 1024), (narrow, 16 * 2**22), (far, 16 * 2**22)):
        alone = replace(
            run.run, optimizer=partial(torch.optim.SGD, lr=1e-5, foreach=False), compute=half(run.run.compute)
        )
        assert plan_memory(alone).need.phases["optimizer"] == {"temporary": temporary}
    assert "teacher ema bfloat16" in plan_table(narrow, None)


def test_a_second_prompt_doubles_the_teachers_passes_and_no_peak():
    args = ["--config", str(CONFIGS / "quickstart.yaml"), "--config", str(CONFIGS / "ablations/cepo.yaml")]
    for kind, kept in (("live", 0), ("frozen", 4)):
        run = command(*args, "--model.update.num_iterations", "2", "--model.teacher.regularization", kind).run()
        assert run.contrasted
        two, one = plan_memory(run), plan_memory(replace(run, contrasted=False))
        assert two.tokens["teacher's padded tokens"] == 2 * one.tokens["teacher's padded tokens"] > 0
        assert two.flops["teacher forward"] == 2 * one.flops["teacher forward"] > 0
        # The second pass multiplies with two heads, the first with four: student, teacher, and two for the gradients.
        passes = 2 if kind == "live" else 1
        assert 2 * (two.flops["loss"] - one.flops["loss"]) == one.flops["loss"] * passes / 2
        assert two.need.peak("gradients") - one.need.peak("gradients") == kept * two.tokens["response tokens"]


def test_an_external_teacher_has_weights_and_activations_of_its_own():
    args = ["--config", str(CONFIGS / "sciknoweval-qwen3-0.6b.yaml"), "--device", "cuda", "--data.batch_size", "2"]
    args += ["--data.eval_batch_size", "2", "--model.update.micro_batch_tokens", "4096", "--response_tokens", "500"]
    given = [*args, "--model.teacher.regularization", "frozen", "--model.teacher.model", "Qwen/Qwen3-1.7B"]
    given += ["--model.teacher.dtype", "bfloat16"]
    whole = plan_memory(command(*given).run())
    assert whole.need.standing["teacher"] == 2 * 1_720_574_976
    assert (
        whole.saving.size == plan_memory(command(*args, "--model.teacher.regularization", "frozen").run()).saving.size
    )
    assert "teacher external 1.721 B, bfloat16" in plan_table(whole, None)
    few = plan_memory(command(*given, "--model.teacher.quantization.bits", "4").run())
    assert 0.35 < few.need.standing["teacher"] / whole.need.standing["teacher"] < 0.45  # embedding and head stay
    assert "teacher external 1.721 B, 4 bits" in plan_table(few, None)
    far = plan_memory(command(*given, "--model.teacher.offload", "true").run())
    assert far.host == whole.need.standing["teacher"]
    same = plan_memory(command(*given, "--model.teacher.model", "Qwen/Qwen3-0.6B").run())
    more = count(configuration("Qwen/Qwen3-1.7B")).matrices - count(configuration("Qwen/Qwen3-0.6B")).matrices
    padded = whole.tokens["teacher's padded tokens"]
    assert (
        whole.flops["teacher forward"] - same.flops["teacher forward"] == 2 * more * padded
    )  # as many heads and layers
    assert whole.flops["loss"] > same.flops["loss"]
    assert whole.need.peak("gradients") - same.need.peak("gradients") > 2 * (1_720_574_976 - 596_049_920)
