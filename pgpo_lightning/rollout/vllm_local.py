"""vLLM in this process."""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import PreTrainedModel

from pgpo_lightning.rollout.engine import Sampling
from pgpo_lightning.rollout.vllm_engine import Completion, Sampler
from pgpo_lightning.rollout.weight_sync import checkpoint_weights, checksum, write_weights


class LocalSampler(Sampler):
    """An engine that shares process and device with the student.

    Args:
        model: The student, whose weights it starts with.
        folder: Where weights are put down; by default a temporary folder.
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
        # Within this process, so that weights go over in memory. vLLM reads its variables when they are needed.
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
            # For a request with a seed whose prompt is run in parts, vLLM turns its generator back, which those of a CPU cannot.
            options.setdefault("enable_chunked_prefill", False)
        arguments = {name: value for name, value in settings.items() if name != "options"}
        _quiet()
        self.llm = vllm.LLM(
            str(self.folder),
            runner="generate",
            skip_tokenizer_init=True,  # token ids go in and come out
            logprobs_mode="processed_logprobs",  # of the distribution sampled from: behind the temperature
            generation_config="vllm",  # no sampling settings of the model's own
            **arguments,
            **options,
        )
        self.max_model_len = self.llm.llm_engine.model_config.max_model_len
        self.holds = checksum(model)
        if not self.spread:
            (self.folder / "model.safetensors").unlink()

    def load(self, model: PreTrainedModel) -> None:
        """See :meth:`~pgpo_lightning.rollout.vllm_engine.Sampler.load`."""
        if self.spread:  # tensors do not travel to other processes in a call
            write_weights(model, self.folder)
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(self.folder)})
        else:
            # Not the model's `load_weights` alone: on a CPU the matrices are packed copies, which only this makes anew.
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
                seed=seed,  # of the first response; vLLM counts on for the others
                logprobs=0,  # the sampled token's alone
                stop_token_ids=ends,
                ignore_eos=True,  # these end a response and nothing else does
                detokenize=False,
            )
            for seed in seeds
        ]
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = self.llm.generate(asked, params, use_tqdm=False)
        return [[_completion(output) for output in answer.outputs] for answer in answers]

    def wake(self) -> None:
        """See :meth:`~pgpo_lightning.rollout.vllm_engine.Sampler.wake`."""
        if self.dozes and self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def sleep(self) -> None:
        """See :meth:`~pgpo_lightning.rollout.vllm_engine.Sampler.sleep`."""
        if self.dozes:
            self.llm.sleep(level=1)  # keeps the weights, in the host's memory: level 2 would wake up without any
            self.asleep = True


def _quiet() -> None:
    """Leave out what vLLM says at every start or hand-over and means nothing here. Filters outlive its own set-up of logging."""
    chatter = {
        "vllm.renderers.base": "Chat template warmup failed",  # there is no tokenizer
        # Its table of angles is no weight. The same message about another layer is a hand-over that went wrong.
        "vllm.model_executor.model_loader.reload.layerwise": "RotaryEmbedding: Failed to load weights",
    }
    for name, message in chatter.items():
        logging.getLogger(name).addFilter(lambda record, message=message: message not in record.getMessage())


def _completion(output: Any) -> Completion:
    token_ids = list(output.token_ids)
    return Completion(token_ids, [step[token].logprob for step, token in zip(output.logprobs, token_ids, strict=True)])
