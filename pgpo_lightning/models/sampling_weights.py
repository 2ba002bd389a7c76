"""The weights that a student is sampled with under autocast: 16-bit copies, made once and not for every token."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pgpo_lightning.losses.logits import Product, scale_logits
from pgpo_lightning.models.cast_weights import cast_weights
from pgpo_lightning.models.lm_head import head


@contextmanager
def sampling_weights(model: PreTrainedModel) -> Iterator[None]:
    """Context in which layers hold copies of their parameters in the type to which autocast would cast them.

    These are the parameters of linear layers and the :func:`~pgpo_lightning.models.cast_weights.cast_weights` of others, such as
    experts. Products are the same, bit for bit. Without the copies, autocast reads and casts all weights again for every token.
    The copies exist while no gradient does, and are released on exit. Nothing is copied outside of autocast, and nothing that is
    quantised.

    Args:
        model: The student. It must not be trained inside the context.
    """
    device = next(model.parameters()).device.type
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    if torch.is_autocast_enabled(device):
        narrow, output = torch.get_autocast_dtype(device), model.get_output_embeddings()
        for module in model.modules():
            # Logits come from another product, and the head may be the embedding too.
            if isinstance(module, nn.Linear) and module is not output:
                swapped += [
                    (module, name, own)
                    for name, own in module._parameters.items()
                    if own is not None and own.dtype in (torch.float32, torch.bfloat16, torch.float16)
                    and own.dtype != narrow
                ]  # fmt: skip
        others = cast_weights(model, narrow)
        swapped += [(module, name, cast("nn.Parameter", module._parameters[name])) for module, name in others]
    try:
        for module, name, own in swapped:
            module._parameters[name] = nn.Parameter(own.detach().to(narrow), requires_grad=False)
        yield
    finally:
        for module, name, own in swapped:
            module._parameters[name] = own


def wide_logits(model: PreTrainedModel) -> Callable[[Tensor], Tensor] | None:
    """Return a function from hidden states ``(n, D)`` to fp32 logits ``(n, V)``; null if the model's own are as exact.

    Products of 16-bit operands are summed in fp32 here, as in the loss. The model itself would round its logits to 16 bits, which
    alone makes a train-inference mismatch.

    Args:
        model: The student. Its head is copied, if its type is not that of the products.
    """
    own = head(model)
    device = own.weight.device.type
    product = Product(own.weight.dtype, device)
    if product.narrow not in (torch.bfloat16, torch.float16):
        return None
    with torch.no_grad(), torch.autocast(device, enabled=False):
        weight = product.operand(own.weight.detach())

    def logits(hidden: Tensor) -> Tensor:
        with torch.autocast(device, enabled=False):
            return scale_logits(product(product.operand(hidden), weight.t()), own, 1.0)[0]

    return logits
