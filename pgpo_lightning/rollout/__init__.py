"""Prompts, and the engines that sample responses. The engines are imported on first use, because vLLM is optional."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgpo_lightning.rollout.engine import Engine, NotFiniteError, Sampling
    from pgpo_lightning.rollout.transformers_engine import TransformersEngine
    from pgpo_lightning.rollout.vllm_engine import VLLMEngine

__all__ = ["Engine", "NotFiniteError", "Sampling", "TransformersEngine", "VLLMEngine"]

_FILES = {
    "Engine": "engine",
    "NotFiniteError": "engine",
    "Sampling": "engine",
    "TransformersEngine": "transformers_engine",
    "VLLMEngine": "vllm_engine",
}


def __getattr__(name: str) -> Any:
    """Import a public class when it is first asked for.

    Raises:
        AttributeError: If there is none of that name.
    """
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
