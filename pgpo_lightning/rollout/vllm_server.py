"""vLLM on a server, over HTTP."""

import json
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import PreTrainedModel

from pgpo_lightning.core.seeding import derive_seed
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.rollout.engine import Sampling
from pgpo_lightning.rollout.vllm_engine import SEEDS, Completion, Sampler
from pgpo_lightning.rollout.weight_sync import write_weights

_PATIENCE = 3600  # timeout of a request (seconds)
_AT_ONCE = 64  # maximum concurrent requests; each is one prompt with all of its responses


class ServerSampler(Sampler):
    """A running ``vllm serve``, with VLLM_SERVER_DEV_MODE=1 and ``--logprobs-mode processed_logprobs``.

    With several ranks the first writes the weights and notifies the server, while the others wait.

    Args:
        url: Address of the server.
        timeout: Seconds to wait for the server to become available.
        folder: Folder for the weights, which the server must see under the same path.
        dtype: Type of the weights in the folder.

    Raises:
        MisconfigurationException: If the server is not available, or was not started with these settings.
    """

    def __init__(self, url: str, timeout: float, folder: str | None, dtype: str) -> None:
        self.url = url.rstrip("/")
        self._wait(timeout)
        served = self._ask("/v1/models")["data"][0]
        self.name, self.max_model_len = served["id"], served["max_model_len"]
        try:
            config = self._ask("/server_info?config_format=json")["vllm_config"]
        except urllib.error.HTTPError as error:
            raise MisconfigurationException(
                f"Expected the vLLM server at {self.url} to take new weights, but got {error.code} from /server_info. Start it "
                "with VLLM_SERVER_DEV_MODE=1."
            ) from error
        if (mode := config["model_config"]["logprobs_mode"]) != "processed_logprobs":
            raise MisconfigurationException(
                f"Expected the vLLM server at {self.url} to return the log-probabilities that it samples with, but got {mode}. "
                "Start it with `--logprobs-mode processed_logprobs`."
            )
        if folder is None:
            self.temporary = tempfile.TemporaryDirectory(prefix="pgpo-weights-")
        self.folder = Path(self.temporary.name if folder is None else folder)
        self.dtype: torch.dtype = getattr(torch, dtype)

    def load(self, model: PreTrainedModel) -> None:
        """See :meth:`~pgpo_lightning.rollout.vllm_engine.Sampler.load`."""
        failure = ""
        try:
            write_weights(model, self.folder, self.dtype)
            if not dist.is_initialized() or dist.get_rank() == 0:
                self._reload()
        except Exception as error:  # sent to the other ranks, which would otherwise wait forever
            failure = f"{error}"
        if failures := [each for each in gather(failure) if each]:
            raise RuntimeError(f"Expected the vLLM server at {self.url} to take new weights, but got: {failures[0]}")

    def _reload(self) -> None:
        self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}})
        if not self._ask("/reset_prefix_cache", {})["success"]:
            raise RuntimeError(
                "it kept the keys and values of the old weights, because other requests are still running"
            )

    def complete(
        self, prompts: list[list[int]], n: int, sampling: Sampling, ends: list[int], seed: int
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See :meth:`~pgpo_lightning.rollout.vllm_engine.Sampler.complete`."""
        # The server takes missing values from the model's generation_config.json, so all are stated.
        common = {
            "model": self.name, "n": n, "max_tokens": sampling.max_tokens, "temperature": sampling.temperature,
            "top_p": sampling.top_p, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "logprobs": 0, "return_token_ids": True, "stop_token_ids": ends, "ignore_eos": True,
        }  # fmt: skip

        seeds = sampling.seeds or [derive_seed("vllm", seed, i) for i in range(len(prompts))]

        def one(request: tuple[list[int], int]) -> list[Completion]:
            prompt, seed = request  # one request per prompt, because all prompts of a request have the same seed
            choices = self._ask("/v1/completions", common | {"prompt": prompt, "seed": seed % SEEDS})["choices"]
            choices.sort(key=lambda choice: choice["index"])
            return [Completion(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]

        with ThreadPoolExecutor(max(1, min(_AT_ONCE, len(prompts)))) as pool:
            requests = {pool.submit(one, each): i for i, each in enumerate(zip(prompts, seeds, strict=True))}
            try:
                for request in as_completed(requests):
                    yield requests[request], request.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _wait(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._ask("/health")
                return
            except OSError as error:  # refused, not found, not ready
                if time.monotonic() > deadline:
                    raise MisconfigurationException(
                        f"Expected a vLLM server at {self.url} within {timeout:g} seconds (`server_timeout`), but got: {error}"
                    ) from error
                time.sleep(0.5)

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:  # noqa: S310  (the scheme was checked)
                text = answer.read()
        except urllib.error.HTTPError as error:
            if body is not None:
                raise RuntimeError(
                    f"{path} answered {error.code}: {error.read()[:500].decode(errors='replace')}"
                ) from error
            raise
        return json.loads(text) if text.strip() else None
