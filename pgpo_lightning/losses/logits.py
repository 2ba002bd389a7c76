"""From hidden states to logits: heads, sums of several sources, and matrix products that do not lose precision."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pgpo_lightning.core.devices import is_gpu


@dataclass
class Head:
    """A language-model head: ``softcap(scale * hidden @ weight.T)``.

    Args:
        weight: The output embedding, shape ``(V, D)``.
        scale: Factor of the logits (Cohere, Granite).
        softcap: ``cap * tanh(logits / cap)`` (Gemma); ``None`` for none.
    """

    weight: Tensor
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits ``(..., V)`` of hidden states ``(..., D)``."""
        logits = hidden.to(self.weight.dtype) @ self.weight.T * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass
class Source:
    """Where logits come from: ``weight * head(hidden)``.

    The logits of several sources are summed, which is how the trust-region teacher of SDPO mixes two models.

    Args:
        hidden: Hidden states, shape ``(N, D)``.
        head: The head that belongs to them.
        weight: Factor of the logits in the sum.
    """

    hidden: Tensor
    head: Head
    weight: float = 1.0


class Product:
    """Matrix products of narrow operands with wide results.

    Logits rounded to bf16 add an error of 3e-4 nats to every divergence. A head's gradient summed in bf16 loses small terms.

    Args:
        dtype: Type of the head's weight.
        device: Type of its device, such as ``cuda``.
    """

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        # Only CUDA multiplies narrow matrices into wide ones. Elsewhere the operands are rounded, then widened. So are operands
        # in fp16 on CUDA, because the gradient of a logit is unscaled here and would mostly underflow.
        self.native = is_gpu(device) and self.narrow == torch.bfloat16
        self.operand_type = self.narrow if self.native else self.wide

    def operand(self, matrix: Tensor) -> Tensor:
        """Return a matrix in the type in which it is multiplied."""
        rounded = matrix.to(self.narrow)
        return rounded if self.native else rounded.to(self.wide)

    def gradient(self, matrix: Tensor) -> Tensor:
        """Return a gradient of logits in the type in which it is multiplied."""
        return matrix if self.narrow == torch.float16 else self.operand(matrix)

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the product of two operands, in the wide type."""
        return torch.mm(left, right, out_dtype=self.wide) if self.native else left @ right

    def add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Add the product of two operands to a matrix of the wide type, in place."""
        if self.native:
            torch.addmm(total, left, right, out_dtype=self.wide, out=total)
        else:
            total.addmm_(left, right)


def mixed_logits(teachers: list[tuple[Source, Tensor]], chunk: slice, product: Product) -> Tensor | None:
    """Return the weighted sum of the logits of all sources, or ``None`` without sources.

    Args:
        teachers: Sources, each with the weight of its head as an operand.
        chunk: Tokens whose logits are returned.
        product: The product of hidden states and heads.
    """
    logits = None
    for source, weight in teachers:
        term, _ = scale_logits(product(product.operand(source.hidden[chunk]), weight.t()), source.head, 1.0)
        logits = term.mul_(source.weight) if logits is None else logits.add_(term, alpha=source.weight)
    return logits


def scale_logits(logits: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor | float]:
    """Apply scale, soft cap and temperature to raw logits in place; return them, and their derivative in the raw logits."""
    slope: Tensor | float = head.scale / temperature
    if head.softcap is None:
        return (logits if slope == 1.0 else logits.mul_(slope)), slope
    tanh = logits.mul_(head.scale / head.softcap).tanh_()
    slope = tanh.square().neg_().add_(1).mul_(slope)
    return tanh.mul_(head.softcap / temperature), slope
