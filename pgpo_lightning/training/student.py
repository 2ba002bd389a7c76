"""Loading the student, with every check that needs its weights."""

from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pgpo_lightning.losses.divergence import Divergence
from pgpo_lightning.models.layouts import packings
from pgpo_lightning.models.lm_head import check_head
from pgpo_lightning.models.loading import (
    architecture,
    check_architecture,
    checked_tokenizer,
    known_tokens,
    load_model,
    load_tokenizer,
)
from pgpo_lightning.models.lora import LoRA, add_adapter, check_identity, identity
from pgpo_lightning.models.packing import Packing
from pgpo_lightning.models.quantization import Quantization
from pgpo_lightning.models.recomputation import recompute_activations
from pgpo_lightning.models.shards import gathered
from pgpo_lightning.models.soundness import check_padding
from pgpo_lightning.rollout.engine import Engine
from pgpo_lightning.rollout.prompts import PromptEncoder
from pgpo_lightning.training.configs import ModelConfig
from pgpo_lightning.training.start_up import check_positions, check_top_k


class Student:
    """The model that is trained, as it was loaded.

    Args:
        given: Folder or Hub id, or a model object.
        config: How it is loaded.
        lora: The adapter to train; null for all weights.
        quantization: Quantization of the weights under the adapter.

    Attributes:
        identity: Identity of the model under an adapter, for checkpoints; null without one.
        mesh: Ranks over which weights are sharded while they are read; null where they are read whole.
        packings: Layouts of its sequences, and of those that it teaches itself.
    """

    def __init__(
        self,
        given: str | PreTrainedModel,
        config: ModelConfig,
        lora: LoRA | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        self.given, self.config, self.lora, self.quantization = given, config, lora, quantization
        self.identity: dict[str, Any] | None = None
        self.mesh: DeviceMesh | None = None
        self.packings = (Packing(), Packing())

    @property
    def loading(self) -> dict[str, Any]:
        """The arguments of :func:`~pgpo_lightning.models.loading.load_model`."""
        config = self.config
        return {
            "revision": config.revision,
            "trust_remote_code": config.trust_remote_code,
            "dtype": config.dtype,
            "attn_implementation": config.attn_implementation,
            "quantization": self.quantization,
            "mesh": self.mesh,
        }

    @property
    def name(self) -> str:
        """What was given, or the class of the object that was."""
        return self.given if isinstance(self.given, str) else type(self.given).__name__

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer: the one that was given, else the model's."""
        given, model = self.config.tokenizer, self.given
        if isinstance(given, PreTrainedTokenizerBase):
            return checked_tokenizer(given)
        name = given or (model if isinstance(model, str) else model.config._name_or_path)
        return load_tokenizer(name, self.config.revision, self.config.trust_remote_code)

    def load(
        self,
        encoder: PromptEncoder,
        engine: Engine,
        divergence: Divergence | None,
        longest_prompt: int,
        max_response_length: int,
        padding_free: bool | None,
        seed: int,
    ) -> PreTrainedModel:
        """Load the model, add the adapter, and check what it computes in every layout that it will be run in.

        Args:
            encoder: Learns how many tokens the model knows.
            engine: Is prepared for the model.
            divergence: Divergence of the objective.
            longest_prompt: Most prompt tokens of any forward pass.
            max_response_length: Longest response in tokens.
            padding_free: See :class:`~pgpo_lightning.training.configs.UpdateConfig`.
            seed: Seed of a fresh adapter.

        Raises:
            MisconfigurationException: If model and settings do not go together; names the setting.
        """
        model = load_model(self.given, **self.loading) if isinstance(self.given, str) else self.given
        with gathered(model):
            check_head(model)
        encoder.know_rows(known_tokens(model))
        check_positions(model, longest_prompt, max_response_length)
        check_top_k(model, divergence)
        if self.lora is not None:
            name = self.given if isinstance(self.given, str) else model.config._name_or_path
            self.identity = identity(model, name, self.loading, self.lora)
            add_adapter(model, self.lora, seed)
        if self.config.gradient_checkpointing:
            recompute_activations(model, self.config.selective_ac_option)
        model.train()
        longest = longest_prompt + max_response_length
        with gathered(model):
            check_padding(model, longest)
            self.packings = packings(model, longest, padding_free)
            engine.prepare(model, longest)
        return model

    def saved(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return what a checkpoint needs to tell whether it belongs to a model.

        Args:
            model: As it was loaded.
        """
        generation = model.generation_config.to_json_string(use_diff=True)
        return {"architecture": architecture(model), "lora": self.identity, "generation": generation}

    def check_architecture(self, saved: dict[str, Any], model: PreTrainedModel) -> None:
        """Raise if a checkpoint is of another architecture.

        Raises:
            MisconfigurationException: Names what differs.
        """
        check_architecture(saved["architecture"], model)

    def check_identity(self, saved: dict[str, Any]) -> None:
        """Raise if a checkpoint's adapter belongs to another model.

        Raises:
            MisconfigurationException: Names what differs.
        """
        check_identity(saved.get("lora"), self.identity)
