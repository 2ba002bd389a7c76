"""Low-rank adapters: their number of parameters, and a stand-in for the dry run."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pgpo_lightning.memory_planner.parameters import layers_of, skeleton


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters (LoRA) on linear maps of the layers; everything else is frozen.

    Args:
        rank: Rank of every adapter.
        targets: Last parts of the names of the linear maps, or ``all-linear``. Regular expressions are not supported.
        dtype: Type of their weights. peft makes them fp32 for any type of the model.
    """

    rank: int
    targets: tuple[str, ...] = ("all-linear",)
    dtype: torch.dtype = torch.float32

    def shapes(self, config: PretrainedConfig) -> list[tuple[int, ...]]:
        """Return the shapes of all adapters: ``(rank, in)`` and ``(out, rank)`` for each map.

        Raises:
            ValueError: If a target does not name a linear map of the layers.
        """
        found = self._maps(skeleton(config))
        return [s for _, m in found for s in ((self.rank, m.in_features), (m.out_features, self.rank))]

    def wrap(self, model: PreTrainedModel) -> PreTrainedModel:
        """Freeze the model and add adapters to its linear maps, as peft does."""
        model.requires_grad_(False)
        for name, linear in self._maps(model):
            parent, _, own = name.rpartition(".")
            setattr(layers_of(model).get_submodule(parent), own, _Adapted(linear, self.rank, self.dtype))
        model.enable_input_require_grads()  # as peft does for gradient checkpointing
        return model

    def _maps(self, model: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
        maps = [(n, m) for n, m in layers_of(model).named_modules() if isinstance(m, nn.Linear)]
        if self.targets == ("all-linear",):
            return maps
        names = {name.rpartition(".")[2] for name, _ in maps}
        if unknown := set(self.targets) - names:
            raise ValueError(
                f"Expected `lora.target_modules` to be all-linear or some of {', '.join(sorted(names))}, but got "
                f"{', '.join(sorted(unknown))}."
            )
        return [(name, m) for name, m in maps if name.rpartition(".")[2] in self.targets]


class _Adapted(nn.Module):
    """``base(x) + up(down(x)) * scale``, with x in the adapter's type."""

    def __init__(self, base: nn.Linear, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=dtype)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        return (result + self.up(self.down(x.to(self.down.weight.dtype))) * 2.0).to(result.dtype)
