"""Cases of the loss over tokens, and its plain form."""

from dataclasses import fields

import torch

from pgpo_lightning.losses.divergence import Divergence

N, D, V = 23, 6, 17


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    hidden, weight = draw(N, D).requires_grad_(), draw(V, D).requires_grad_()
    return hidden, weight, draw(N, D), draw(V, D), torch.randint(V, (N,), generator=generator)


CLIPPED = [Divergence(alpha, entry_clip=0.05) for alpha in (0.0, 0.1, 0.5, 1.0)]
CLIPPED += [Divergence(0.5, 5, entry_clip=0.02), Divergence(1.0, 5, False, entry_clip=0.02)]


def label(which):
    """The settings of a divergence that are not the default, as the id of a test."""
    changed = {field.name: getattr(which, field.name) for field in fields(which)}
    return " ".join(f"{key}={value}" for key, value in changed.items() if value != getattr(Divergence(-1.0), key))
