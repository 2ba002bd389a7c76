"""Counted operations, FLOPs and bytes against those of real modules."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3Config

from pgpo_lightning.memory_planner import flops
from pgpo_lightning.memory_planner.cards import Rates
from pgpo_lightning.memory_planner.dry_run import Compute
from pgpo_lightning.memory_planner.optimizers import optimizer_need
from pgpo_lightning.memory_planner.parameters import count
from pgpo_lightning.memory_planner.passes import (
    _along_layers,
    _decode,
    decode_work,
    dry_run,
    student_work,
    teacher_work,
)
from pgpo_lightning.memory_planner.work import Work, WorkCounter
from pgpo_lightning.memory_planner.workload import Layout, Lengths, group
from pgpo_lightning.models.lm_head import decoder
from pgpo_lightning.models.packing import Packing
from pgpo_lightning.models.shared_attention import CopiedKeys
from tests.support.architectures import tiny_config
from tests.support.helpers import tiny_model

SHAPE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
CONFIG = Qwen3Config(**SHAPE, tie_word_embeddings=False)
WRITTEN_OUT = Compute(attention="eager")
SLOW_HOST = Rates("host", 1e30, 1e30, 1e30, overhead=1e-3)
SLOW_MEMORY = Rates("memory", 1e30, 1e9, 1e30, overhead=1e-30)
SLOW_PRODUCTS = Rates("products", 1e9, 1e30, 1e30, overhead=1e-30)


def micro_batch():
    return group(Lengths(12, 30, 10, 0.5).rows(2, 4), 10_000, (Packing(), Packing()), with_teacher=True)[0]


def test_views_and_allocations_are_no_operations():
    a, b = torch.ones(4, 8), torch.ones(8, 2)
    with WorkCounter() as counter:
        a.view(8, 4).t()
        torch.empty(100)
        a @ b
        a.add_(1)
        torch.relu(b.expand(3, 8, 2))
    work = counter.work
    assert (work.launches, work.flops) == (3, 2 * 4 * 8 * 2)
    assert work.product_bytes == 4 * (32 + 16 + 8)
    assert work.other_bytes == 4 * (32 + 32 + 16 + 48)  # an expanded tensor is read once


def test_an_operation_on_lists_writes_its_arguments():
    tensors = [torch.ones(8), torch.ones(8)]
    with WorkCounter() as counter:
        torch._foreach_add_(tensors, 1.0)
    assert counter.work == Work(1, 0, 0, 4 * (16 + 16))


def test_flops_of_an_update_are_those_of_the_real_model():
    batch, model = micro_batch(), tiny_model(num_hidden_layers=5)
    model.set_attn_implementation("eager")
    config = model.config
    with FlopCounterMode(display=False) as counter:
        hidden = batch.student.hidden_states(decoder(model), config)
        forward = counter.get_total_flops()
        hidden.sum().backward()
    work = student_work(config, WRITTEN_OUT, batch.student)
    assert work["forward"].flops == forward
    assert work["forward"].flops + work["backward"].flops == counter.get_total_flops()
    width = flops.Width.of(config, count(config))
    assert forward == flops.forward(width, Layout.of(batch.student))


def test_flops_of_a_teacher_are_those_of_the_real_model():
    batch, model = micro_batch(), tiny_model(num_hidden_layers=5)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        batch.teacher.hidden_states(decoder(model), model.config)
    assert teacher_work(model.config, WRITTEN_OUT, batch.teacher).flops == counter.get_total_flops() > 0


def test_flops_of_experts_are_those_of_the_real_model():
    config, batch = tiny_config("qwen3_moe"), micro_batch()
    work, token = student_work(config, WRITTEN_OUT, batch.student), decode_work(config, WRITTEN_OUT, padded=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        hidden = batch.student.hidden_states(decoder(model), config)
        forward = counter.get_total_flops()
        hidden.sum().backward()
    assert work["forward"].flops == forward
    assert work["forward"].flops + work["backward"].flops == counter.get_total_flops()
    counted = count(config)
    width, layout = flops.Width.of(config, counted), Layout.of(batch.student)
    routers = 2 * layout.padded * sum(p.numel() for n, p in model.named_parameters() if n.endswith("gate.weight"))
    assert forward == flops.forward(width, layout) + routers
    assert token.row.flops * layout.padded == 2 * (width.matrices + counted.head) * layout.padded + routers


def test_shapes_that_depend_on_data_are_refused():
    config = tiny_config("qwen3_moe")
    config._experts_implementation = "eager"  # a loop over the experts that were chosen
    with pytest.raises(ValueError, match="Expected `model` to compute shapes that do not depend on its data"):
        student_work(config, Compute(), micro_batch().student)


@pytest.mark.parametrize(
    ("compute", "layers"),
    [
        (Compute(), 5),
        (Compute(checkpointing=True), 5),
        (Compute(checkpointing=True, selective=2), 9),
        (Compute(checkpointing=True, selective="op"), 3),
    ],
    ids=["kept", "recomputed", "every second", "op"],
)
def test_attention_in_one_operation_has_the_flops_of_attention_written_out(compute, layers):
    batch, config = micro_batch(), Qwen3Config(**SHAPE | {"num_hidden_layers": layers}, tie_word_embeddings=False)
    written_out = dataclasses.replace(compute, attention="eager")
    fused, apart = (student_work(config, each, batch.student) for each in (compute, written_out))
    assert fused["forward"].flops == apart["forward"].flops
    assert fused["forward"].launches < apart["forward"].launches
    layout, width = Layout.of(batch.student), flops.Width.of(config, count(config))
    assert fused["backward"].flops == flops.backward(width, layout, compute.recomputed(layers))
    # Scores are computed again: five products in place of four. Two of them are repeated where `op` cannot keep them.
    again = flops.backward(width, layout, written_out.recomputed(layers))
    assert apart["backward"].flops == again - 2 * width.attention * layout.pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_reads_every_matrix_and_all_keys_and_values_once(dtype):
    counted = count(CONFIG)
    token = decode_work(CONFIG, Compute(dtype, dtype), padded=False)
    assert token.once.product_bytes == counted.matrices * dtype.itemsize + 4 * counted.head  # fp32 logits
    assert token.context.product_bytes == 2 * 5 * 2 * 8 * dtype.itemsize
    assert token.row.flops == 2 * (counted.matrices + counted.head)
    assert token.context.flops == 4 * 5 * 4 * 8
    assert (token.row.launches, token.context.launches) == (0, 0)


def test_under_mixed_precision_a_token_reads_16_bit_copies_and_casts_no_matrix():
    counted = count(CONFIG)
    mixed = decode_work(CONFIG, Compute(torch.float32, autocast=torch.bfloat16), padded=False)
    narrow = decode_work(CONFIG, Compute(torch.bfloat16), padded=False)
    assert mixed.once.product_bytes == narrow.once.product_bytes
    assert mixed.once.other_bytes - narrow.once.other_bytes < 0.1 * counted.matrices  # weights of norms and the like
    assert mixed.once.launches > narrow.once.launches


@pytest.mark.parametrize("compute", [Compute(torch.float32, autocast=torch.bfloat16), Compute(torch.bfloat16)])
def test_the_head_reads_fp32_where_the_sampler_sums_logits_in_fp32(compute):
    token, counted = decode_work(CONFIG, compute, padded=False), count(CONFIG)
    assert (
        token.once.product_bytes == 2 * counted.matrices + 4 * counted.head
    )  # a CPU has no fp32 sums of 16-bit products
    assert token.row.flops == 2 * (counted.matrices + counted.head)


def test_the_work_of_a_token_is_linear_in_rows_and_contexts():
    token = decode_work(CONFIG, Compute(), padded=True)

    def at(few):
        with dry_run.fake(Compute()):
            return {
                "": _decode(dry_run.build(few, torch.float32, Compute()).eval(), Compute(), 7, 50, True, CopiedKeys)
            }

    counted = _along_layers(at, CONFIG)[""]
    # Positions, one per token of the longest context, are not linear in the tokens of all contexts.
    assert dataclasses.astuple(token.of(7, 7 * 50)) == pytest.approx(dataclasses.astuple(counted), rel=1e-2)


def test_seconds_are_those_of_what_binds():
    work = Work(launches=10, flops=4e6, product_bytes=3e6, other_bytes=2e6)
    assert work.seconds(SLOW_HOST) == pytest.approx(10e-3)
    assert work.seconds(SLOW_MEMORY) == pytest.approx(5e-3)
    assert work.seconds(SLOW_PRODUCTS) == pytest.approx(4e-3)
    both = Rates("both", 1e9, 1e9, 1e9, overhead=1e-30)
    assert work.seconds(both) == pytest.approx(4e-3 + 2e-3)  # products, then the others
    assert (work * 3).seconds(both) == pytest.approx(3 * work.seconds(both))


def test_an_optimizer_step_reads_and_writes_what_its_class_does():
    def traffic(make, device="cpu"):
        return optimizer_need(make, [(512, 512)], torch.float32, device).traffic / 512**2 / 4

    def sgd(p):
        return torch.optim.SGD(p, lr=1e-3, foreach=False)

    assert traffic(sgd) == pytest.approx(3, rel=0.01)  # reads parameter and gradient, writes the parameter
    # One tensor after the other or all at once, AdamW reads and writes its tensors several times.
    assert 7 <= traffic(torch.optim.AdamW) <= 25
    assert 7 <= traffic(torch.optim.AdamW, "cuda") <= 30
