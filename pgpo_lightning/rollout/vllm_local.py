"""vLLM in this process."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import PreTrainedModel

from pgpo_lightning.core.seeding import seeded
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.models.lora import write_current_adapter
from pgpo_lightning.rollout.engine import Sampling
from pgpo_lightning.rollout.vllm_engine import SEEDS, Completion, Sampler
from pgpo_lightning.rollout.weight_sync import checksum, drained, stream_weights, write_config, write_weights

T = TypeVar("T")


class LocalSampler(Sampler):
    """vLLM in the student's process and on its device; with several ranks one in each, or one for several neighbours.

    It starts without weights, which :meth:`load` streams into it. With several ranks, all of them must start it together.

    Args:
        model: The student.
        folder: Parent of the folder for configuration and weights; by default a temporary folder.
        settings: The settings of :class:`~pgpo_lightning.rollout.vllm_engine.VLLMEngine` for this process.

    Raises:
        MisconfigurationException: If the ranks cannot be divided into groups of `tensor_parallel_size`.
    """

    def __init__(self, model: PreTrainedModel, folder: str | None, settings: dict[str, Any]) -> None:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        shared = settings["tensor_parallel_size"]
        if ranks > 1 and ranks % shared:
            raise MisconfigurationException(
                f"Expected `tensor_parallel_size` to divide the {ranks} ranks, but got {shared}. Set it to 1, or another divisor."
            )
        # vLLM must not start a process of its own, so that weights can be passed in memory. It reads these variables late.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing leaves the machine
        import vllm

        self.params = vllm.SamplingParams
        self.group = RankGroup(shared) if ranks > 1 else RankGroup(1)
        self.in_workers = ranks == 1 and shared > 1  # processes of their own, which vLLM starts
        self.dozes, self.asleep = settings["enable_sleep_mode"], False
        self.dtype: torch.dtype = getattr(torch, settings["dtype"])
        self.temporary = tempfile.TemporaryDirectory(dir=folder, prefix="pgpo-weights-")
        self.folder = Path(self.temporary.name)
        write_config(model, self.folder)
        options = dict(settings["options"] or {})
        if next(model.parameters()).device.type == "cpu":
            # For a seeded request with a chunked prompt vLLM rewinds its generator, which a CPU's generator does not support.
            options.setdefault("enable_chunked_prefill", False)
        if ranks > 1:
            options["distributed_executor_backend"] = "external_launcher"  # the ranks are its workers
        arguments = {name: value for name, value in settings.items() if name not in ("options", "lora")}
        self.base: list[int] | None = None  # checksum of the base weights that it has, if an adapter is sent alone
        self.adapter: partial[Any] | None = None  # makes what names it in a request
        if settings["lora"] == "adapter":
            from vllm.lora.request import LoRARequest

            self.adapter = partial(LoRARequest, "student", 1, str(self.folder / "adapter"))
            rank = model.peft_config["default"].r  # type: ignore[attr-defined]
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _room(rank)}
        _quiet()
        with _rank_variables() if ranks > 1 else nullcontext():
            self.llm = vllm.LLM(
                str(self.folder),
                runner="generate",
                skip_tokenizer_init=True,  # inputs and outputs are token ids
                load_format="dummy",
                logprobs_mode="processed_logprobs",  # of the distribution sampled from, after the temperature
                generation_config="vllm",  # ignores sampling settings of the model's files
                **arguments,
                **options,
            )
        self.max_model_len = self.llm.llm_engine.model_config.max_model_len

    def load(self, model: PreTrainedModel) -> None:
        """See :meth:`~pgpo_lightning.rollout.vllm_engine.Sampler.load`."""
        if self.adapter is None:
            self._load_weights(model)
        else:
            base = checksum(model, adapted=False)
            if self.base != base:
                self.base = None  # unknown if the next line fails
                self._load_weights(model)
                self.base = base
            write_current_adapter(model, self.folder / "adapter", self.dtype)
            self.llm.llm_engine.add_lora(self.adapter(load_inplace=True))
        self._forget()

    def _load_weights(self, model: PreTrainedModel) -> None:
        merges = self.adapter is None
        if self.in_workers:  # tensors cannot be passed to other processes in a call
            write_weights(model, self.folder, self.dtype, merges)
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(self.folder)})
        else:
            # The model's `load_weights` is not enough: on a CPU the matrices are packed copies, which only this call renews.
            with drained(stream_weights(model, self.dtype, merges)) as weights:
                self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

    def _forget(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("Expected vLLM to drop its keys and values, but it did not.")

    def complete(
        self, prompts: list[list[int]], n: int, sampling: Sampling, ends: list[int], seed: int
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See :meth:`~pgpo_lightning.rollout.vllm_engine.Sampler.complete`."""
        seeds: list[int | None] = [*sampling.seeds] if sampling.seeds else [None] * len(prompts)
        params = [
            self.params(
                n=n,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=None if each is None else each % SEEDS,  # of the first response; vLLM increments it for the others
                logprobs=0,  # of the sampled token only
                stop_token_ids=ends,
                ignore_eos=True,  # only `stop_token_ids` end a response
                detokenize=False,
            )
            for each in seeds
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        everything, seed, own = self.group.joined([*zip(requests, params, strict=True)], seed)
        if sampling.seeds is None:
            self._forget()  # cached prompts change the order in which random numbers are drawn
        with seeded("vllm", seed):
            asked = [list(each) for each in zip(*everything, strict=True)]
            adapter = None if self.adapter is None else self.adapter()
            answers = self.llm.generate(*asked, use_tqdm=False, lora_request=adapter) if asked else []
        return enumerate([_completion(output) for output in answer.outputs] for answer in answers[own])

    def wake(self) -> None:
        """See :meth:`~pgpo_lightning.rollout.vllm_engine.Sampler.wake`."""
        if self.asleep:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # vLLM maps memory by itself, which PyTorch's allocator would still hold
            self.llm.wake_up(tags=["weights"])

    def wake_cache(self) -> None:
        """See :meth:`~pgpo_lightning.rollout.vllm_engine.Sampler.wake_cache`."""
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False

    def sleep(self) -> None:
        """See :meth:`~pgpo_lightning.rollout.vllm_engine.Sampler.sleep`."""
        if self.dozes:
            self.llm.sleep(
                level=2
            )  # drops the weights; level 1 would move them to the host for the next step to overwrite
            self.asleep, self.holds, self.base = True, None, None


class RankGroup:
    """Neighbouring ranks that share one copy of the model: each calls vLLM with the questions of all.

    Args:
        size: Number of ranks that share a copy.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def joined(self, local: list[T], seed: int) -> tuple[list[T], int, slice]:
        """Return the items of all ranks of the group, the seed of its first rank, and where this rank's own items are."""
        if self.size == 1:
            return local, seed, slice(None)
        first = dist.get_rank() // self.size * self.size
        group = gather((local, seed))[first : first + self.size]
        start = sum(len(items) for items, _ in group[: dist.get_rank() - first])
        return [item for items, _ in group for item in items], group[0][1], slice(start, start + len(local))


@contextmanager
def _rank_variables() -> Iterator[None]:
    """Set the variables in which vLLM looks for the ranks, and which Lightning does not set everywhere."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    wanted = {"RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size(), "LOCAL_RANK": local}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: str(value) for name, value in wanted.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _room(rank: int) -> int:
    """Return the smallest rank of an adapter that vLLM makes room for and that is large enough."""
    from vllm.config.lora import MaxLoRARanks

    ranks: tuple[int, ...] = get_args(MaxLoRARanks)
    if rank > max(ranks):
        raise MisconfigurationException(
            f"Expected `lora.r` to be at most {max(ranks)}, which is all that vLLM takes with `engine.lora` adapter, but got "
            f"{rank}. Set `engine.lora` to merged."
        )
    return min(each for each in ranks if each >= rank)


def _quiet() -> None:
    """Suppress messages that vLLM logs at every start or weight sync and that do not apply here.

    They are filters, because vLLM resets other logging settings when it starts.
    """
    chatter = {
        "vllm.renderers.base": "Chat template warmup failed",  # there is no tokenizer
        # Its table of angles is not a weight. The same message about another layer is a failed weight sync.
        "vllm.model_executor.model_loader.reload.layerwise": "RotaryEmbedding: Failed to load weights",
    }
    for name, message in chatter.items():
        logging.getLogger(name).addFilter(partial(_lacks, message))


def _lacks(message: str, record: logging.LogRecord) -> bool:
    return message not in record.getMessage()


def _completion(output: Any) -> Completion:
    token_ids = list(output.token_ids)
    return Completion(token_ids, [step[token].logprob for step, token in zip(output.logprobs, token_ids, strict=True)])
