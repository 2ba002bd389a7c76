"""Reads the models in a folder as shards; run by test_sharded_start.py.

Usage: python -m tests.support.shards_worker FOLDER

Writes, per model, what differs from the same model read whole.
"""

import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import Precision
from torch.distributed.tensor import DTensor

from pgpo_lightning.distributed.fsdp import FullySharded, full_tensor
from pgpo_lightning.models.lm_head import check_head
from pgpo_lightning.models.loading import fingerprint, load_model
from pgpo_lightning.models.shards import gathered

IDS = torch.arange(6).unsqueeze(0)


def differences(folder, mesh):
    whole, model = load_model(str(folder)), load_model(str(folder), mesh=mesh)
    sharded = [isinstance(parameter, DTensor) for parameter in model.parameters()]
    if not all(sharded):
        return ["partly sharded" if any(sharded) else "whole"]
    found = []
    rows = [(p.to_local().numel(), p.numel()) for p in model.parameters() if isinstance(p, DTensor)]
    if sum(own for own, _ in rows) > 0.6 * sum(numel for _, numel in rows):
        found.append("more than a half on this rank")
    if any(
        p.to_local().untyped_storage().nbytes() > p.to_local().nbytes
        for p in model.parameters()
        if isinstance(p, DTensor)
    ):
        found.append("more memory than the shard")
    if (
        model.generation_config.to_dict() != whole.generation_config.to_dict()
        or model.config.dtype != whole.config.dtype
    ):
        found.append("configuration")
    found += [name for name, tensor in whole.state_dict().items() if not same(tensor, model.state_dict()[name])]
    found += [name for name, buffer in whole.named_buffers() if not same(buffer, dict(model.named_buffers())[name])]
    if fingerprint(model) != fingerprint(whole):
        found.append("fingerprint")
    with torch.no_grad(), gathered(model):
        check_head(model)
        if not same(model(IDS).logits, whole(IDS).logits):
            found.append("logits before FSDP2")
    if sharded != [isinstance(parameter, DTensor) for parameter in model.parameters()]:
        found.append("left gathered")
    teacher = copy.deepcopy(model).requires_grad_(False)
    placement = FullySharded(model, teacher, mesh, Precision())
    for each in (model, teacher):
        with torch.no_grad():
            if not same(placement.run(lambda each=each: each(IDS).logits), whole(IDS).logits):
                found.append("logits under FSDP2")
    tied = whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
    if tied != (model.get_input_embeddings().weight is model.get_output_embeddings().weight):
        found.append("tie")
    if {p.requires_grad for p in model.parameters()} != {True} or {p.requires_grad for p in teacher.parameters()} != {
        False
    }:
        found.append("requires_grad")
    return found


def same(a, b):
    return torch.equal(full_tensor(a.detach()), full_tensor(b.detach()))


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (2,))
    found = {each.name: differences(each, mesh) for each in sorted((folder / "models").iterdir())}
    torch.save(found, folder / f"found.{os.environ['RANK']}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
