"""A step of decoding as a CUDA graph, on a pretended GPU that repeats recorded operations as they were."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.core.seeding import derive_seed
from pgpo_lightning.models import shared_decoding
from pgpo_lightning.rollout import transformers_engine
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from tests.support.architectures import tiny
from tests.support.helpers import TOKENIZER, tiny_model
from tests.support.pretended_gpu import NAME, counting
from tests.support.pretended_gpu.fixture import take_for_gpu
from tests.support.sampling import ending_model, generate, prompts_of, responses

SEEDS = [derive_seed("question", i) for i in range(3)]


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    take_for_gpu(monkeypatch)
    monkeypatch.setattr(shared_decoding, "_ROOM", 8)  # memory grows, and the step is captured again


def assert_the_same_with_graphs(model, **settings):
    """What a captured step samples on the device is what the CPU samples."""
    prompts = prompts_of(5, 9, 3)
    expected = generate(model, prompts, seeds=SEEDS, **settings)
    with counting() as counts:
        found = generate(model.to(NAME), prompts, seeds=SEEDS, cuda_graphs=True, **settings)
    assert counts.operations["graph launch"] > 5
    assert responses(found) == responses(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.log_probs, b.log_probs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("shared_from", "at_once"), [(1, 5), (512, None), (512, 5)])
def test_responses_are_those_of_the_cpu(shared_from, at_once, monkeypatch):
    monkeypatch.setattr(shared_decoding, "_LONG_ON_GPU", shared_from)
    assert_the_same_with_graphs(ending_model(), n=3, max_tokens=24, max_sequences=at_once)


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_moe"])
def test_windows_and_experts(name):
    model = tiny(name, vocab_size=len(TOKENIZER))
    if name == "qwen3_moe":
        model.set_experts_implementation("batched_mm")
    assert_the_same_with_graphs(model, n=2, max_tokens=20)


def test_a_captured_token_is_one_launch_beside_those_of_drawing_it(monkeypatch):
    monkeypatch.setattr(transformers_engine, "end_tokens", lambda *_: {10**9})
    model, prompts = tiny_model(tie_word_embeddings=False).to(NAME), prompts_of(5, 9, 3)
    monkeypatch.setattr(shared_decoding, "_ROOM", 64)
    TransformersEngine(cuda_graphs=True).prepare(model, 64)
    totals = []
    for tokens in (17, 33):
        with counting() as counts:
            generate(model, prompts, 2, max_tokens=tokens, cuda_graphs=True)
        totals.append(counts)
    short, long = totals
    assert long.operations["graph launch"] - short.operations["graph launch"] == 16
    assert long.operations.total() - short.operations.total() <= 16 * 20
    assert long.waits.total() - short.waits.total() == 1


@pytest.mark.parametrize("name", ["qwen3_5_text", "gpt_neo"])
def test_what_cannot_be_captured_is_refused_at_the_start(name):
    model = tiny(name, vocab_size=len(TOKENIZER)).to(NAME)
    with pytest.raises(MisconfigurationException, match=r"not all of its layers.*`cuda_graphs` of TransformersEngine"):
        TransformersEngine(cuda_graphs=True).prepare(model, 64)


def test_a_step_that_waits_for_the_host_is_refused():
    model = tiny_model(tie_word_embeddings=False).to(NAME)
    model.model.norm.register_forward_hook(lambda _, __, out: out if out.sum().item() < 1e9 else None)
    with pytest.raises(MisconfigurationException, match="not permitted when stream is capturing"):
        TransformersEngine(cuda_graphs=True).prepare(model, 64)
