"""Training an adapter instead of all weights (LoRA, arXiv 2106.09685), through peft.

The adapter is added to the model that transformers loaded, whose class, decoder and head do not change. Checkpoints hold the
adapter and the fingerprint of the base weights.
"""

import importlib.util
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION

from pgpo_lightning.core.seeding import seeded
from pgpo_lightning.core.settings import Count, Filled, Text, checked
from pgpo_lightning.distributed.fsdp import full_tensor, shards_set_aside
from pgpo_lightning.models.adapter import adapter, is_adapter
from pgpo_lightning.models.loading import fingerprint, load_model
from pgpo_lightning.models.quantization import Quantization

_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


@partial(checked, prefix="lora.")
@dataclass
class LoRA:
    """A low-rank adapter ``lora_alpha / r * B A`` beside frozen linear layers, with peft's names.

    There is no dropout. The sampler has none, so with dropout the trained policy would differ from the sampled one.

    Args:
        r: Rank.
        lora_alpha: The adapter is multiplied by ``lora_alpha / r``.
        target_modules: Which linear layers get an adapter: their names (``[q_proj, v_proj]``), a regular expression for the whole
            path, or ``all-linear``. Embeddings and the language-model head are not allowed.
        use_rslora: Multiply by ``lora_alpha / sqrt(r)`` instead.
        adapter: Folder of a saved adapter to start from, with the same rank, scale and layers. Null for a new one, which does not
            change the model until it is trained.

    Raises:
        ValueError: If a setting is out of range; names the field.
    """

    r: Count = 16
    lora_alpha: Count = 32
    target_modules: Text | Annotated[list[Text], Filled()] = "all-linear"
    use_rslora: bool = False
    adapter: Text | None = None

    def settings(self) -> dict[str, Any]:
        """Return the settings that a checkpoint must agree with: all but the folder of the initial adapter."""
        settings = asdict(self)
        del settings["adapter"]
        return settings


def check_settings(model: str | PreTrainedModel, lora: LoRA | None, quantization: Quantization | None) -> None:
    """Check the settings that can be checked before a model is loaded.

    Args:
        model: Folder or Hub id, or a model object.
        lora: Settings of the adapter, if there is one.
        quantization: Settings of the quantisation, if there is one.

    Raises:
        ValueError: If settings contradict each other; names the field.
        MisconfigurationException: If peft is not installed, or too old for transformers.
    """
    if lora is None:
        if quantization is not None:
            raise ValueError(
                f"Expected `lora` with `quantization`, because quantised weights cannot be trained, but got {quantization}."
            )
        if not isinstance(model, str) and hasattr(model, "peft_config"):
            raise ValueError(
                f"Expected `model` to be without an adapter of its own, but got {type(model).__name__} with one. Give the base "
                "model, and the adapter as `lora` with `adapter` set to its folder."
            )
        return
    if quantization is not None and not isinstance(model, str):
        raise ValueError(
            "Expected `model` to be a folder or Hub id with `quantization`, which happens while it is loaded, but got "
            f"{type(model).__name__}."
        )
    if not isinstance(model, str) and hasattr(model, "peft_config"):
        raise ValueError(
            f"Expected `model` to be a base model with `lora`, but got {type(model).__name__} with an adapter of its own. "
            "Set `lora.adapter` to the folder of that adapter."
        )
    if importlib.util.find_spec("peft") is None:
        raise MisconfigurationException(
            "Expected peft to be installed with `lora`, but it is missing: pip install 'pgpo-lightning[peft]'."
        )
    if Version(version("peft")) < Version(MIN_PEFT_VERSION):
        raise MisconfigurationException(
            f"Expected peft {MIN_PEFT_VERSION} or newer with `lora`, because transformers {version('transformers')} requires it, "
            f"but peft {version('peft')} is installed. Install compatible versions: pip install 'pgpo-lightning[peft]'."
        )


def add_adapter(model: PreTrainedModel, lora: LoRA, seed: int) -> None:
    """Add an adapter to a model, in fp32, and freeze all other weights.

    Args:
        model: Changed in place. Its class, configuration and methods stay the same.
        lora: Settings of the adapter.
        seed: Seed of the adapter's random matrices.

    Raises:
        MisconfigurationException: If `target_modules` does not fit the model, the initial adapter does not fit `lora`, or peft
            refuses for another reason.
    """
    names = [name for name, _ in model.named_modules()]
    wanted = lora.target_modules if isinstance(lora.target_modules, list) else []
    # peft accepts the list if one of the names is found.
    if missing := [name for name in wanted if not any(f".{path}".endswith(f".{name}") for path in names)]:
        raise MisconfigurationException(
            f"Expected `lora.target_modules` to name layers of {type(model).__name__}, but it has no {', '.join(missing)}."
        )
    try:
        from peft import LoraConfig

        with seeded(seed, "lora"), shards_set_aside(model):  # peft would take the rows of a rank for those of the layer
            model.add_adapter(LoraConfig(**_peft_settings(lora.settings())))
    except (ValueError, ImportError) as error:
        if "target module" in str(error).lower():
            raise MisconfigurationException(
                f"Expected `lora.target_modules` to name linear layers of {type(model).__name__}, but got "
                f"{lora.target_modules!r}: {error}"
            ) from error
        raise MisconfigurationException(
            f"Expected peft {version('peft')} to add an adapter to {type(model).__name__} of transformers "
            f"{version('transformers')}, but it failed: {error}. If the versions are incompatible: pip install "
            "'pgpo-lightning[peft]'."
        ) from error
    for layer in (model.get_output_embeddings(), model.get_input_embeddings()):
        if hasattr(layer, "base_layer"):
            raise MisconfigurationException(
                f"Expected `lora.target_modules` without embeddings and language-model head, but got {lora.target_modules!r}: "
                "the loss is computed from the head's plain weight."
            )
    for parameter in adapter(model).values():
        parameter.data = parameter.data.float()  # in bf16 a small step is rounded away
    if lora.adapter is not None:
        _start_from(model, lora)


# ---- checkpoints


def keep_adapter_only(module: L.LightningModule) -> None:
    """Exclude the base weights of ``module.model`` from its checkpoints."""
    module.register_state_dict_post_hook(_leave_out_base)
    module.register_load_state_dict_post_hook(_do_not_miss_base)


def _leave_out_base(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state if _is_base(name.removeprefix(prefix))]:
        del state[name]


def _do_not_miss_base(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if not _is_base(name)]


def _is_base(name: str) -> bool:
    return name.startswith("model.") and not is_adapter(name)


def identity(model: PreTrainedModel, name: str, loading: dict[str, Any], lora: LoRA) -> dict[str, Any]:
    """Return the description of the base model that a checkpoint of an adapter holds.

    Args:
        model: The model, before the adapter is added.
        name: Folder or Hub id of the model.
        loading: Further arguments of :func:`~pgpo_lightning.models.loading.load_model`.
        lora: Settings of the adapter.
    """
    quantization = loading["quantization"]
    return {
        "base": name,
        "revision": loading["revision"],
        "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "quantization": None if quantization is None else quantization.settings(),
        "fingerprint": fingerprint(model),
        "settings": lora.settings(),
    }


def check_identity(saved: dict[str, Any] | None, configured: dict[str, Any] | None) -> None:
    """Compare the base model of a checkpoint's adapter with the configured model.

    Args:
        saved: The checkpoint's identity; ``None`` if it holds whole weights.
        configured: The identity of this run; ``None`` without an adapter.

    Raises:
        MisconfigurationException: If they differ; names the differences.
    """
    if (saved is None) != (configured is None):
        content, run = ("whole weights", "with") if saved is None else ("an adapter", "without")
        raise MisconfigurationException(f"Expected a checkpoint of a run {run} `lora`, but it holds {content}.")
    if saved is None or configured is None:
        return
    different = [
        f"`{key}` {saved['settings'].get(key)!r} instead of {value!r}"
        for key, value in configured["settings"].items()
        if saved["settings"].get(key) != value
    ]
    if different:
        raise MisconfigurationException(
            f"Expected a checkpoint of the configured `lora`, but its adapter has {', '.join(different)}."
        )
    check_base(saved, configured["fingerprint"])


def check_base(saved: dict[str, Any], found: str) -> None:
    """Compare the fingerprint of a base model with that of the weights that an adapter was trained on.

    Args:
        saved: The adapter's identity.
        found: Fingerprint of the base model.

    Raises:
        MisconfigurationException: If they differ.
    """
    if saved["fingerprint"] != found:
        raise MisconfigurationException(
            f"Expected `model` to be the base that the adapter was trained on ({saved['base'] or 'an object'}, "
            f"`model_config.dtype` "
            f"{saved['dtype']}, `quantization` {saved['quantization']}, fingerprint {saved['fingerprint']}), but got other "
            f"weights (fingerprint {found})."
        )


# ---- peft's folders


def write_adapter(folder: str | Path, matrices: dict[str, Tensor], saved: dict[str, Any]) -> None:
    """Write an adapter as a folder for ``peft.PeftModel.from_pretrained``.

    Args:
        folder: Destination.
        matrices: The adapter's matrices by their names in the model.
        saved: The adapter's :func:`identity`.
    """
    from peft import LoraConfig

    config = LoraConfig(
        **_peft_settings(saved["settings"]),
        base_model_name_or_path=saved["base"],
        revision=saved["revision"],
        inference_mode=True,
    )
    _write(folder, matrices, config)


def write_current_adapter(model: PreTrainedModel, folder: str | Path, dtype: torch.dtype) -> None:
    """Write the adapter that a model has now as :func:`write_adapter`. If it is sharded, every rank must call this.

    Args:
        model: A model with an adapter.
        folder: Destination, one per rank.
        dtype: Type of the matrices in the file.
    """
    matrices = {name: full_tensor(matrix.detach().to(dtype)).cpu() for name, matrix in adapter(model).items()}
    _write(folder, matrices, model.peft_config["default"])


def _write(folder: str | Path, matrices: dict[str, Tensor], config: Any) -> None:
    config.save_pretrained(str(folder))
    contiguous = {_peft_name(name): matrix.contiguous() for name, matrix in matrices.items()}
    save_file(contiguous, Path(folder) / _WEIGHTS, metadata={"format": "pt"})


def merged(folder: str | Path, saved: dict[str, Any], base: str | None) -> PreTrainedModel:
    """Return the base model with an adapter merged into its weights.

    Quantised weights are converted back to `model_config.dtype` first.

    Args:
        folder: Folder of the adapter.
        saved: The adapter's :func:`identity`.
        base: Folder or Hub id of the base model, if it differs from the run's.

    Raises:
        MisconfigurationException: If that is not the model that the adapter was trained on.
        ValueError: If the location of the base model is unknown.
    """
    from peft import PeftModel

    name = base or saved["base"]
    if not name:
        raise ValueError("Expected `base`, because the run was given a model object that came from no folder.")
    quantization = saved["quantization"] and Quantization(**saved["quantization"])
    model = load_model(name, saved["dtype"], revision=saved["revision"], quantization=quantization)
    check_base(saved, fingerprint(model))
    if quantization:
        model = model.dequantize()
    return PeftModel.from_pretrained(model, folder).merge_and_unload(safe_merge=True)


def _start_from(model: PreTrainedModel, lora: LoRA) -> None:
    from peft import LoraConfig

    folder = Path(lora.adapter or "")
    if not (folder / _WEIGHTS).is_file():
        raise MisconfigurationException(f"Expected `lora.adapter` to be a folder with {_WEIGHTS}, but got {folder}.")
    found, plain = LoraConfig.from_pretrained(str(folder)), LoraConfig()
    wanted: dict[str, Any] = {"r": lora.r, "lora_alpha": lora.lora_alpha, "use_rslora": lora.use_rslora}
    wanted |= {name: getattr(plain, name) for name in ("use_dora", "bias", "rank_pattern", "alpha_pattern")}
    different = [
        f"`{name}` {getattr(found, name)!r} instead of {value!r}"
        for name, value in wanted.items()
        if getattr(found, name) != value
    ]
    matrices, start = adapter(model), load_file(folder / _WEIGHTS)
    shapes = {_peft_name(name): parameter.shape for name, parameter in matrices.items()}
    if not different and shapes != {name: tensor.shape for name, tensor in start.items()}:
        different = ["other layers than `target_modules` names"]
    if different:
        raise MisconfigurationException(
            f"Expected the adapter in `lora.adapter` to be as `lora` says, but it has {', '.join(different)}."
        )
    with torch.no_grad():
        for name, parameter in matrices.items():
            parameter.copy_(start[_peft_name(name)])


def _peft_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM"}


def _peft_name(name: str) -> str:
    return _PEFT_PREFIX + name.replace(".default.", ".")
