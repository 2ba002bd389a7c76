"""vLLM in this process."""

import logging
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import PreTrainedModel

from pgpo_lightning.rollout.engine import Sampling
from pgpo_lightning.rollout.vllm_engine import Completion, Sampler
from pgpo_lightning.rollout.weight_sync import checkpoint_weights, checksum, write_weights


class LocalSampler(Sampler):
    """vLLM in the student's process and on its device.

    Args:
        model: The student, whose weights it starts with.
        folder: Parent of the folder for weights; by default a temporary folder.
        settings: The settings of :class:`~pgpo_lightning.rollout.vllm_engine.VLLMEngine` for this process.

    Raises:
        MisconfigurationException: If several processes train together.
    """

    def __init__(self, model: PreTrainedModel, folder: str | None, settings: dict[str, Any]) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise MisconfigurationException(
                "Expected one process for vLLM without a `server`, but got "
                f"{dist.get_world_size()}. Start a server and give its address as `engine.init_args.server`."
            )
        # vLLM must not start a process of its own, so that weights can be passed in memory. It reads these variables late.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing leaves the machine
        import vllm

        self.params = vllm.SamplingParams
        self.spread = settings["tensor_parallel_size"] > 1
        self.dozes, self.asleep = settings["enable_sleep_mode"], False
        self.temporary = tempfile.TemporaryDirectory(dir=folder, prefix="pgpo-weights-")
        self.folder = Path(self.temporary.name)
        write_weights(model, self.folder)
        options = dict(settings["options"] or {})
        if next(model.parameters()).device.type == "cpu":
            # For a seeded request with a chunked prompt vLLM rewinds its generator, which a CPU's generator does not support.
            options.setdefault("enable_chunked_prefill", False)
        arguments = {name: value for name, value in settings.items() if name != "options"}
        _quiet()
        self.llm = vllm.LLM(
            str(self.folder),
            runner="generate",
            skip_tokenizer_init=True,  # inputs and outputs are token ids
            logprobs_mode="processed_logprobs",  # of the distribution sampled from, after the temperature
            generation_config="vllm",  # ignores sampling settings of the model's files
            **arguments,
            **options,
        )
        self.max_model_len = self.llm.llm_engine.model_config.max_model_len
        self.holds = checksum(model)
        if not self.spread:
            (self.folder / "model.safetensors").unlink()

    def load(self, model: PreTrainedModel) -> None:
        """See :meth:`~pgpo_lightning.rollout.vllm_engine.Sampler.load`."""
        if self.spread:  # tensors cannot be passed to other processes in a call
            write_weights(model, self.folder)
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(self.folder)})
        else:
            # The model's `load_weights` is not enough: on a CPU the matrices are packed copies, which only this call renews.
            weights = iter(checkpoint_weights(model).items())
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("Expected vLLM to drop the keys and values of the old weights, but it did not.")

    def complete(
        self, prompts: list[list[int]], seeds: list[int], n: int, sampling: Sampling, ends: list[int]
    ) -> list[list[Completion]]:
        """See :meth:`~pgpo_lightning.rollout.vllm_engine.Sampler.complete`."""
        params = [
            self.params(
                n=n,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=seed,  # of the first response; vLLM increments it for the others
                logprobs=0,  # of the sampled token only
                stop_token_ids=ends,
                ignore_eos=True,  # only `stop_token_ids` end a response
                detokenize=False,
            )
            for seed in seeds
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = self.llm.generate(requests, params, use_tqdm=False)
        return [[_completion(output) for output in answer.outputs] for answer in answers]

    def wake(self) -> None:
        """See :meth:`~pgpo_lightning.rollout.vllm_engine.Sampler.wake`."""
        if self.dozes and self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def sleep(self) -> None:
        """See :meth:`~pgpo_lightning.rollout.vllm_engine.Sampler.sleep`."""
        if self.dozes:
            self.llm.sleep(level=1)  # keeps the weights in host memory; level 2 would drop them
            self.asleep = True


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
