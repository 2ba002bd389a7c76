"""Tiny models with an adapter, and their weights written out."""

import copy

import torch

from pgpo_lightning.models.adapter import adapter
from pgpo_lightning.models.lm_head import source
from pgpo_lightning.models.lora import LoRA

SCALE = 2.0  # lora_alpha / r


def lora(**settings):
    return LoRA(**{"r": 4, "lora_alpha": 8} | settings)


def matrices(module):
    return {name: matrix.detach().clone() for name, matrix in adapter(module).items()}


def disturb(model, scale=0.1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for matrix in adapter(model).values():
            matrix.add_(scale * torch.randn(matrix.shape, generator=generator))


def with_product(model, matrices):
    """A plain model with ``W + scale B A`` written into its weights by hand."""
    with torch.no_grad():
        for name, b in matrices.items():
            if ".lora_B." in name:
                a = matrices[name.replace(".lora_B.", ".lora_A.")]
                model.get_submodule(name.split(".lora_B.")[0]).weight += SCALE * b @ a
    return model


def logits(model, row):
    ids = torch.tensor([[*row.reprompt_ids, *row.rollout.response_ids]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits[0, len(row.reprompt_ids) - 1 : -1]


def teacher_logits(module, row):
    sources = module.learner.teacher_sources([row])
    assert not any(each.hidden.requires_grad for each in sources)
    return sum(each.weight * each.head(each.hidden) for each in sources)


def base_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


def gradients(module, rows, between=lambda: None):
    sequences = module.learner.pack([(row.reprompt_ids, row.rollout.response_ids) for row in rows])
    mine = source(module.model, sequences)
    loss = mine.head(mine.hidden).log_softmax(-1).gather(1, sequences.targets.unsqueeze(1)).sum()
    between()
    loss.backward()
    found = {name: matrix.grad.clone() for name, matrix in adapter(module.model).items()}
    module.model.zero_grad()
    return found


def load(module, other):
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    checkpoint = copy.deepcopy(checkpoint)
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"])
