"""Rollouts through vLLM: in this process, on the student's devices, or on a server (``vllm serve``) somewhere else.

What vLLM needs to be right here, and does not do by itself: the student's weights after every change, an empty prefix cache
with them, log-probabilities of the distribution that is sampled from, and seeds that come from the run's.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pgpo_lightning.core.seeding import seeded
from pgpo_lightning.core.settings import Count, Positive, PositiveFraction, Text, checked
from pgpo_lightning.core.types import Question, Rollout
from pgpo_lightning.models.loading import Dtype
from pgpo_lightning.rollout.engine import Engine, Sampling, end_tokens
from pgpo_lightning.rollout.weight_sync import checksum

FIXED = ("model", "runner", "skip_tokenizer_init", "logprobs_mode", "generation_config")  # arguments of `vllm.LLM`
LOWEST_TEMPERATURE = 0.01  # below it vLLM samples at another temperature than it is told


@dataclass
class Completion:
    """One response as vLLM gives it: token ids and their log-probabilities (nats)."""

    token_ids: list[int]
    log_probs: list[float]


class Sampler(ABC):
    """Where vLLM runs."""

    max_model_len: int
    """Most tokens of prompt and response together."""

    holds: list[int] | None = None
    """The :func:`~pgpo_lightning.rollout.weight_sync.checksum` of the weights that it samples from, or ``None`` if that is
    not known."""

    @abstractmethod
    def load(self, model: PreTrainedModel) -> None:
        """Take over the student's weights, and forget the keys and values that the old ones left."""

    @abstractmethod
    def complete(
        self, prompts: list[list[int]], seeds: list[int], n: int, sampling: Sampling, ends: list[int]
    ) -> list[list[Completion]]:
        """Return `n` responses to every prompt, end token included."""

    def wake(self) -> None:  # noqa: B027  (nothing to do is what most need)
        """Take back the memory that :meth:`sleep` gave away."""

    def sleep(self) -> None:  # noqa: B027
        """Give memory away until the next step, if asked to."""


@checked
class VLLMEngine(Engine):
    """Samples with vLLM. Needs the extra ``vllm``; a server needs it on its own machine only.

    In this process, the student's weights are handed over in memory; to tensor-parallel workers and to a server they travel
    through a folder. Whether they have changed is read from the weights themselves at every call, so that a resumed run and
    one that was put back to older weights are right as well.

    Seen running on a CPU only. On a GPU the calls are the same, but nothing of it has met one yet, and `enable_sleep_mode`
    and a `tensor_parallel_size` above 1 have not run at all.

    Args:
        server: Address of a running ``vllm serve``, such as ``http://localhost:8000``, started as docs/vllm.md says; null runs
            vLLM in this process. One run per server.
        server_timeout: Seconds to wait for the server to come up.
        weights_folder: Where weights are put down for a server, which must see the folder under the same path, or for
            tensor-parallel workers; by default a temporary folder of this machine.
        gpu_memory_utilization: Share of the GPU's memory for vLLM's weights, keys and values (in this process).
        tensor_parallel_size: GPUs that one copy of the model is spread over (in this process).
        max_model_len: Most tokens of prompt and response together; null takes the model's positions (in this process).
        enforce_eager: No compilation and no CUDA graphs: starts sooner, samples slower (in this process).
        dtype: What vLLM computes in; null takes what the student computes in, so that both mean the same policy as nearly as
            possible (in this process).
        enable_sleep_mode: Give vLLM's memory to the training step between rollouts (in this process).
        options: Further arguments of ``vllm.LLM`` (in this process).

    Raises:
        MisconfigurationException: If vLLM is to run in this process and is not installed.
        ValueError: If a setting is out of range or contradicts another; names the field.
    """

    has_weights = True

    def __init__(
        self,
        server: Text | None = None,
        server_timeout: Positive = 240.0,
        weights_folder: Text | None = None,
        gpu_memory_utilization: PositiveFraction = 0.3,
        tensor_parallel_size: Count = 1,
        max_model_len: Count | None = None,
        enforce_eager: bool = False,
        dtype: Dtype | None = None,
        enable_sleep_mode: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        local = {
            "gpu_memory_utilization": gpu_memory_utilization,
            "tensor_parallel_size": tensor_parallel_size,
            "max_model_len": max_model_len,
            "enforce_eager": enforce_eager,
            "dtype": dtype,
            "enable_sleep_mode": enable_sleep_mode,
            "options": options,
        }
        _check(server, local)
        self.server, self.server_timeout, self.weights_folder = server, server_timeout, weights_folder
        self.local = local
        self.sampler: Sampler | None = None

    def generate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: list[Question],
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
    ) -> list[Rollout]:
        """See :meth:`Engine.generate`.

        With a `top_p` below 1 the log-probabilities are those of the nucleus, the distribution that is sampled from then.

        Raises:
            ValueError: If vLLM cannot sample so: too cold, or more tokens than it has room for.
            RuntimeError: If a response came back incomplete, or the server does not do what it is asked to.
        """
        if sampling.temperature < LOWEST_TEMPERATURE:
            raise ValueError(
                f"Expected a temperature of at least {LOWEST_TEMPERATURE} for vLLM, which silently takes that for anything "
                f"colder, but got {sampling.temperature}."
            )
        # One for every prompt, of its first response; vLLM counts on for the others, within 64 bits.
        drawn = torch.randint(2**62, (len(prompts),)).tolist() if sampling.seeds is None else sampling.seeds
        seeds = [seed % 2**62 for seed in drawn]
        ends = end_tokens(model, tokenizer)
        dtype = computes_in(model)
        with _undisturbed(next(model.parameters()).device.type):
            if self.sampler is None:
                self.sampler = self._start(model, dtype)
            longest = max(map(len, prompts), default=0)
            if longest + sampling.max_tokens > self.sampler.max_model_len:
                raise ValueError(
                    f"Expected `max_model_len` to be at least {longest} + {sampling.max_tokens}, the tokens of a prompt and of "
                    f"the longest response to it, but got {self.sampler.max_model_len}."
                )
            self.sampler.wake()
            self.hand_over(model)
            answers = self.sampler.complete(prompts, seeds, n, sampling, sorted(ends))
            self.sampler.sleep()
        return [
            _rollout(question, prompt, answer, tokenizer, sampling, ends)
            for question, prompt, completions in zip(questions, prompts, answers, strict=True)
            for answer in completions
        ]

    def hand_over(self, model: PreTrainedModel) -> None:
        """Give the sampler the student's weights, if it has others."""
        now = checksum(model)
        if self.sampler.holds != now:
            self.sampler.holds = None  # what it has if this fails, nobody knows
            self.sampler.load(model)
            self.sampler.holds = now

    def _start(self, model: PreTrainedModel, dtype: str) -> Sampler:
        if self.server is not None:
            from pgpo_lightning.rollout.vllm_server import ServerSampler

            return ServerSampler(self.server, self.server_timeout, self.weights_folder)
        from pgpo_lightning.rollout.vllm_local import LocalSampler

        return LocalSampler(model, self.weights_folder, self.local | {"dtype": self.local["dtype"] or dtype})


def computes_in(model: PreTrainedModel) -> str:
    """Return the name of the type that the model computes in here and now: that of autocast, or else of its weights."""
    parameter = next(model.parameters())
    device = parameter.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameter.dtype
    return str(dtype).removeprefix("torch.")


def _check(server: str | None, local: dict[str, Any]) -> None:
    ours = {*inspect.signature(VLLMEngine).parameters, *FIXED}
    if taken := sorted(ours & {*(local["options"] or {})}):
        raise ValueError(f"Expected `options` to hold nothing that is set elsewhere, but got {', '.join(taken)}.")
    if server is None:
        if find_spec("vllm") is None:
            raise MisconfigurationException(
                "Expected vLLM to be installed for `engine: VLLMEngine` without a `server`, but it is not: "
                "pip install 'pgpo-lightning[vllm]'"
            )
        return
    if not server.startswith(("http://", "https://")):
        raise ValueError(f"Expected `server` to be an address such as http://localhost:8000, but got {server!r}.")
    defaults = inspect.signature(VLLMEngine).parameters
    if changed := [name for name, value in local.items() if value != defaults[name].default]:
        raise ValueError(
            f"Expected `{changed[0]}` to be left alone with a `server`, which was started with settings of its own, but got "
            f"{local[changed[0]]}."
        )


def _rollout(
    question: Question,
    prompt: list[int],
    answer: Completion,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    ends: set[int],
) -> Rollout:
    response = answer.token_ids
    finished = bool(response) and response[-1] in ends
    whole = finished or len(response) == sampling.max_tokens
    if not whole or len(answer.log_probs) != len(response) or not ends.isdisjoint(response[:-1]):
        raise RuntimeError(
            f"Expected vLLM's response to end with an end token or after {sampling.max_tokens} tokens, with a log-probability "
            f"for each, but got {len(response)} tokens {response[-8:]} and {len(answer.log_probs)} log-probabilities."
        )
    return Rollout(
        question=question,
        prompt_ids=prompt,
        response_ids=response,
        log_probs=torch.tensor(answer.log_probs, dtype=torch.float32),
        text=tokenizer.decode(response, skip_special_tokens=True),
        finished=finished,
    )


@contextmanager
def _undisturbed(device: str) -> Iterator[None]:
    """Keep vLLM and the training step out of each other's global state.

    Starting vLLM seeds every global generator; autocast and half precision as default would reach into its kernels; and
    weights that are made while Lightning validates could never be written again.
    """
    before = torch.get_default_dtype()
    with seeded("vllm"), torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
