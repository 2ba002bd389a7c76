"""Sampling with vLLM: in this process, on the student's devices, or on a separate server (``vllm serve``).

On-policy training needs four things that vLLM does not do by itself: a weight sync after every change of the student, an empty
prefix cache afterwards, log-probabilities of the distribution that is sampled from, and seeds derived from the run's seed.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pgpo_lightning.core.seeding import seeded
from pgpo_lightning.core.settings import Count, Positive, PositiveFraction, Text, checked
from pgpo_lightning.core.types import Question, Rollout
from pgpo_lightning.models.adapter import adapter
from pgpo_lightning.models.loading import Dtype, decode
from pgpo_lightning.rollout.engine import Engine, Sampling, end_tokens
from pgpo_lightning.rollout.weight_sync import checksum

FIXED = ("model", "runner", "skip_tokenizer_init", "load_format", "logprobs_mode", "generation_config")  # of `vllm.LLM`
SEEDS = 2**62  # of a prompt's first response; vLLM increments it for the others, within 64 bits
LOWEST_TEMPERATURE = 0.01  # below it vLLM silently samples at a higher temperature


@dataclass
class Completion:
    """One response of vLLM.

    Attributes:
        token_ids: Tokens of the response, end token included.
        log_probs: Log-probability of each token (nats).
    """

    token_ids: list[int]
    log_probs: list[float]


class Sampler(ABC):
    """A running vLLM, in this process or on a server."""

    max_model_len: int
    """Maximum tokens of prompt and response together."""

    holds: list[int] | None = None
    """The :func:`~pgpo_lightning.rollout.weight_sync.checksum` of its weights, or ``None`` if they are unknown."""

    @abstractmethod
    def load(self, model: PreTrainedModel) -> None:
        """Load the student's weights, and drop the keys and values computed with the old ones."""

    @abstractmethod
    def complete(
        self, prompts: list[list[int]], n: int, sampling: Sampling, ends: list[int], seed: int
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Return the number of every prompt and its `n` responses, end token included, those that are finished first.

        Args:
            prompts: Token ids.
            n: Responses per prompt.
            sampling: Sampling settings. Without `seeds` all random numbers are a function of `seed`.
            ends: The tokens that end a response.
            seed: Of the call.
        """

    def wake(self) -> None:  # noqa: B027  (optional)
        """Allocate the memory of the weights again that :meth:`sleep` released."""

    def wake_cache(self) -> None:  # noqa: B027
        """Allocate the memory of keys and values again, after the weights are loaded."""

    def sleep(self) -> None:  # noqa: B027
        """Release memory until the next session, if configured; weights are lost, and :attr:`holds` is ``None``."""


@checked
class VLLMEngine(Engine):
    """Samples with vLLM. Needs the extra ``vllm``, or with a server vLLM on the server's machine only.

    Under DDP and FSDP2 every rank has a vLLM of its own in its process. The weights are streamed into it layer by layer, in the
    type that it computes in, and an adapter is merged on the way, or sent alone (`lora`). For a server, and for tensor-parallel
    workers of a run with one process, they are written into a folder. A checksum of the weights decides in every session
    whether a sync is needed, so resumed runs and runs that were reset to older weights are correct too.

    In training all random numbers of a call follow from one seed. Evaluation has a seed per question, which vLLM samples slower.

    Tested on CPU only; untested on GPU, where the calls are the same. `enable_sleep_mode` has never been run.

    Args:
        server: Address of a running ``vllm serve``, such as ``http://localhost:8000``, started as described in docs/vllm.md.
            Null runs vLLM in this process. One run per server.
        server_timeout: Seconds to wait for the server to become available.
        weights_folder: Folder for the weights of a server, which must see it under the same path, or of tensor-parallel workers.
            By default a temporary folder of this machine.
        gpu_memory_utilization: Fraction of the GPU's memory for vLLM's weights, keys and values (in this process).
        tensor_parallel_size: Number of GPUs that one copy of the model is distributed over. With several ranks, so many
            neighbours share a copy, and each samples its own questions with it (in this process).
        max_model_len: Maximum tokens of prompt and response together. Null takes the model's positions (in this process).
        enforce_eager: No compilation and no CUDA graphs: starts faster, samples slower (in this process).
        dtype: Type that vLLM computes in. Null takes the student's, which keeps the train-inference mismatch small (in this
            process).
        enable_sleep_mode: Release vLLM's memory during the training step, its weights included: they are streamed anew in every
            session (in this process).
        lora: What a student with an adapter sends: ``merged`` is all weights, with the adapter in them; ``adapter`` is the base
            weights once, and then the adapter's matrices alone, which vLLM multiplies beside the base (in this process).
        options: Further arguments of ``vllm.LLM`` (in this process).

    Raises:
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
        lora: Literal["merged", "adapter"] = "merged",
        options: dict[str, Any] | None = None,
    ) -> None:
        local: dict[str, Any] = {
            "gpu_memory_utilization": gpu_memory_utilization,
            "tensor_parallel_size": tensor_parallel_size,
            "max_model_len": max_model_len,
            "enforce_eager": enforce_eager,
            "dtype": dtype,
            "enable_sleep_mode": enable_sleep_mode,
            "lora": lora,
            "options": options,
        }
        _check(server, local)
        self.server, self.server_timeout, self.weights_folder = server, server_timeout, weights_folder
        self.local, self.shared = local, tensor_parallel_size > 1
        self.hands_over = server is not None  # `vllm.LLM` returns all responses at the end
        self.sampler: Sampler | None = None
        self._in_session = False

    def check(self) -> None:
        """See :meth:`Engine.check`: vLLM in this process has to be installed."""
        if self.server is None and find_spec("vllm") is None:
            raise MisconfigurationException(
                "Expected vLLM to be installed for `engine: VLLMEngine` without a `server`, but it is not: "
                "pip install 'pgpo-lightning[vllm]'"
            )

    def prepare(self, model: PreTrainedModel, longest: int) -> None:
        """See :meth:`Engine.prepare`: `lora` has an effect on a student with an adapter only."""
        if self.local["lora"] == "adapter" and not adapter(model):
            raise MisconfigurationException(
                "Expected a student with `lora`, because `engine.lora` is adapter, but all weights are trained. Set "
                "`engine.lora` to merged."
            )

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

        With a `top_p` below 1 the log-probabilities are those of the nucleus, the distribution that is sampled from.

        Raises:
            ValueError: If the temperature is too low for vLLM, or prompt and response can exceed its maximum length.
            RuntimeError: If a response is incomplete, or a request to the server fails.
        """
        if sampling.temperature < LOWEST_TEMPERATURE:
            raise ValueError(
                f"Expected a temperature of at least {LOWEST_TEMPERATURE} for vLLM, which silently uses that value for "
                f"lower ones, but got {sampling.temperature}."
            )
        ends = end_tokens(model, tokenizer)
        seed = int(torch.randint(2**62, (1,)))
        with nullcontext() if self._in_session else self.session(model), _isolated(model):
            sampler = self.sampler
            assert sampler is not None  # noqa: S101  (for the type checker: the session started it)
            longest = max(map(len, prompts), default=0)
            if longest + sampling.max_tokens > sampler.max_model_len:
                raise ValueError(
                    f"Expected `max_model_len` to be at least {longest} + {sampling.max_tokens}, the tokens of a prompt and of "
                    f"the longest response to it, but got {sampler.max_model_len}."
                )
            found: dict[int, list[Rollout]] = {}
            for i, answers in sampler.complete(prompts, n, sampling, sorted(ends), seed):
                given = (questions[i], prompts[i])
                found[i] = [_rollout(*given, answer, tokenizer, sampling, ends) for answer in answers]
                for rollout in found[i]:
                    if self.receive is not None:
                        self.receive(rollout)
        return [rollout for i in range(len(prompts)) for rollout in found[i]]

    @contextmanager
    def session(self, model: PreTrainedModel) -> Iterator[None]:
        """See :meth:`Engine.session`. Starts vLLM at the first call."""
        dtype = computes_in(model)
        with _isolated(model):
            if self.sampler is None:
                self.sampler = self._start(model, dtype)
            self.sampler.wake()
            self.sync_weights(model, self.sampler)
            self.sampler.wake_cache()
        self._in_session = True
        try:
            yield
        finally:
            self._in_session = False
            self.sampler.sleep()

    def check_evaluation(self, batches: list[int]) -> None:
        """See :meth:`Engine.check_evaluation`."""
        if self.server is None and len(batches) > 1 and (min(batches) == 0 or (self.shared and len({*batches}) > 1)):
            what = (
                "as many batches on every rank, because ranks share a copy" if self.shared else "a batch on every rank"
            )
            raise MisconfigurationException(
                f"Expected the evaluation to have {what} with VLLMEngine in this process, but ranks have {batches}. Evaluate "
                "more questions, or set `data.batch_size` lower."
            )

    def sync_weights(self, model: PreTrainedModel, sampler: Sampler) -> None:
        """Load the student's weights into the sampler, unless it has them already."""
        current = checksum(model)
        if sampler.holds != current:
            sampler.holds = None  # unknown if the next line fails
            sampler.load(model)
            sampler.holds = current

    def _start(self, model: PreTrainedModel, dtype: str) -> Sampler:
        if self.server is not None:
            from pgpo_lightning.rollout.vllm_server import ServerSampler

            return ServerSampler(self.server, self.server_timeout, self.weights_folder, dtype)
        from pgpo_lightning.rollout.vllm_local import LocalSampler

        return LocalSampler(model, self.weights_folder, self.local | {"dtype": self.local["dtype"] or dtype})


def computes_in(model: PreTrainedModel) -> str:
    """Return the name of the type that the model currently computes in: that of autocast, or else of its weights."""
    parameter = next(model.parameters())
    device = parameter.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameter.dtype
    return str(dtype).removeprefix("torch.")


def _check(server: str | None, local: dict[str, Any]) -> None:
    reserved = {*inspect.signature(VLLMEngine).parameters, *FIXED}
    if taken := sorted(reserved & {*(local["options"] or {})}):
        raise ValueError(f"Expected `options` to hold nothing that is set elsewhere, but got {', '.join(taken)}.")
    if server is None:
        return
    if not server.startswith(("http://", "https://")):
        raise ValueError(f"Expected `server` to be an address such as http://localhost:8000, but got {server!r}.")
    defaults = inspect.signature(VLLMEngine).parameters
    if changed := [name for name, value in local.items() if value != defaults[name].default]:
        raise ValueError(
            f"Expected `{changed[0]}` to be left at its default with a `server`, which has settings of its own, but got "
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
    complete = finished or len(response) == sampling.max_tokens
    if not complete or len(answer.log_probs) != len(response) or not ends.isdisjoint(response[:-1]):
        raise RuntimeError(
            f"Expected vLLM's response to end with an end token or after {sampling.max_tokens} tokens, with a log-probability "
            f"for each, but got {len(response)} tokens {response[-8:]} and {len(answer.log_probs)} log-probabilities."
        )
    return Rollout(
        question=question,
        prompt_ids=prompt,
        response_ids=response,
        log_probs=torch.tensor(answer.log_probs, dtype=torch.float32),
        text=decode(tokenizer, response, skip_special_tokens=True),
        finished=finished,
    )


@contextmanager
def _isolated(model: PreTrainedModel) -> Iterator[None]:
    """Isolate the global state of vLLM and of the training step.

    Starting vLLM seeds all global generators. Autocast and half precision as default would affect its kernels. Weights that are
    created in Lightning's inference mode during validation could never be overwritten.
    """
    before, device = torch.get_default_dtype(), next(model.parameters()).device.type
    with seeded("vllm"), torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
