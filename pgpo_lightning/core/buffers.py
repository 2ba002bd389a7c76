"""Buffers that a conversion to half precision leaves alone."""

from collections.abc import Callable

from torch import Tensor, nn


def keeping_buffers(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a conversion for ``module._apply`` that moves buffers which no file holds, but does not narrow them.

    Such buffers are the frequencies of rotary embeddings. ``from_pretrained`` keeps them in fp32 for a model in bf16, and
    ``module.to(torch.bfloat16)`` does not: with eight bits of Qwen3's frequencies an angle at position 1,000 is wrong by up to
    1.2 radians.

    Args:
        module: Whose buffers are meant, those of the modules in it included.
        convert: What ``nn.Module.to`` and its like apply to every parameter and buffer.
    """
    kept = {
        id(buffer)
        for each in module.modules()
        for name, buffer in each._buffers.items()
        if buffer is not None and buffer.is_floating_point() and name in each._non_persistent_buffers_set
    }

    def converted(tensor: Tensor) -> Tensor:
        result = convert(tensor)
        if id(tensor) in kept and result.element_size() < tensor.element_size():
            return tensor.to(result.device)
        return result

    return converted
