"""Bytes of a teacher with the weights of another model, quantised or not."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from pgpo_lightning.memory_planner.parameters import Count, count, layers_of, skeleton
from pgpo_lightning.models.quantization import Quantization

_BLOCK, _SECOND_BLOCK = 64, 256
"""Weights per constant of 4-bit quantisation, and constants per constant of those, as in bitsandbytes."""


@dataclass(frozen=True)
class External:
    """A teacher with the weights of another model.

    Args:
        config: Its configuration.
        quantization: How its weights are stored; None for their type.
    """

    config: PretrainedConfig
    quantization: Quantization | None = None

    def count(self) -> Count:
        """Return its parameters."""
        return count(self.config, "teacher.model")

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of its weights.

        In 4 bits every matrix of the layers has half a byte per weight, and a constant of 4 bytes per 64 weights, or of one byte
        if the constants are quantised too. In 8 bits it has a byte per weight, and 4 bytes per row. Everything else has its type.

        Args:
            dtype: Type of weights that are not quantised.
        """
        total, found = self.count().total, self.quantization
        if found is None:
            return total * dtype.itemsize
        matrices = self._matrices()
        rest = (total - sum(rows * columns for rows, columns in matrices)) * dtype.itemsize
        if found.bits == 8:
            return rest + sum(rows * columns + 4 * rows for rows, columns in matrices)
        constants = [-(-rows * columns // _BLOCK) for rows, columns in matrices]
        code = 16 * 4  # the values that 4 bits stand for
        each = [4 * n + code for n in constants]
        if found.bnb_4bit_use_double_quant:
            each = [n + 4 * -(-n // _SECOND_BLOCK) + 256 * 4 + 4 + code for n in constants]
        return rest + sum(-(-rows * columns // 2) for rows, columns in matrices) + sum(each)

    def temporary_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of a matrix that is converted back for a product: the largest one in 4 bits, none otherwise.

        Args:
            dtype: Type of the products.
        """
        if self.quantization is None or self.quantization.bits == 8:
            return 0
        return max(rows * columns for rows, columns in self._matrices()) * dtype.itemsize

    def _matrices(self) -> list[tuple[int, int]]:
        maps = [m for m in layers_of(skeleton(self.config)).modules() if isinstance(m, nn.Linear)]
        return [(m.out_features, m.in_features) for m in maps]
