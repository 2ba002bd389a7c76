"""vLLM in this process as far as it goes without vLLM; with it, see tests/vllm."""

from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file

from pgpo_lightning.core.types import Question
from pgpo_lightning.models.lora import add_adapter
from pgpo_lightning.rollout import vllm_local
from pgpo_lightning.rollout.engine import Sampling
from pgpo_lightning.rollout.vllm_engine import VLLMEngine
from pgpo_lightning.rollout.vllm_local import LocalSampler, RankGroup
from tests.support.adapters import disturb, lora, matrices
from tests.support.helpers import TOKENIZER, tiny_model

EOS = TOKENIZER.eos_token_id


class Recorder:
    """Stands for `vllm.LLM`: answers every request with the end token, and records the calls."""

    def __init__(self):
        self.calls, self.lora = [], None

    def wake_up(self, tags):
        self.calls.append(f"wake {tags}")

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def collective_rpc(self, method, kwargs):
        names = [name for name, _ in kwargs["weights_iterator"]]
        self.calls.append(f"{method} {len(names)}")

    def reset_prefix_cache(self):
        self.calls.append("reset")
        return True

    @property
    def llm_engine(self):
        return SimpleNamespace(add_lora=lambda request: self.calls.append(f"add_lora {request}"))

    def generate(self, requests, params, use_tqdm, lora_request):
        assert (lora_request is None) == (self.lora is None), "an adapter that is held but not asked for"
        self.calls.append(
            f"generate {len(requests)} seeds {[each.seed for each in params]} drawn {torch.rand(1).item():.6f}"
        )
        output = SimpleNamespace(token_ids=[EOS], logprobs=[{EOS: SimpleNamespace(logprob=-0.5)}])
        return [SimpleNamespace(outputs=[output] * params[0].n) for _ in requests]


@pytest.fixture
def sampler():
    made = object.__new__(LocalSampler)
    made.params = lambda **settings: SimpleNamespace(**settings)
    made.group, made.in_workers, made.dozes, made.asleep = RankGroup(1), False, True, False
    made.dtype, made.llm, made.max_model_len = torch.bfloat16, Recorder(), 64
    made.base = made.adapter = None
    return made


def engine_with(sampler):
    engine = VLLMEngine(enable_sleep_mode=True)
    engine.sampler = sampler
    return engine


def ask(engine, model, seed=0, **sampling):
    torch.manual_seed(seed)
    return engine.generate(model, TOKENIZER, [Question("?", "1", index=0)], [[7, 8]], 2, Sampling(8, **sampling))


def test_memory_is_taken_and_released_in_an_order_in_which_it_suffices(sampler):
    """Weights, then the stream into them, then keys and values; asleep it has neither, so the next session streams again."""
    engine, model = engine_with(sampler), tiny_model()
    ask(engine, model)
    ask(engine, model)
    tensors = len(model.state_dict())
    first = [f"reload_weights {tensors}", "reset", "reset", "generate", "sleep 2"]
    again = [
        "wake ['weights']",
        f"reload_weights {tensors}",
        "reset",
        "wake ['kv_cache']",
        "reset",
        "generate",
        "sleep 2",
    ]
    assert [call.split(" 1 seeds")[0] for call in sampler.llm.calls] == first + again


@pytest.mark.parametrize("dozes", [False, True])
def test_an_adapter_alone_follows_the_base_weights_which_are_sent_again_only_when_they_were_lost(
    sampler, tmp_path, dozes
):
    model = tiny_model()
    tensors = len(model.state_dict())
    add_adapter(model, lora(), seed=0)
    sampler.dozes, sampler.folder = dozes, tmp_path
    sampler.adapter = sampler.llm.lora = lambda **settings: f"student {settings}"
    engine, written = engine_with(sampler), []
    for _ in range(2):
        disturb(model)
        ask(engine, model)
        written.append(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    loads = [call for call in sampler.llm.calls if call.startswith(("reload", "add"))]
    added = "add_lora student {'load_inplace': True}"
    assert loads == [f"reload_weights {tensors}", added, *([f"reload_weights {tensors}"] if dozes else []), added]
    for name, matrix in matrices(model).items():
        peft = f"base_model.model.{name.replace('.default', '')}"
        assert torch.equal(written[1][peft], matrix.bfloat16())
        assert not torch.equal(written[0][peft], written[1][peft])
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)  # nobody does, but then the old base would be wrong
    ask(engine, model)
    assert [call.split(" ")[0] for call in sampler.llm.calls if call.startswith(("reload", "add"))][len(loads) :] == [
        "reload_weights",
        "add_lora",
    ]


def test_an_adapter_alone_needs_one():
    with pytest.raises(
        MisconfigurationException, match=r"^Expected a student with `lora`, .* Set `engine.lora` to merged.$"
    ):
        VLLMEngine(lora="adapter").prepare(tiny_model(), 64)
    model = tiny_model()
    add_adapter(model, lora(), seed=0)
    VLLMEngine(lora="adapter").prepare(model, 64)


def test_one_seed_of_the_call_in_training_and_one_a_question_in_evaluation(sampler):
    engine, model = engine_with(sampler), tiny_model()
    for seed in (0, 0, 1):
        ask(engine, model, seed=seed)
    first, same, other = (call for call in sampler.llm.calls if call.startswith("generate"))
    assert "seeds [None]" in first
    assert first == same != other
    ask(engine, model, seeds=[2**62 + 5])
    assert "seeds [5]" in sampler.llm.calls[-2]


def test_ranks_that_share_a_copy_ask_it_the_same(monkeypatch):
    everyone = [(["a"], 10), (["b", "c"], 11), (["d"], 12), ([], 13)]
    monkeypatch.setattr(vllm_local, "gather", lambda local: everyone)
    found = []
    for rank, (items, seed) in enumerate(everyone):
        monkeypatch.setattr(vllm_local.dist, "get_rank", lambda rank=rank: rank)
        joined, shared_seed, own = RankGroup(2).joined(items, seed)
        assert joined[own] == items
        found.append((joined, shared_seed))
    assert found == [(["a", "b", "c"], 10)] * 2 + [(["d"], 12)] * 2


def test_an_evaluation_that_would_leave_a_rank_waiting_is_refused():
    own, shared = VLLMEngine(), VLLMEngine(tensor_parallel_size=2)
    own.check_evaluation([3, 2])
    own.check_evaluation([0])
    with pytest.raises(MisconfigurationException, match=r"a batch on every rank with VLLMEngine .* have \[1, 0\]"):
        own.check_evaluation([1, 0])
    shared.check_evaluation([2, 2])
    with pytest.raises(MisconfigurationException, match=r"as many batches on every rank, .* have \[2, 1\]"):
        shared.check_evaluation([2, 1])
    VLLMEngine(server="http://a").check_evaluation([1, 0])
