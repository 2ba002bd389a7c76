"""The vLLM engine as far as it goes without vLLM; with it, see tests/vllm."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pgpo_lightning.core.seeding import derive_seed, seeded
from pgpo_lightning.core.types import Question
from pgpo_lightning.rollout import vllm_engine
from pgpo_lightning.rollout.engine import Sampling
from pgpo_lightning.rollout.vllm_engine import VLLMEngine, computes_in
from pgpo_lightning.rollout.weight_sync import checksum, write_weights
from tests.support.helpers import TOKENIZER, tiny_model

EOS = TOKENIZER.eos_token_id


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu_memory_utilization": 0}, r"`gpu_memory_utilization` to lie in \(0, 1\], but got 0"),
        ({"gpu_memory_utilization": 1.5}, r"`gpu_memory_utilization` to lie in \(0, 1\], but got 1\.5"),
        ({"tensor_parallel_size": 0}, "`tensor_parallel_size` to be at least 1, but got 0"),
        ({"max_model_len": 0}, "`max_model_len` to be at least 1, but got 0"),
        ({"server_timeout": 0}, "`server_timeout` to be above 0, but got 0"),
        ({"options": {"dtype": "auto"}}, "`options` to hold nothing that is set elsewhere, but got dtype"),
        ({"options": {"logprobs_mode": "raw_logprobs"}}, "set elsewhere, but got logprobs_mode"),
        ({"server": "localhost:8000"}, "`server` to be an address such as http://localhost:8000, but got 'localhost:8000'"),
        ({"server": "http://a", "max_model_len": 9}, "`max_model_len` to be left at its default with a `server`, .* but got 9"),
        ({"server": "http://a", "lora": "adapter"}, "`lora` to be left at its default with a `server`, .* but got adapter"),
        ({"server": "http://a", "dtype": "float32"}, "`dtype` to be left at its default with a `server`, .* but got float32"),
    ],
)  # fmt: skip
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        VLLMEngine(**settings)


def test_without_vllm(monkeypatch):
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    with pytest.raises(MisconfigurationException, match=r"^Expected vLLM .*: pip install 'pgpo-lightning\[vllm\]'$"):
        VLLMEngine().check()
    VLLMEngine(server="http://localhost:1").check()  # needs none here


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=1e-6),
        lambda p: torch.optim.AdamW(p, lr=1e-6, fused=True),
    ],
)
def test_the_checksum_sees_every_step(make):
    """Also of an optimizer that does not count up the versions of the weights, which would be the cheaper thing to look at."""
    model = tiny_model()
    optimizer = make(model.parameters())
    seen = [checksum(model)]
    for _ in range(3):
        model(torch.arange(6, 18).unsqueeze(0)).logits.square().mean().backward()
        assert checksum(model) == seen[-1]
        optimizer.step()
        seen.append(checksum(model))
    assert len({*map(tuple, seen)}) == 4


def test_the_checksum_sees_one_bit_and_knows_old_weights_again():
    model = tiny_model().bfloat16()
    before, weights = checksum(model), {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.model.norm.weight[3].mul_(1.01)
    assert checksum(model) != before
    model.load_state_dict(weights)
    assert checksum(model) == before


@pytest.mark.parametrize("tied", [True, False])
def test_written_weights_are_a_checkpoint_with_a_head(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    write_weights(tiny_model(3, tie_word_embeddings=tied), tmp_path)
    write_weights(model, tmp_path)  # over it
    assert torch.equal(load_file(tmp_path / "model.safetensors")["lm_head.weight"], model.lm_head.weight)
    assert model.config.architectures is None  # and stays so; vLLM could not tell what to do with the folder
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


def test_the_sampler_computes_in_what_the_student_computes_in():
    model = tiny_model()
    assert computes_in(model) == "float32"
    with torch.autocast("cpu", torch.bfloat16):
        assert computes_in(model) == "bfloat16"
    assert computes_in(model.bfloat16()) == "bfloat16"


# -------------------------------------------------------------------------------------------------------------- server


class Pretended:
    """Speaks like a server; what it answers can be changed."""

    def __init__(self):
        self.calls, self.mode, self.dev, self.reset = [], "processed_logprobs", True, True
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                answers = {
                    "/health": "",
                    "/v1/models": {"data": [{"id": "it", "max_model_len": 64}]},
                    "/server_info?config_format=json": {"vllm_config": {"model_config": {"logprobs_mode": outer.mode}}},
                }
                self.reply(404 if "info" in self.path and not outer.dev else 200, answers[self.path])

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.calls.append((self.path, body))
                self.reply(*outer.post(self.path, body))

            def reply(self, code, answer):
                text = json.dumps(answer).encode() if answer != "" else b""
                self.send_response(code)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def post(self, path, body):
        if path == "/reset_prefix_cache":
            return 200, {"success": self.reset}
        if path == "/collective_rpc":
            return 200, {"results": [None]}
        if len(body["prompt"]) == 13:
            return 500, {"error": "no room"}
        ids = [*body["prompt"], EOS]
        choices = [
            {"index": i, "token_ids": [60 + i, *ids], "logprobs": {"token_logprobs": [-0.5 - i] * (len(ids) + 1)}}
            for i in range(body["n"])
        ]
        return 200, {"choices": choices[::-1]}


@pytest.fixture
def server():
    pretended = Pretended()
    yield pretended
    pretended.http.shutdown()
    pretended.http.server_close()


def ask(engine, model, prompts=([7, 8], [9]), n=2, seed=0, **sampling):
    asked = [Question("?", "1", index=i) for i in range(len(prompts))]
    with seeded("test", seed):
        return engine.generate(model, TOKENIZER, asked, list(prompts), n, Sampling(**{"max_tokens": 8} | sampling))


def test_what_a_server_is_asked_and_how_its_answers_are_read(server, tmp_path):
    model = tiny_model()
    engine = VLLMEngine(server=server.url + "/", weights_folder=str(tmp_path / "weights"))
    rollouts = ask(engine, model, temperature=0.7)
    assert [r.response_ids for r in rollouts] == [[60, 7, 8, EOS], [61, 7, 8, EOS], [60, 9, EOS], [61, 9, EOS]]
    assert [r.question.index for r in rollouts] == [0, 0, 1, 1]
    assert rollouts[1].log_probs.tolist() == [-1.5] * 4
    assert all(r.finished for r in rollouts)
    (rpc, what), (reset, _), *completions = server.calls
    assert (rpc, reset) == ("/collective_rpc", "/reset_prefix_cache")
    assert what == {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "weights")}}
    bodies = sorted((body for _, body in completions), key=lambda body: body["prompt"])
    assert [body["prompt"] for body in bodies] == [[7, 8], [9]]
    assert bodies[0]["seed"] != bodies[1]["seed"]
    said = {"n": 2, "max_tokens": 8, "temperature": 0.7, "top_p": 1.0, "top_k": 0, "stop_token_ids": [EOS]}
    assert bodies[0] | said == bodies[0]
    del server.calls[:]
    ask(engine, model, temperature=0.7)
    assert sorted(body["seed"] for _, body in server.calls) == sorted(body["seed"] for body in bodies)
    assert {path for path, _ in server.calls} == {"/v1/completions"}  # no weights again
    with torch.no_grad():
        model.model.norm.weight.add_(0.1)
    del server.calls[:]
    ask(engine, model, seed=1)
    assert [path for path, _ in server.calls[:2]] == ["/collective_rpc", "/reset_prefix_cache"]
    assert not {body["seed"] for _, body in server.calls[2:]} & {body["seed"] for body in bodies}


def test_the_answers_of_a_server_are_handed_over_question_by_question(server):
    asked, taken, engine = threading.Event(), [], VLLMEngine(server=server.url)
    post = server.post

    def last_is_slow(path, body):
        if body.get("prompt") == [7, 8]:
            asked.wait(30)  # until the other question has been handed over
        return post(path, body)

    def receive(rollout):
        taken.append(rollout)
        if len(taken) == 2:
            asked.set()

    server.post = last_is_slow
    with engine.handing_over(receive):
        rollouts = ask(engine, tiny_model(), ([9], [7, 8]))
    assert [r.response_ids[1] for r in rollouts] == [9, 9, 7, 7]
    assert [id(rollout) for rollout in taken] == [id(rollout) for rollout in rollouts]
    assert asked.is_set()
    assert not VLLMEngine().hands_over


def test_a_server_gets_the_seeds_of_the_questions(server):
    engine, model = VLLMEngine(server=server.url), tiny_model()
    seeds = [derive_seed("question", i) for i in range(3)]
    asked = {}
    for part in ([0, 1, 2], [2], [1, 0]):
        ask(engine, model, [[7 + i] for i in part], seed=len(part), seeds=[seeds[i] for i in part])
        for path, body in server.calls:
            if path == "/v1/completions":
                asked.setdefault(body["prompt"][0] - 7, set()).add(body["seed"])
        del server.calls[:]
    assert asked == {i: {seed % 2**62} for i, seed in enumerate(seeds)}


def test_no_server():
    with pytest.raises(MisconfigurationException, match=r"server at http://127.0.0.1:9 within 0.1 seconds .*refused"):
        ask(VLLMEngine(server="http://127.0.0.1:9", server_timeout=0.1), tiny_model())


def test_a_server_that_was_started_otherwise(server):
    server.mode = "raw_logprobs"
    with pytest.raises(
        MisconfigurationException, match=r"got raw_logprobs\. Start it with `--logprobs-mode processed_logp"
    ):
        ask(VLLMEngine(server=server.url), tiny_model())
    server.dev = False
    with pytest.raises(
        MisconfigurationException, match=r"got 404 from /server_info\. Start it with VLLM_SERVER_DEV_MODE=1"
    ):
        ask(VLLMEngine(server=server.url), tiny_model())


def test_a_server_that_fails(server):
    engine, model = VLLMEngine(server=server.url), tiny_model()
    server.reset = False
    with pytest.raises(RuntimeError, match="to take new weights, but got: it kept the keys and values of the old"):
        ask(engine, model)
    server.reset = True
    ask(engine, model)
    assert (
        sum(path == "/collective_rpc" for path, _ in server.calls) == 2
    )  # nobody knows what it held after the failure
    with pytest.raises(RuntimeError, match=r"/v1/completions answered 500: .*no room"):
        ask(engine, model, [[7], [8] * 13])
    server.post = lambda path, body: (
        200, {"choices": [{"index": 0, "token_ids": [60, 61], "logprobs": {"token_logprobs": [-1, -1]}}]},
    )  # fmt: skip
    with pytest.raises(
        RuntimeError, match=r"end with an end token or after 8 tokens, .* but got 2 tokens \[60, 61\] and 2 log"
    ):
        ask(engine, model)


def test_the_order_of_things():
    calls = []

    class Told(vllm_engine.Sampler):
        max_model_len = 64
        wake = lambda self: calls.append("wake")  # noqa: E731
        wake_cache = lambda self: calls.append("wake cache")  # noqa: E731
        sleep = lambda self: calls.append("sleep")  # noqa: E731

        def load(self, model):
            calls.append("load")

        def complete(self, prompts, n, sampling, ends, seed):
            calls.append("complete")
            return enumerate([vllm_engine.Completion([EOS], [-1.0])] * n for _ in prompts)

    engine, model = VLLMEngine(server="http://localhost:1"), tiny_model()
    engine.sampler = Told()
    ask(engine, model)
    ask(engine, model)
    first, second = ["wake", "load", "wake cache", "complete", "sleep"], ["wake", "wake cache", "complete", "sleep"]
    assert calls == first + second
    del calls[:]
    with engine.session(model):
        ask(engine, model)
        ask(engine, model)
    assert calls == ["wake", "wake cache", "complete", "complete", "sleep"]
    with pytest.raises(KeyError), engine.session(model):
        raise KeyError
    assert calls[-1] == "sleep"


def test_what_vllm_cannot_do(server):
    engine, model = VLLMEngine(server=server.url), tiny_model()
    with pytest.raises(ValueError, match=r"temperature of at least 0\.01 for vLLM, .* but got 0\.001"):
        ask(engine, model, temperature=0.001)
    with pytest.raises(ValueError, match=r"`max_model_len` to be at least 60 \+ 8, .* but got 64"):
        ask(engine, model, [[7] * 60])
