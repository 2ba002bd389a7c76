"""Predicted seconds: what binds, what they are proportional to, and the engine's steps that they follow."""

import dataclasses
from functools import partial

import pytest
import torch
from transformers import Qwen3Config

from benchmarks.standalone import fixed_lengths
from pgpo_lightning.core.types import Question
from pgpo_lightning.memory_planner.adapters import Adapters
from pgpo_lightning.memory_planner.cards import CARDS, Assumptions, Rates, default_card, rates
from pgpo_lightning.memory_planner.dry_run import Compute
from pgpo_lightning.memory_planner.flops import Width
from pgpo_lightning.memory_planner.generation import (
    DRAW_LAUNCHES,
    Generation,
    Group,
    Sampling,
    Segment,
    decode_seconds,
    own_segments,
    refilled_segments,
)
from pgpo_lightning.memory_planner.memory import Sharding
from pgpo_lightning.memory_planner.parameters import count
from pgpo_lightning.memory_planner.passes import decode_work
from pgpo_lightning.memory_planner.plan import RunSpec, plan_memory
from pgpo_lightning.memory_planner.seconds import StepSeconds, step_seconds
from pgpo_lightning.memory_planner.seconds_report import beside, beside_table, seconds_table
from pgpo_lightning.memory_planner.work import WorkCounter
from pgpo_lightning.memory_planner.workload import Evaluations, Lengths
from pgpo_lightning.models import shared_decoding
from pgpo_lightning.models.shared_decoding import SharedPrompts
from pgpo_lightning.rollout import engine as engines
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from tests.support.helpers import TOKENIZER, tiny_model
from tests.unit.memory_planner.test_work import CONFIG, SHAPE, SLOW_HOST, SLOW_MEMORY, SLOW_PRODUCTS

FEW = Qwen3Config(**SHAPE | {"num_hidden_layers": 2}, tie_word_embeddings=False)
RUN = RunSpec(
    config=FEW,
    compute=Compute(),
    optimizer=partial(torch.optim.AdamW, lr=1e-5),
    teacher="ema",
    lengths=Lengths(20, 60, 30, 0.0, 40),
    questions=2,
    samples=4,
    longest_response=40,
    evaluated=8,
    eval_samples=4,
    evaluations=Evaluations(6, None, None, 0.1),
)


def test_decoding_takes_bytes_over_bandwidth_or_launches_times_overhead():
    token = decode_work(CONFIG, Compute(), padded=False)
    segments = [Segment(10, 4, 4 * 20), Segment(5, 2, 2 * 30)]
    rows, contexts = 10 * 4 + 5 * 2, sum(4 * (20 + t) for t in range(10)) + sum(2 * (30 + t) for t in range(5))
    whole = token.once * 15 + token.row * rows + token.context * contexts
    assert decode_seconds(iter(segments), token, SLOW_MEMORY) == pytest.approx(whole.bytes / 1e9)
    assert decode_seconds(iter(segments), token, SLOW_HOST) == pytest.approx(15 * token.once.launches * 1e-3)
    assert decode_seconds(iter(segments), token, SLOW_PRODUCTS) == pytest.approx(whole.flops / 1e9)


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("at_once", [None, 4, 3])
def test_segments_are_the_forward_passes_of_the_engine(at_once, copied, monkeypatch):
    model, prompts, lengths = tiny_model(), [[5, 6, 7], [8, 9]], [3, 9, 9, 12, 1, 2, 7, 7]
    seen, ran = [], []
    monkeypatch.setattr(shared_decoding, "_LONG", 1000 if copied else 1)
    append, prefill = SharedPrompts.append, SharedPrompts._prefill

    def watched(self, tokens):
        width = self.keys[0].columns * (len(self.rows) if copied else len(self.stored))
        seen.append((len(self.rows), width + sum(self.ages) + len(self.rows)))
        append(self, tokens)

    def watched_prefill(self, new):
        ran.append([len(self.prompts[i]) for i in new])
        return prefill(self, new)

    engine = TransformersEngine(at_once)
    engine.prepare(model, 40)
    monkeypatch.setattr(SharedPrompts, "append", watched)
    monkeypatch.setattr(SharedPrompts, "_prefill", watched_prefill)
    groups = [Group(3, tuple(lengths[:4])), Group(2, tuple(lengths[4:]))]
    with fixed_lengths(lengths):
        asked = [Question("?", "1", index=i) for i in range(2)]
        engine.generate(model, TOKENIZER, asked, prompts, 4, engines.Sampling(12))
    segments, prefills = own_segments(groups, at_once, "cpu", 12, copied)
    assert seen == [(s.rows, s.context + t * s.rows) for s in segments for t in range(s.steps)]
    assert ran == [part for part in prefills if part]
    assert [length for part in ran for length in part] == [3, 2]  # every prompt once


@pytest.mark.parametrize("prompts", [[[5, 6, 7], [8, 9, 10]], [[5, 6, 7], [8, 9]]], ids=["equal", "padded"])
def test_operations_per_token_are_those_of_the_engine(prompts):
    model, engine, counted = tiny_model(), TransformersEngine(), {}
    engine.prepare(model, 40)
    for tokens in (10, 20):
        with fixed_lengths([30] * 4), WorkCounter() as counter:
            asked = [Question("?", "1", index=i) for i in range(2)]
            engine.generate(model, TOKENIZER, asked, prompts, 2, engines.Sampling(tokens))
        counted[tokens] = counter.work.launches
    token = decode_work(model.config, Compute(), padded=len(prompts[0]) > len(prompts[1]))
    predicted = token.once.launches + DRAW_LAUNCHES
    assert (counted[20] - counted[10]) / 10 == pytest.approx(predicted, abs=5)  # the fixed lengths take a few


def test_ended_responses_are_looked_for_at_every_16th_token_on_a_gpu():
    def segments(lengths, limit, at_once=None):
        return own_segments([Group(10, lengths)], at_once, "cuda", limit, True)[0]

    assert segments((4, 20, 20, 20), 100) == [Segment(15, 4, 44), Segment(16, 3, 3 * 26)]
    assert segments((4, 20, 20, 20), 20) == [Segment(15, 4, 44), Segment(4, 3, 3 * 26)]
    # The third begins when the first is seen to have ended, and leaves at the next look.
    assert segments((4, 40, 8), 100, 2) == [
        Segment(15, 2, 22),
        Segment(1, 1, 26),
        Segment(15, 2, 27 + 11),
        Segment(16, 1, 42),
    ]
    assert own_segments([Group(10, (1, 1))], None, "cpu", 100, True) == ([], [[10]])


def test_an_engine_that_refills_decodes_every_token_once():
    groups = [Group(10, (5, 1, 9)), Group(20, (3, 4, 2))]
    found = list(refilled_segments(groups, at_once=2))
    tokens = [(g.prompt, length) for g in groups for length in g.lengths]
    assert sum(s.steps * s.rows for s in found) == sum(length - 1 for _, length in tokens)
    contexts = sum(sum(s.context + s.rows * t for t in range(s.steps)) for s in found)
    assert contexts == sum(sum(prompt + t for t in range(1, length)) for prompt, length in tokens)
    assert {s.rows for s in found} <= {1, 2}
    assert sum(s.steps for s in found) < sum(length - 1 for _, length in tokens)


def test_a_cuda_graph_has_no_launches_and_no_unfused_bytes():
    width = Width.of(CONFIG, count(CONFIG))
    host = dataclasses.replace(SLOW_HOST, engine_overhead=0.5)
    generation = Generation(CONFIG, Compute(), width, host, "cuda")
    groups = [Group(8, (5, 5))]
    assert generation.seconds(groups, Sampling(5, "vllm"))["decode"] == pytest.approx(4 * 0.5)
    own = generation.seconds(groups, Sampling(5))["decode"]
    assert own == pytest.approx(4 * 1e-3 * (decode_work(CONFIG, Compute(), False).once.launches + DRAW_LAUNCHES))


def test_a_captured_step_is_one_launch_once_it_has_been_captured():
    generation = Generation(CONFIG, Compute(), Width.of(CONFIG, count(CONFIG)), SLOW_HOST, "cuda")
    groups, launches = [Group(8, (100, 100))], decode_work(CONFIG, Compute(), False).once.launches
    captured = generation.seconds(groups, Sampling(100, captured=True))["decode"]
    # Memory for 33, 66, 99 and 132 tokens, and two ordinary steps with each.
    assert captured == pytest.approx(1e-3 * (99 * (1 + DRAW_LAUNCHES) + 4 * 2 * launches))
    assert generation.seconds(groups, Sampling(100))["decode"] > 2 * captured


def test_a_gpu_reads_the_head_in_16_bits():
    counted, compute = count(CONFIG), Compute(torch.bfloat16)
    read = {
        device: Generation(CONFIG, compute, Width.of(CONFIG, counted), SLOW_HOST, device)
        ._token(False)
        .once.product_bytes
        for device in ("cuda", "cpu")
    }
    assert read == {"cuda": 2 * (counted.matrices + counted.head), "cpu": 2 * counted.matrices + 4 * counted.head}


def test_a_step_is_proportional_to_what_binds_it():
    products = step_seconds(RUN, SLOW_PRODUCTS)
    twice = step_seconds(dataclasses.replace(RUN, questions=4), SLOW_PRODUCTS)
    faster = step_seconds(RUN, dataclasses.replace(SLOW_PRODUCTS, flops=2e9))
    for phase in ("prefill", "decode", "student forward", "student backward", "teacher forward", "loss"):
        assert twice.phases[phase] == pytest.approx(2 * products.phases[phase])
        assert faster.phases[phase] == pytest.approx(products.phases[phase] / 2)
    assert products.step == pytest.approx(products.rollouts + products.update)
    several = step_seconds(dataclasses.replace(RUN, passes=2, updates=2), SLOW_PRODUCTS)
    assert several.phases["student backward"] == pytest.approx(2 * products.phases["student backward"])
    assert several.phases["teacher forward"] == pytest.approx(products.phases["teacher forward"])


def test_launches_are_those_of_all_micro_batches():
    one = step_seconds(RUN, SLOW_HOST).phases
    two = step_seconds(dataclasses.replace(RUN, micro_batch_tokens=4 * 90), SLOW_HOST)
    assert two.phases["student forward"] == pytest.approx(2 * one["student forward"])
    assert "loss" not in one or one["loss"] < 1e-20


def test_an_evaluation_is_that_of_the_device_with_the_most_questions():
    def seconds(questions, batch=None, at_once=None, devices=1):
        tests = Evaluations(questions, batch, at_once, 0.1)
        sharding = Sharding(devices, "ddp" if devices > 1 else "single")
        return step_seconds(dataclasses.replace(RUN, evaluations=tests, sharding=sharding), SLOW_HOST)

    whole, found = seconds(6), seconds(6, batch=2)
    assert found.evaluation == pytest.approx(3 * whole.evaluation)  # three calls in place of one
    assert seconds(6, at_once=8).evaluation == pytest.approx(found.evaluation)
    assert seconds(7, at_once=4, devices=4).evaluation == pytest.approx(2 * seconds(1, at_once=4).evaluation)
    assert found.amortised == pytest.approx(found.evaluation / 10)
    assert "one evaluation" in seconds_table(found)
    assert step_seconds(dataclasses.replace(RUN, evaluations=None), SLOW_HOST).evaluation is None


def test_ranks_exchange_gradients_and_sharded_weights():
    slow = Rates("links", 1e30, 1e30, 1e9, overhead=1e-30)
    total = count(FEW).total
    assert step_seconds(RUN, slow).step < 1e-12
    ddp = step_seconds(dataclasses.replace(RUN, sharding=Sharding(4, "ddp")), slow).phases
    assert ddp["gradient reduction"] == pytest.approx(2 * 3 / 4 * 4 * total / 1e9)
    fsdp = step_seconds(dataclasses.replace(RUN, sharding=Sharding(4, "fsdp")), slow).phases
    once = step_seconds(dataclasses.replace(RUN, sharding=Sharding(4, "fsdp", reduces=False)), slow).phases
    assert once["gradient reduction"] == pytest.approx(3 / 4 * 4 * total / 1e9)
    assert fsdp["gradient reduction"] == pytest.approx(len(RUN.micro_batches(RUN.rows())) * once["gradient reduction"])
    assert fsdp["weight sync"] == pytest.approx(3 / 4 * 4 * total / 1e9)
    assert fsdp["weight gathering"] == pytest.approx(3 * fsdp["weight sync"])  # forward, backward and teacher
    server = dataclasses.replace(RUN, engine="vllm server")
    assert step_seconds(server, slow).phases["weight sync"] == pytest.approx(2 * 4 * total / 1e9)
    local = step_seconds(dataclasses.replace(RUN, engine="vllm"), SLOW_MEMORY).phases["weight sync"]
    assert local == pytest.approx(8 * total / 1e9)


def test_a_teacher_and_a_reference_have_passes_of_their_own():
    seconds = {
        kind: step_seconds(dataclasses.replace(RUN, teacher=kind, reference=kind == "none"), SLOW_PRODUCTS).phases
        for kind in ("none", "live", "trust-region")
    }
    assert "teacher forward" not in seconds["none"]
    assert seconds["none"]["reference forward"] == pytest.approx(seconds["none"]["student forward"])
    assert seconds["trust-region"]["teacher forward"] == pytest.approx(2 * seconds["live"]["teacher forward"])


def test_rates_are_the_data_sheets_times_what_is_reached():
    found = rates("h100", Assumptions(), torch.bfloat16)
    assert (found.flops, found.bandwidth) == (pytest.approx(0.6 * 989.4e12), pytest.approx(0.8 * 3.35e12))
    assert rates("h100", Assumptions(), torch.float32).flops == pytest.approx(0.6 * 66.9e12)
    assert rates("h100", Assumptions(), torch.bfloat16, nodes=2).link == pytest.approx(0.8 * 50e9)
    assert rates("l4", Assumptions(), torch.bfloat16, nodes=2).link == pytest.approx(0.8 * 32e9)
    given = rates("cpu", Assumptions(tflops=0.05, bandwidth=10.0), torch.float32)
    assert (given.flops, given.bandwidth) == (pytest.approx(5e10), pytest.approx(1e10))
    assert all(card.source.startswith("NVIDIA") for card in CARDS.values())


def test_a_card_without_rates_is_refused():
    with pytest.raises(ValueError, match=r"Expected `card` to be one of h100, .*, cpu, but got h9"):
        rates("h9", Assumptions(), torch.bfloat16)
    with pytest.raises(ValueError, match=r"Expected `assume.bandwidth` with `card` cpu, .* but got null"):
        rates("cpu", Assumptions(tflops=1.0), torch.bfloat16)
    with pytest.raises(ValueError, match=r"Expected `assume.utilisation` to lie in \(0, 1\], but got 2"):
        Assumptions(utilisation=2.0)


@pytest.mark.parametrize(
    ("memory", "card"), [(None, "h100"), (79.6, "h100"), (139.8, "h200"), (24, "l4"), (44, "l40s"), (7, "h100")]
)
def test_the_memory_chooses_the_card(memory, card):
    assert default_card(memory) == card


def test_predicted_beside_measured_seconds():
    found = StepSeconds(SLOW_HOST, {"decode": 3.0, "loss": 1.0})
    curves = {"timing_s/gen": {1: 9.0, 2: 6.0, 3: 6.0}, "timing_s/update_actor": {1: 2.0}, "timing_s/step": {1: 8.0}}
    rows = beside(found, curves)
    assert [(row["phase"], row["ratio"]) for row in rows] == [("rollouts", 0.5), ("update", 0.5), ("step", 0.5)]
    assert "| rollouts | 3 | 6 | 0.5 |" in beside_table(rows, "run")
    with pytest.raises(ValueError, match="Expected a run with the curve timing_s/gen, but it has none"):
        beside(found, {})


def test_a_longer_prompt_costs_more_than_a_shorter_one():
    generation = Generation(FEW, Compute(), Width.of(FEW, count(FEW)), SLOW_MEMORY, "cpu")
    short, long = (generation.seconds([Group(n, (1,))], Sampling(1))["prefill"] for n in (100, 200))
    assert short < long < 2 * short + 1e-9


def test_an_adapters_teacher_shares_prompts_although_the_student_recomputes_activations():
    run = dataclasses.replace(
        RUN, compute=Compute(checkpointing=True), adapters=Adapters(4), lengths=Lengths(20, 60, 4, 0.0, 40)
    )
    plan = plan_memory(run)
    assert (plan.largest["student"].prompts, plan.largest["teacher"].prompts > 0) == (0, True)
    assert step_seconds(run, SLOW_PRODUCTS).phases["teacher forward"] > 0
