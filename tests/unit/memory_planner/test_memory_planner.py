"""Counted parameters, bytes and operations against those of real modules and optimizers."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config

from pgpo_lightning.memory_planner.adapters import Adapters
from pgpo_lightning.memory_planner.counter import LiveBytes
from pgpo_lightning.memory_planner.dry_run import Compute, along_both, along_layers, update_peaks
from pgpo_lightning.memory_planner.external import External
from pgpo_lightning.memory_planner.memory import GIB, Need, Sharding, gathered_bytes, standing_bytes
from pgpo_lightning.memory_planner.optimizers import optimizer_need, state_bytes
from pgpo_lightning.memory_planner.parameters import configuration, count
from pgpo_lightning.memory_planner.plan import RunSpec, plan_memory
from pgpo_lightning.memory_planner.rollouts import roomy_tokens
from pgpo_lightning.memory_planner.workload import Layout, Lengths, group
from pgpo_lightning.models.loading import load_model
from pgpo_lightning.models.packing import Packing
from pgpo_lightning.models.quantization import Quantization
from tests.support.architectures import tiny_config
from tests.support.external import saved
from tests.support.helpers import tiny_model

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}


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
    batches = group(rows, 200, packings=(Packing("if-cheaper"),) * 2, with_teacher=True)
    assert sum(Layout.of(batch.student).rows for batch in batches) == 16
    layout = Layout.of(batches[0].teacher)
    assert layout.padded <= 200
    assert layout.prompts > 0
    assert Layout.of(group(rows, 200, packings=(Packing(), Packing()), with_teacher=False)[0].student) == Layout(
        5, 40, 0, 0, 150
    )


@pytest.mark.parametrize(
    ("compute", "layers"),
    [(Compute(), 5), (Compute(checkpointing=True, selective=2), 9)],
    ids=["kept", "every second recomputed"],
)
def test_peaks_are_straight_lines_in_the_number_of_layers(compute, layers):
    config = Qwen3Config(**SMALL | {"num_hidden_layers": layers}, tie_word_embeddings=False)
    sharing = Packing("never" if compute.checkpointing else "if-cheaper")
    batch = group(Lengths(12, 20, 16).rows(2, 3), 4096, packings=(sharing, sharing), with_teacher=True)[0]
    teachers = [] if compute.checkpointing else [("own", batch.teacher)]

    def run(few):
        return update_peaks(few, compute, batch.student, teachers, 0, accumulating=True)

    assert along_layers(run, config, compute.period) == run(config)


def test_room_for_keys_and_values():
    # 4 tokens grow to 5 + 32; nobody leaves; one tensor's old 2 x 4 stands beside all new ones.
    assert roomy_tokens(1, 4, [9, 9], 10, "cpu", True) == 10 * (4 + 2 * 37) + 2 * 4
    # Two of four end after 3 tokens: keys and values of a layer (at 4 + 2 tokens) are copied while the old room is there.
    assert roomy_tokens(2, 4, [9, 9, 3, 3], 10, "cpu", True) == 10 * (2 * 4 + 4 * 37) + 2 * 2 * 6
    assert roomy_tokens(2, 4, [9, 9, 3, 3], 10, "cuda", True) == 10 * (2 * 4 + 4 * 37) + 4 * 4  # looks too late
    assert roomy_tokens(2, 400, [9, 9, 3, 3], 10, "cuda", False) == 10 * (2 * 400 + 4 * 33)


def test_shards_and_buckets():
    compute = Compute(torch.bfloat16, torch.float32)
    one = standing_bytes(800, 800, 800, 1600, compute, Sharding())
    assert one == {"weights": 1600, "gradients": 1600, "optimizer state": 1600, "teacher": 3200}
    assert standing_bytes(800, 800, 800, 1600, compute, Sharding(8, "fsdp")) == {k: v // 8 for k, v in one.items()}
    assert standing_bytes(800, 800, 800, 1600, compute, Sharding(8, "ddp")) == one | {"gradient buckets": 1600}
    counted = count(Qwen3Config(**SMALL))
    whole = gathered_bytes(counted, None, compute, Sharding(8, "fsdp"), accumulating=False)
    assert whole["rollouts"] == 2 * counted.total
    assert whole["update"] == 2 * (counted.root + 3 * counted.layer)
    assert gathered_bytes(counted, None, compute, Sharding(8, "fsdp"), accumulating=True) == whole
    once = Sharding(8, "fsdp", reduces=False)
    several = gathered_bytes(counted, None, compute, once, accumulating=True)
    assert several["update"] == whole["update"] + 4 * counted.total
    mixed = Compute(torch.float32, torch.float32, torch.bfloat16)
    assert gathered_bytes(counted, None, mixed, once, accumulating=True) == several
    assert set(gathered_bytes(counted, counted, compute, Sharding(8, "ddp"), accumulating=True).values()) == {0}
    plain = [
        gathered_bytes(counted, counted, Compute(torch.float32, t), once, False)["update"]
        for t in (torch.float32, torch.bfloat16)
    ]
    assert plain[0] - plain[1] == 2 * (counted.root + 2 * counted.layer)  # a teacher in bf16
    adapter = 10 * counted.layers  # in fp32: of two layers and a gradient, and the teacher's as a whole
    alone = gathered_bytes(counted, None, compute, once, False, adapter)
    assert alone == {
        "update": 2 * (counted.root + 2 * counted.layer) + 4 * 30,
        "rollouts": whole["rollouts"] + 4 * adapter,
    }
    assert gathered_bytes(counted, None, compute, once, False, adapter, True)["update"] == alone["update"] + 4 * adapter
    assert gathered_bytes(counted, None, compute, once, True, adapter)["update"] == alone["update"] + 4 * adapter


def test_a_sharded_base_divides_what_an_adapter_does_not_train():
    given = {"config": tiny_model().config, "compute": Compute(torch.bfloat16, torch.bfloat16), "teacher": "ema"}
    given |= {"lengths": Lengths(8, 12, 16), "questions": 2, "samples": 4, "longest_response": 16, "device": "cpu"}
    given |= {"optimizer": torch.optim.AdamW, "adapters": Adapters(4)}
    one, two = plan_memory(RunSpec(**given)), plan_memory(RunSpec(**given, sharding=Sharding(2, "fsdp")))
    assert {part: size / 2 for part, size in one.need.standing.items()} == pytest.approx(two.need.standing, abs=1)
    assert two.need.phases["gradients"]["gathered weights"] > 4 * one.trainable  # the teacher's adapter and some layers


def test_the_peak_of_a_phase_leaves_out_what_is_absent():
    need = Need({"weights": 5, "gradients": 3}, {"a": {"x": 1}, "b": {}}, {"a": ("gradients",)})
    assert need.peaks == {"a": 6, "b": 8}


@pytest.mark.parametrize("quantization", [None, Quantization(8), Quantization(4), Quantization(4, None, True)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_of_another_models_weights_are_those_of_the_loaded_ones(tmp_path, quantization, dtype):
    folder = saved(tmp_path, hidden_size=64, head_dim=64, intermediate_size=192, tie_word_embeddings=False)
    if quantization is not None:
        pytest.importorskip("bitsandbytes")
    model = load_model(folder, dtype=dtype, quantization=quantization)
    loaded = sum(p.nbytes for p in model.parameters())
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        inner = [state, state.state2] if state is not None and state.nested else [state]
        loaded += sum(t.nbytes for s in inner if s is not None for t in (s.absmax, s.code))
        loaded += 4 * (state is not None and state.nested)
        row_constants = getattr(getattr(module, "weight", None), "SCB", None)
        loaded += 0 if row_constants is None else row_constants.nbytes
    external = External(model.config, quantization)
    assert external.weight_bytes(getattr(torch, dtype)) == loaded


def test_peaks_with_a_teacher_of_another_size_are_a_plane_over_both_numbers_of_layers():
    def run(config, teacher):
        rows = Lengths(8, 30, 12).rows(2, 2)
        batch = group(rows, 10_000, (Packing("if-cheaper"),) * 2, with_teacher=True)[0]
        return update_peaks(config, Compute(), batch.student, [("own", batch.teacher)], 1000, True, teacher)

    def sized(layers, **sizes):
        return Qwen3Config(**SMALL | sizes | {"num_hidden_layers": layers})

    larger = {"hidden_size": 64, "num_attention_heads": 8}
    both = along_both(run, sized(5), sized(6, **larger))
    assert both == pytest.approx(run(sized(5), sized(6, **larger)), rel=5e-3)
    assert both["hidden"] > run(sized(5), sized(5))["hidden"]
    names = [name for name in both if name.startswith("teacher forward")]
    assert max(both[name] for name in names) > max(run(sized(5), sized(5))[name] for name in names)


@pytest.mark.parametrize("adapters", [None, Adapters(4, ("q_proj",), torch.float32)], ids=["weights", "adapter"])
def test_a_reference_takes_its_weights_and_one_forward_pass(adapters):
    config = tiny_model().config
    lengths = Lengths(prompt=20, reprompt=40, response=16, spread=0.0, longest=16)
    given = {
        "config": config,
        "compute": Compute(),
        "teacher": "none",
        "lengths": lengths,
        "questions": 2,
        "samples": 4,
    }
    given |= {"optimizer": torch.optim.AdamW, "longest_response": 16, "device": "cpu", "adapters": adapters}
    without, plan = plan_memory(RunSpec(**given)), plan_memory(RunSpec(**given, reference=True))
    copied = plan.count.total if adapters is None else plan.trainable
    assert plan.need.standing["teacher"] - without.need.standing["teacher"] == 4 * copied
    assert plan.need.phases == without.need.phases
    head = 2 * plan.count.head * plan.tokens["response tokens"]
    assert plan.flops.pop("reference forward") == plan.flops["student forward"] + head
    assert plan.flops == without.flops


def test_vllm_takes_what_it_is_given_and_sleeps_through_the_update():
    given = {
        "config": tiny_model().config,
        "compute": Compute(),
        "optimizer": torch.optim.AdamW,
        "teacher": "ema",
    }
    given |= {"lengths": Lengths(8, 12, 16), "questions": 2, "samples": 4, "longest_response": 16, "evaluated": 8}
    own, awake, asleep, server = (
        plan_memory(RunSpec(**given, **engine)).need
        for engine in (
            {},
            {"engine": "vllm", "engine_memory": 2.0},
            {"engine": "vllm", "engine_memory": 2.0, "engine_sleeps": True},
            {"engine": "vllm server"},
        )
    )
    for phase in ("rollouts", "evaluation"):
        assert own.peak(phase) > server.peak(phase)  # keys and values are the server's
        assert awake.peak(phase) == asleep.peak(phase) == server.peak(phase) + 2 * GIB
    for phase in ("gradients", "optimizer"):
        assert own.peak(phase) == server.peak(phase) == asleep.peak(phase) == awake.peak(phase) - 2 * GIB
